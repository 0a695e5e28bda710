# SPDX-License-Identifier: Apache-2.0
"""Turns of one contestant: steps with warm caches, and then one with cold caches, as a training loop takes it.

Must not import Paddle or PyTorch, for each of them has contestants in a process of its own, and must not know what a
step is.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

import numpy as np

#: What is read and written before a cold step, as the forward and backward pass of a model do.
TRAFFIC_BYTES = 64_000_000
#: Steps at the beginning that do not count: with 1,000 small tensors the third is as quick as all later ones.
UNTIMED = 3
#: Steps that count as warm, at most. Together with the others they are no multiple of a history's length, so that a
#: turn does not always meet the same slots.
WARM = 5


class Turn(NamedTuple):
    """Seconds a step; ``cold`` is None where it was not measured."""

    warm: float
    cold: float | None


class Turns:
    """Takes turns with one step.

    Times are of the processor, and of this thread alone: what other programs do in the meantime does not count.

    Args:
        step: takes one step.
        seconds: a turn may take about this long, and then has fewer steps; but at least one warm step.
        cold: whether a turn ends with a cold step.
    """

    def __init__(self, step: Callable[[], Any], seconds: float, cold: bool) -> None:
        self.step = step
        self.warm_steps = min(WARM, max(1, round(seconds / self._timed(2))))
        self.traffic = np.zeros(TRAFFIC_BYTES // 8) if cold else None

    def __call__(self) -> Turn:
        # The one before has filled the caches with its own.
        for _ in range(min(UNTIMED, self.warm_steps - 1)):
            self.step()
        warm = self._timed(self.warm_steps)
        if self.traffic is None:
            return Turn(warm, None)
        # It comes behind steps of its own, as in training: nothing but the traffic has driven it out of the caches.
        self.traffic += 1.0
        return Turn(warm, self._timed(1))

    def _timed(self, count: int) -> float:
        begin = time.thread_time_ns()
        for _ in range(count):
            self.step()
        return (time.thread_time_ns() - begin) / count / 1e9


def alternate(contestants: Sequence[Callable[[], Turn]], rounds: int) -> list[list[Turn]]:
    """Let all take their turns, in every round; what each of them measured, in the order of the rounds."""
    taken: list[list[Turn]] = [[] for _ in contestants]
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for take, turns in zip(contestants, taken):
                turns.append(take())
    finally:
        gc.enable()
    return taken
