# SPDX-License-Identifier: Apache-2.0
"""Counts the steps that any Paddle optimizer takes, whoever asks for them. Must not know what the count is for."""

from __future__ import annotations

import weakref
from typing import Any, Callable, NoReturn

import paddle
from paddle.optimizer import Optimizer

from .state import WAYS_TO_A_STEP, skipped_its_step
from .tracing import leave_trace


class StepCounter:
    """Counts an optimizer's steps that changed its parameters; those that an Inf or a NaN prevented do not count.

    The counter lies on the optimizer itself, in place of its methods, so steps that ``GradScaler``, ``paddle.Model`` or
    a wrapper of fleet asks for count as well. It lives as long as its owner holds it.

    Args:
        optimizer: of any class.
        before: called before every step; what it raises prevents the step.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None]) -> None:
        self.steps = 0
        self._optimizer, self._before = optimizer, weakref.WeakMethod(before)
        self._inside = False
        for way in WAYS_TO_A_STEP:
            setattr(optimizer, way, _Way(weakref.ref(self), way, getattr(optimizer, way)))

    def take(self, way: str, call: Callable[..., Any], arguments: tuple, options: dict[str, Any]) -> Any:
        """Make a call that may be a step, and count it; within another one it is a part of that."""
        if self._inside:
            return call(*arguments, **options)
        before = self._before()
        if before is not None:
            before()
        if paddle.base.dygraph.base.in_to_static_mode():
            raise RuntimeError(
                "step: received a call within a function that to_static traces whole, where steps cannot be counted, "
                "expected one outside of it; leave optimizer=... out, and call update() after each step"
            )
        self._inside = True
        try:
            result = call(*arguments, **options)
        finally:
            self._inside = False
        # A wrapper may come group by group, which is one step.
        later_group = way == WAYS_TO_A_STEP[-1] and (options.get("param_group_idx") or (*arguments, 0, 0, 0, 0)[3])
        if not later_group and not skipped_its_step(self._optimizer):
            self.steps += 1
        return result


class _Way:
    """A method of an optimizer, counted."""

    def __init__(self, counter: weakref.ref[StepCounter], way: str, method: Callable[..., Any]) -> None:
        self._counter, self._way, self._method = counter, way, method
        self.__name__, self.__doc__ = way, method.__doc__

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        leave_trace()
        counter = self._counter()
        if counter is None:
            return self._method(*arguments, **options)
        return counter.take(self._way, self._method, arguments, options)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # A copy would step the optimizer that was copied.
        raise TypeError(
            "optimizer: received a request to copy or pickle an optimizer whose steps an AveragedModel counts, "
            "expected none; create another one, and load the state_dict of this one"
        )
