# SPDX-License-Identifier: Apache-2.0
"""The watch over the slots: reads what the kernel samples, and warns if slots do not fit their batches and do harm.

Must not wait for a device within a step. What is sampled, and how, is in csrc/asgd_watch.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import paddle

from .. import native
from ..caller import warn
from ..sharding import summed
from .slots import BatchIndex, SlotMismatchWarning

#: What the kernel keeps, in the order of its enum WatchEntry. The first three of each of the last whole passes follow.
ENTRIES = ("replaced", "centred", "sampled", "steps", "passes", "refusals", "refused_index")
PASSES_JUDGED = 8
PASSES_KEPT = PASSES_JUDGED + 1
WATCH_SIZE = len(ENTRIES) + 3 * PASSES_KEPT
#: How many of the passes that are judged must exceed the threshold, the last one among them. It is not all of them,
#: because with few batches the ratio of wrong slots falls below it now and then.
PASSES_ABOVE = 5
#: The spread of right slots' gradients keeps falling; that of wrong ones stops at a floor. It is taken to be still
#: falling if any pass that is judged has less than this share of the spread of the pass before them all.
STILL_FALLING = 0.5


def threshold(n: int) -> float:
    """Ratio that a pass of right slots stays below, as a rule: 0.7 times 2 n / (n + 1), the ratio of slots drawn by
    lot.

    Wrong slots exceed it in almost every pass. Right ones do so, too, while x still moves and the batches are much
    alike: both sums then tell how far x has moved, and y_i is older than the mean. The ratio alone is therefore no
    reason to warn.

    Args:
        n: the number of slots.

    Examples:
        >>> round(threshold(3), 3)
        1.05
    """
    return 1.4 * n / (n + 1)


class Pass(NamedTuple):
    """What was sampled in one whole pass: two sums of squares, and the number of gradients in them."""

    replaced: float
    centred: float
    sampled: float

    @property
    def ratio(self) -> float | None:
        """``replaced / centred``; None if there is nothing to compare, or a gradient was not finite."""
        if not np.isfinite(self.replaced + self.centred):
            return None
        if self.centred == 0:
            return None if self.replaced == 0 else float("inf")
        return self.replaced / self.centred

    @property
    def spread(self) -> float:
        """The mean of |g - d / seen|^2; NaN for a pass that met no slot for the second time."""
        return self.centred / self.sampled if self.sampled else float("nan")


class Watch:
    """What is known about one optimizer's slots.

    Args:
        n: the number of slots, which is the number of steps in a pass.
        index: tells whether the user says which batch comes.
    """

    def __init__(self, n: int, index: BatchIndex) -> None:
        self._n = n
        self._index = index
        self._threshold = threshold(n)
        self.tensor: Any = None
        self._seen = np.zeros(WATCH_SIZE)
        self._warned = False
        #: on a GPU: the copy under way, and the event that says when it has arrived
        self._in_flight: tuple[Any, Any] | None = None

    def end_pass(self, group: Any | None = None) -> None:
        """Look at the numbers behind the last step of a pass; those of a device are a pass older.

        Args:
            group: the ranks that have the other parts of the parameters; None if there are none. They all end their
                passes with the same step, because each counts all steps, those included that an Inf skips.

        Raises:
            ValueError: the kernel has met a batch index out of range.
        """
        if group is not None and self._n > 1:
            self._look_at_parts(group)
        # One short call takes the place of the whole judgement, which nearly always finds nothing to say.
        elif isinstance(self.tensor, paddle.Tensor) and native.watch_wants_a_look(self.tensor, self._threshold):
            self._look_at(self.tensor)

    def _look_at_parts(self, group: Any) -> None:
        """Look at the sums over the ranks of what each has sampled of its part, which are the same on all of them."""
        # A rank whose part is empty has sampled nothing, but the others wait for it.
        own = paddle.zeros([WATCH_SIZE], "float64") if self.tensor is None else self.tensor
        of_all = summed(own[len(ENTRIES) :], group)
        if self.tensor is not None:
            self._look_at(paddle.concat([own[: len(ENTRIES)], of_all]))

    def _look_at(self, tensor: Any) -> None:
        """Look at numbers of the kernel's form, or at an older copy if they are still on their way from a device."""
        arrived = self._fetch(tensor)
        if arrived is not None:
            self.look(arrived)

    def ratio_of_parts(self) -> float | None:
        """The ratio of the last whole pass over all parts of the parameters; None if there is none yet."""
        return self._ratio(self._seen)

    def _fetch(self, tensor: Any) -> np.ndarray | None:
        """The kernel's numbers, if they can be had without waiting; otherwise None.

        From a GPU they are copied in the background, and come with a later call.
        """
        if tensor.place.is_cpu_place():
            return tensor.numpy()
        arrived = None
        if self._in_flight is not None:
            copy, event = self._in_flight
            if not event.query():
                return None
            arrived = copy.numpy()
        event = paddle.device.cuda.Event()
        copy = tensor._copy_to(paddle.CUDAPinnedPlace(), False)
        event.record()
        self._in_flight = (copy, event)
        return arrived

    def look(self, values: np.ndarray) -> float | None:
        """Take note of the kernel's numbers, and raise or warn if they call for it.

        The numbers alone decide, so it makes no difference which earlier passes have been looked at.

        Args:
            values: a float64 array ``[WATCH_SIZE]``.

        Returns:
            The ratio of the last whole pass; None if there is none.

        Raises:
            ValueError: the kernel has met a batch index out of range since the last look.
        """
        before, found = (dict(zip(ENTRIES, numbers.tolist())) for numbers in (self._seen, values))
        if (found["passes"], found["steps"]) < (before["passes"], before["steps"]):
            # This is a device's copy, and somebody has waited for newer numbers in the meantime.
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
        """Ratio of the last whole pass; None with one slot, where both sums are the same."""
        return None if self._n == 1 else last_pass(values).ratio

    def _warn(self, ratio: float) -> None:
        """Warn that slots do not fit their batches, with the ratio of the last pass and what to do about it."""
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
    """A whole pass in the kernel's numbers; all zeros if there is none yet.

    Args:
        values: a float64 array ``[WATCH_SIZE]``.
        back: how many passes before the last one; at most ``PASSES_JUDGED``.
    """
    passes = int(values[ENTRIES.index("passes")])
    begin = len(ENTRIES) + 3 * ((passes - 1 - back) % PASSES_KEPT)
    return Pass(*values[begin : begin + 3].tolist())


def does_harm(values: np.ndarray, n: int) -> bool:
    """Whether the kernel's numbers show wrong slots that keep the steps from converging.

    That is so if most of the passes that are judged exceed the threshold, the last one among them, and no pass has a
    spread well below that of the pass before them all.

    Args:
        values: a float64 array ``[WATCH_SIZE]``.
        n: the number of slots.
    """
    if n == 1:
        return False
    # A pass that has not been yet has a spread of NaN, for which every comparison below is False.
    *judged, before = (last_pass(values, back) for back in range(PASSES_KEPT))
    above = [pass_.ratio is not None and pass_.ratio > threshold(n) for pass_ in judged]
    if not above[0] or sum(above) < PASSES_ABOVE:
        return False
    return all(pass_.spread > STILL_FALLING * before.spread for pass_ in judged)
