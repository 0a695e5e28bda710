# SPDX-License-Identifier: Apache-2.0
"""Times functions in turns by the clock on the wall, so that the noise of the machine hits all alike.

Must not know what it times. Steps that one thread takes are timed by that thread's clock, in cold.py.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

#: Calls at the beginning of a turn that are not counted.
UNTIMED = 3


class Effort(NamedTuple):
    """How long to look."""

    #: turns of each function
    rounds: int
    #: at least this long a turn, so that a turn sees cheap and dear steps in their true proportion
    seconds_a_turn: float


def take_turns(functions: Sequence[Callable[[], Any]], effort: Effort) -> list[list[float]]:
    """Seconds a call of every function, one number a round: the mean of its turn."""
    calls = [_calls_a_turn(function, effort.seconds_a_turn) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    gc.collect()
    gc.disable()
    try:
        for _ in range(effort.rounds):
            for function, count, times in zip(functions, calls, samples):
                times.append(_turn(function, count))
    finally:
        gc.enable()
    return samples


def _calls_a_turn(function: Callable[[], Any], seconds: float) -> int:
    return max(1, round(seconds / _turn(function, 2)))


def _turn(function: Callable[[], Any], count: int) -> float:
    # Whoever was before has filled the caches; that is nobody's cost. A call as long as a turn does not notice.
    for _ in range(min(UNTIMED, count - 1)):
        function()
    begin = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - begin) / count
