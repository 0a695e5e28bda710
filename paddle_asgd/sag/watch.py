"""The watch over the slots: reads what the kernel samples, and warns where stored gradients do not fit their batches.

Must not wait for a device within a step. What is sampled, and how, is in csrc/asgd_watch.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from ..caller import warn
from .slots import BatchIndex

#: What the kernel keeps, in the order of its enum WatchEntry.
ENTRIES = (
    "replaced",
    "centred",
    "steps",
    "last_replaced",
    "last_centred",
    "passes",
    "refusals",
    "refused_index",
)
#: In the first passes x moves so far that the last gradient of any batch is out of date.
PASSES_IGNORED = 3


def threshold(n: int) -> float:
    """What two passes in a row must not exceed.

    Where slots have nothing to do with batches the ratio is 2 n / (n + 1), and this is 0.7 of it. With n = 35
    that is 1.36. Wrong slots gave at least 1.5 (100 runs); right ones fall from 0.7 to below 0.01, stay near 0.5 under
    30 % noise in the input, and exceed 1.36 only with a step size that is about to diverge.
    """
    return 1.4 * n / (n + 1)


class SlotMismatchWarning(UserWarning):
    """Stored gradients tell less about the next ones of their batches than the mean of all does."""


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
        self._seen: dict[str, float] = dict.fromkeys(ENTRIES, 0.0)
        self._last: float | None = None
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
        """Take note of what the kernel has found; raise or warn if need be. Returns the ratio of the last pass."""
        before, found = self._seen, dict(zip(ENTRIES, values.tolist()))
        if (found["passes"], found["steps"]) < (before["passes"], before["steps"]):
            return self._ratio(before)  # a device's copy, overtaken by somebody who asked for the numbers and waited
        self._seen = found
        if found["refusals"] > before["refusals"]:
            raise ValueError(
                f"batch_index: received {found['refused_index']:.0f} in an earlier step, expected 0 to {self._n - 1}, "
                f"for batch_num is {self._n}; steps that changed nothing: {found['refusals'] - before['refusals']:.0f}"
            )
        ratio = self._ratio(found)
        if found["passes"] > max(before["passes"], PASSES_IGNORED):
            last, self._last = self._last, ratio
            too_large = [value is not None and value > threshold(self._n) for value in (last, ratio)]
            if all(too_large) and not self._warned:
                self._warned = True
                self._warn(ratio)
        return ratio

    def _ratio(self, found: dict[str, float]) -> float | None:
        replaced, centred = found["last_replaced"], found["last_centred"]
        # With one slot both sums are the same. NaN: a gradient was not finite.
        if self._n == 1 or found["passes"] == 0 or not np.isfinite(replaced + centred):
            return None
        if centred == 0:
            return None if replaced == 0 else float("inf")
        return replaced / centred

    def _warn(self, ratio: float) -> None:
        wrong_index = (
            "Most often batch_index is not the batch's own number: take it from sampler.enumerate(loader) of a "
            "paddle_asgd.FixedBatchSampler, not from Python's enumerate(loader)"
            if self._index.in_use
            else "Most often slot and batch do not match: a loader with shuffle=True (use "
            "paddle_asgd.FixedBatchSampler and set optimizer.batch_index from its enumerate(loader))"
        )
        warn(
            "ASGD: in two passes in a row the gradients stored for the batches told less about the next ones than the "
            f"mean of all gradients (variance_ratio {ratio:.2g}; towards 0 stored gradients help, near 2 they have "
            "nothing to do with the batch). SAG is then no better than SGD and takes batch_num times the memory. "
            f"{wrong_index}, or batch_num={self._n} is not the number of batches. Else the learning_rate is close to "
            "its limit or above: halve it. Or the gradient of a batch changes between passes by augmentation or "
            "dropout: SGD suits better.",
            SlotMismatchWarning,
        )
