# SPDX-License-Identifier: Apache-2.0
"""The watch over the slots: reads what the kernel samples, and warns where slots that do not fit their batches do harm.

Must not wait for a device within a step. What is sampled, and how, is in csrc/asgd_watch.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import paddle

from ..caller import warn
from .slots import BatchIndex, SlotMismatchWarning

#: What the kernel keeps, in the order of its enum WatchEntry; behind these, the first three of the last whole passes.
ENTRIES = ("replaced", "centred", "sampled", "steps", "passes", "refusals", "refused_index")
PASSES_JUDGED = 8
PASSES_KEPT = PASSES_JUDGED + 1
WATCH_SIZE = len(ENTRIES) + 3 * PASSES_KEPT
#: Of the passes that are judged, the last and at least so many in all must exceed the threshold: with few batches the
#: ratio of wrong slots swings below it now and then.
PASSES_ABOVE = 5
#: The spread of right slots' gradients goes on falling; that of wrong ones stops at a floor. If any pass that is judged
#: has less than this part of the spread of the pass before them, it is still falling.
STILL_FALLING = 0.5


def threshold(n: int) -> float:
    """The ratio that a pass must not exceed: 0.7 of 2 n / (n + 1), the ratio of slots that are drawn by lot.

    Wrong slots exceed it in almost every pass. Right ones do, too, where x still moves and the batches are much alike:
    then both sums tell how far x has moved, and y_i is older than the mean. So this alone is no reason to warn.
    """
    return 1.4 * n / (n + 1)


class Pass(NamedTuple):
    """What was sampled in one whole pass."""

    replaced: float
    centred: float
    sampled: float

    @property
    def ratio(self) -> float | None:
        """None if there is nothing to compare, or a gradient was not finite."""
        if not np.isfinite(self.replaced + self.centred):
            return None
        if self.centred == 0:
            return None if self.replaced == 0 else float("inf")
        return self.replaced / self.centred

    @property
    def spread(self) -> float:
        """The mean of |g - d / seen|^2, NaN in a pass that met no slot for the second time."""
        return self.centred / self.sampled if self.sampled else float("nan")


class Watch:
    """What is known about one optimizer's slots.

    Args:
        n: the number of slots, which is the number of steps in a pass.
        index: tells whether the user says which batch it is.
    """

    def __init__(self, n: int, index: BatchIndex) -> None:
        self._n = n
        self._index = index
        self.tensor: Any = None
        self._seen = np.zeros(WATCH_SIZE)
        self._warned = False
        #: on a GPU: the copy under way, and the event that says when it has arrived
        self._in_flight: tuple[Any, Any] | None = None

    def end_step(self, steps: int) -> None:
        """After ``steps`` steps, once a pass, look at what has been found; a device's numbers are a pass older."""
        if steps % self._n == 0 and self.tensor is not None and isinstance(self.tensor, paddle.Tensor):
            arrived = self._fetch()
            if arrived is not None:
                self.look(arrived)

    def _fetch(self) -> np.ndarray | None:
        """The numbers, if they can be had without waiting."""
        if self.tensor.place.is_cpu_place():
            return self.tensor.numpy()
        arrived = None
        if self._in_flight is not None:
            copy, event = self._in_flight
            if not event.query():
                return None
            arrived = copy.numpy()
        event = paddle.device.cuda.Event()
        copy = self.tensor._copy_to(paddle.CUDAPinnedPlace(), False)
        event.record()
        self._in_flight = (copy, event)
        return arrived

    def look(self, values: np.ndarray) -> float | None:
        """Take note of what the kernel has found; raise or warn if need be. Returns the ratio of the last pass.

        The kernel's numbers alone decide, so it makes no difference which earlier passes somebody has looked at.
        """
        before, found = (dict(zip(ENTRIES, numbers.tolist())) for numbers in (self._seen, values))
        if (found["passes"], found["steps"]) < (before["passes"], before["steps"]):
            # A device's copy, overtaken by somebody who asked for the numbers and waited.
            return self._ratio(self._seen)
        self._seen = values
        if found["refusals"] > before["refusals"]:
            raise ValueError(
                f"batch_index: received {found['refused_index']:.0f} in an earlier step, expected 0 to {self._n - 1}, "
                f"for batch_num is {self._n}; steps that changed nothing: {found['refusals'] - before['refusals']:.0f}"
            )
        if found["passes"] > before["passes"] and not self._warned and does_harm(values, self._n):
            self._warned = True
            self._warn(last_pass(values).ratio)
        return self._ratio(values)

    def _ratio(self, values: np.ndarray) -> float | None:
        # With one slot both sums are the same.
        return None if self._n == 1 else last_pass(values).ratio

    def _warn(self, ratio: float) -> None:
        wrong_index = (
            "batch_index is not the batch's own number (take it from sampler.enumerate(loader) of a "
            "paddle_asgd.FixedBatchSampler, not from Python's enumerate(loader))"
            if self._index.in_use
            else "the loader has shuffle=True (use a paddle_asgd.FixedBatchSampler, and set optimizer.batch_index from "
            "its enumerate(loader))"
        )
        warn(
            f"ASGD: in most of the last {PASSES_JUDGED} passes the gradients stored for the batches told less about "
            f"the next ones than the mean of all gradients does (variance_ratio {ratio:.2g}; near 0 they fit, near 2 "
            "they have nothing to do with the batches), and the spread of the gradients has stopped falling. To tell "
            "the causes apart, train a few passes with set_lr(0): variance_ratio falls towards 0 if every slot has its "
            "batch. "
            f"If it does not, either slots and batches do not match: {wrong_index}, or batch_num={self._n} is not the "
            "number of batches; or a batch's gradient changes between passes by augmentation or dropout, and SGD suits "
            "better. If it does, the learning rate is probably at the limit that a fixed or reshuffled order sets: "
            "theta=0.3 lifts most of it, and order='replacement' has none. Batches that are much alike are harmless.",
            SlotMismatchWarning,
        )


def last_pass(values: np.ndarray, back: int = 0) -> Pass:
    """The last whole pass in the kernel's numbers, or the one ``back`` before it; zeros before there is one."""
    passes = int(values[ENTRIES.index("passes")])
    begin = len(ENTRIES) + 3 * ((passes - 1 - back) % PASSES_KEPT)
    return Pass(*values[begin : begin + 3].tolist())


def does_harm(values: np.ndarray, n: int) -> bool:
    """Whether the kernel's numbers speak of wrong slots that keep the steps from converging.

    Most of the passes that are judged exceed the threshold, the last among them, and the spread of none is well below
    that of the pass before them.
    """
    if n == 1:
        return False
    # A row that no pass has left yet has a spread of NaN, which no comparison below accepts.
    *judged, before = (last_pass(values, back) for back in range(PASSES_KEPT))
    above = [pass_.ratio is not None and pass_.ratio > threshold(n) for pass_ in judged]
    if not above[0] or sum(above) < PASSES_ABOVE:
        return False
    return all(pass_.spread > STILL_FALLING * before.spread for pass_ in judged)
