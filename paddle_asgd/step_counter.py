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
        before: a method of the owner, called before every step; what it raises prevents the step.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None]) -> None:
        #: grows with every step, by more than 1 where one of its methods calls another
        self.steps = 0
        # Weak, or the owner would wait for the garbage collector with all that it holds.
        self._optimizer, self._before = optimizer, weakref.WeakMethod(before)
        for way in WAYS_TO_A_STEP:
            setattr(optimizer, way, _Way(weakref.ref(self), way, getattr(optimizer, way)))

    def take(self, method: Callable[..., Any], arguments: tuple, options: dict[str, Any]) -> Any:
        """Call what is a step or a part of one, and count it if it was taken."""
        # First: the tracer cannot go through what comes below.
        if paddle.base.dygraph.base.in_to_static_mode():
            raise RuntimeError(
                "step: received a call within a function that to_static traces whole, where steps cannot be counted, "
                "expected one outside of it; leave optimizer=... out, and call update() after each step"
            )
        before = self._before()
        if before is not None:
            before()
        result = method(*arguments, **options)
        if not skipped_its_step(self._optimizer):
            self.steps += 1
        return result


class _Way:
    """A method of an optimizer, counted."""

    def __init__(self, counter: weakref.ref[StepCounter], way: str, method: Callable[..., Any]) -> None:
        self._counter, self._method = counter, method
        self.__name__, self.__doc__ = way, method.__doc__

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        leave_trace()
        counter = self._counter()
        if counter is None:
            return self._method(*arguments, **options)
        return counter.take(self._method, arguments, options)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # A copy would step the optimizer that was copied.
        raise TypeError(
            "optimizer: received a request to copy or pickle an optimizer whose steps an AveragedModel counts, "
            "expected none; create another one, and load the state_dict of this one"
        )
