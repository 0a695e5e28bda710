# SPDX-License-Identifier: Apache-2.0
"""What a step takes besides its tensors: which slot its batch has, what the batches weigh, theta, and the watch.

Checks and keeps them, and brings each to where the native call needs it. Must not know how a step is taken (fused.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Callable

import numpy as np
import paddle
from paddle.base.dygraph.base import in_to_static_mode
from paddle.base.framework import in_dygraph_mode

from .. import arguments, entries
from ..options import Bucket
from ..state import ParameterState, state_guard
from ..uninterrupted import uninterrupted
from .checks import check_step, check_theta
from .slots import (
    BatchIndex,
    check_clock,
    check_same_weights,
    clock_length,
    grown_clock,
    normalised_weights,
    static_float64,
)
from .watch import WATCH_SIZE, Watch

#: Entries of a checkpoint that hold numbers of these inputs, and not a parameter's state.
WEIGHTS, THETA_STEP = "batch_weights", "theta_step"
#: What tells in a sharded checkpoint whether a batch index was ever used, on which the length of the clocks depends.
INDEX_USED = "batch_index_used"
#: The name of the watch's tensor, which no checkpoint needs.
WATCH = "watch"


class StepInputs:
    """The inputs of one optimizer's steps.

    Args:
        n: the number of slots.
        batch_weights: the weights of the batches, as ``ASGD`` takes them.
        theta: None, a number or a callable, as ``ASGD`` takes it.
        watch: None, True or False, as ``ASGD`` takes it.

    Raises:
        TypeError, ValueError: one of them is of the wrong type or out of range.
    """

    def __init__(self, n: int, batch_weights: Any, theta: Any, watch: Any) -> None:
        self.n = n
        self.index = BatchIndex(n)
        self.weights = normalised_weights(batch_weights, n)
        self._weights_beside: dict[str, Any] = {}
        #: the parameters of the last native call, and the weights on their device
        self._weights_last: tuple[Any, Any] = (None, None)
        self._theta = check_theta(theta)
        #: the number of steps before the next one, and that step's theta
        self._theta_now: tuple[int, float] | None = None
        #: the number of steps taken or skipped so far
        self.steps = 0
        self._watch_wanted = watch if watch is None else arguments.check_flag("watch", watch)
        self.watch = None if self._watch_wanted is False else Watch(n, self.index)

    # ---- The batch index and the clocks ------------------------------------------------------------------------------

    def clock_length(self) -> int:
        """Length of each parameter's clock: 1, or more once a batch index is in use."""
        return clock_length(self.n) if self.index.in_use else 1

    def give_index(self, value: Any, state: ParameterState, params: Sequence[Any] | None) -> None:
        """Set the batch index of the next step. With the first one, the clocks begin to record which slots have been
        seen.

        Args:
            value: an int or a tensor of one int64; in static graphs a variable.
            state: the parameters' state, which has the clocks.
            params: the optimizer's parameters; None if it stands for all of a program.

        Raises:
            TypeError: the value is of the wrong kind, or on a device while there is no watch to report one out of
                range.
            ValueError: it is out of range.
            RuntimeError: ``minimize`` has built a step without a batch index.
        """
        index = self.index.checked(value)
        if self.watch is None and _is_on_device(index):
            raise TypeError(
                "batch_index: received a tensor on a device, expected an int with watch=False, for the watch alone "
                "tells of one out of range"
            )
        before = self.index.next
        if self.index.in_use:
            self.index.next = index
        else:
            self.use_index(state, index)
        self.index.note_replaced(before, params)

    def use_index(self, state: ParameterState, index: Any = None) -> None:
        """Replace all clocks by those that record which slots have been seen, unless they are such.

        Args:
            state: the parameters' state, which has the clocks.
            index: the first index, already checked; None if a checkpoint is loaded.
        """
        if self.index.in_use:
            return
        held = [param for param in state.created if state.of(param) is not None]
        if held and _in_static_graph():
            raise RuntimeError(
                "batch_index: received after minimize() had built a step without one, expected before the first "
                "minimize()"
            )
        with state_guard():
            # So far the slots took turns.
            grown = [(param, grown_clock(state.named(param)["m"].numpy(), self.n)) for param in held]
            placed = [state.replacement(p, "m", paddle.to_tensor(c, place=paddle.CPUPlace())) for p, c in grown]
        # All at once, because a step is refused if the clocks are not of the kind that ``in_use`` says.
        change = partial(setattr, self.index)
        uninterrupted(*placed, partial(change, "next", index), partial(change, "in_use", True))

    # ---- A step -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Refuse a step that cannot be taken, and find out the theta of this step.

        Raises:
            TypeError: the batch index was set in another mode, or theta is a callable in a static graph.
            ValueError: the batch index is missing, or the callable's result is not a finite number of at least 0.
        """
        index = self.index
        if index.in_use or index.next is not None:
            index.require()
            if index.mixed is not None:
                index.warn_of_mixture()
        # The callable is asked once for each step, however many native calls and attempts the step takes.
        if callable(self._theta) and (self._theta_now is None or self._theta_now[0] != self.steps):
            if not in_dygraph_mode():
                raise TypeError(
                    "theta: received a callable, expected a number: in a static graph no Python runs in a step"
                )
            theta = arguments.check_number(f"theta of step {self.steps}", self._theta(self.steps))
            self._theta_now = (self.steps, theta)

    def step_taken(self) -> list[Callable[[], Any]]:
        """C calls that note a step as taken or skipped: the index is used up, and the count of steps goes on."""
        counted = partial(setattr, self, "steps", self.steps + 1)
        return [counted, partial(vars(self.index).update, next=None, mixed=None)] if self.index.in_use else [counted]

    def of_planned_step(self, bucket: Bucket) -> tuple[Any, Any, Any, Any]:
        """Batch index, weights, theta and watch as a planned step takes them, for parameters that had a step before.

        Args:
            bucket: the parameters of the step.
        """
        weights = None if self.weights is None else self.weights_of(bucket)
        theta = self._theta_now[1] if callable(self._theta) else self._theta
        return self.index.next, weights, theta, None if self.watch is None else self.watch.tensor

    def weights_of(self, bucket: Bucket) -> Any | None:
        """The batches' weights as a native call takes them: float64 ``[n]`` on the parameters' device; None without
        weights.

        Args:
            bucket: the parameters of the call.
        """
        if self.weights is None:
            return None
        if not in_dygraph_mode():
            return static_float64(self.weights)
        if self._weights_last[0] is not bucket.params:
            self._weights_last = (bucket.params, self.weights_on(bucket.params[0].place))
        return self._weights_last[1]

    def weights_on(self, place: Any) -> Any | None:
        """The batches' weights on a device, float64 ``[n]``, made once for each device; dygraph only. None without
        weights.

        Args:
            place: the device, a Paddle place.
        """
        if self.weights is None:
            return None
        held = self._weights_beside.get(str(place))
        if held is None:
            held = self._weights_beside[str(place)] = paddle.to_tensor(self.weights, place=place)
        return held

    @property
    def given_theta(self) -> Any | None:
        """The theta that the user passed: None, a number or a callable."""
        return self._theta

    def theta(self) -> Any | None:
        """Theta of this step as the native call takes it: None, a number, or a constant of the graph."""
        if callable(self._theta):
            return self._theta_now[1]
        return self._theta if in_dygraph_mode() or self._theta is None else paddle.full([1], self._theta, "float64")

    def watch_of(self, bucket: Bucket, state: ParameterState) -> Any | None:
        """The tensor in which the watch keeps its numbers, for the first native call of a step; None without a watch.

        Args:
            bucket: the parameters of the call, beside the first of which the tensor lies.
            state: the parameters' state.
        """
        if self.watch is None or (_in_static_graph() and not self._watch_wanted and not self.index.in_use):
            return None
        if self.watch.tensor is None or not in_dygraph_mode():
            with state_guard():
                self.watch.tensor = state.place_beside(bucket.params[0], WATCH, [WATCH_SIZE], "float64")
        return self.watch.tensor

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def collect(self) -> dict[str, Any]:
        """Entries that a checkpoint must have because of these inputs: the weights, and the step of a theta that
        varies.
        """
        collected: dict[str, Any] = {}
        if self.weights is not None:
            collected[WEIGHTS] = entries.number_entry(self.weights, "float64")
        if callable(self._theta):
            collected[THETA_STEP] = entries.number_entry([self.steps], "int64")
        return collected

    def check_loaded(self, state_dict: dict[str, Any]) -> int:
        """Refuse a checkpoint that does not go with these inputs.

        Args:
            state_dict: all entries of the checkpoint.

        Returns:
            The number of steps before the next one, from the checkpoint if it has it.

        Raises:
            ValueError: the weights are others, or the number of steps is damaged.
        """
        check_same_weights(entries.entry_value(state_dict.get(WEIGHTS)), self.weights, self.n)
        if THETA_STEP not in state_dict:
            return self.steps
        return check_step(f"set_state_dict: {THETA_STEP!r}", entries.entry_value(state_dict[THETA_STEP]))

    def going_on_at(self, step: int) -> Callable[[], Any]:
        """C call that sets the number of steps before the next one, when a checkpoint is loaded."""
        return partial(setattr, self, "steps", step)

    def adapt_clocks(self, states: dict[str, dict[str, Any]], undo: list[Callable[[], Any]]) -> None:
        """Let the clocks of a checkpoint suit the optimizer's, since a step needs clocks of one kind.

        If either side knows which slots have been seen, all clocks are made such, and every step needs a batch index.

        Args:
            states: what the checkpoint holds for each parameter; its clocks are replaced in place.
            undo: gets the call that undoes the change of this object.

        Raises:
            ValueError: a clock contradicts itself.
        """
        clocks = [(s, entries.as_tensor(name, "m", s["m"]).numpy()) for name, s in states.items() if "m" in s]
        length = clock_length(self.n)
        for _, clock in clocks:
            wrong = check_clock(clock, self.n) if clock.shape == (length,) else None
            if wrong is not None:
                arguments.refuse_state(f"a clock m {wrong}")
        if not self.index.in_use and not any(clock.shape == (length,) for _, clock in clocks):
            return
        undo.append(partial(setattr, self.index, "in_use", self.index.in_use))
        self.index.in_use = True
        for state, clock in clocks:
            if clock.shape == (1,) and clock.dtype == np.int64:
                state["m"] = grown_clock(clock, self.n)

    def shown(self) -> dict[str, str]:
        """Text of the inputs that are not at their defaults, by name, for a repr."""
        given = {
            "batch_weights": None if self.weights is None else f"{self.n} numbers",
            "theta": None if self._theta is None else repr(self._theta) if not callable(self._theta) else "function",
            "watch": None if self._watch_wanted is None else repr(self._watch_wanted),
        }
        return {name: text for name, text in given.items() if text is not None}


def _is_on_device(index: Any) -> bool:
    """Whether an index is a tensor whose value does not lie on the host."""
    return isinstance(index, paddle.Tensor) and not index.place.is_cpu_place()


def _in_static_graph() -> bool:
    """Whether state are variables of a program. A step that ``to_static`` traces has its state in dygraph."""
    return not in_dygraph_mode() and not in_to_static_mode()
