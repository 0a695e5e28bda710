# SPDX-License-Identifier: Apache-2.0
"""benchmarks/cold.py: what comes before which step of a turn. Must not time anything."""

from __future__ import annotations

import pytest

from . import cold


def turns_of(seconds: float, with_cold: bool, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The passes of traffic that each step of the second turn saw before it, if a step takes a second."""
    now, seen = [0], []

    def step() -> None:
        now[0] += 10**9
        seen.append(None if take is None or take.traffic is None else take.traffic[-1])

    monkeypatch.setattr(cold, "TRAFFIC_BYTES", 16)
    monkeypatch.setattr(cold.time, "thread_time_ns", lambda: now[0])
    take = None
    take = cold.Turns(step, seconds, with_cold)
    cold.alternate([take], 1)
    del seen[:]
    assert cold.alternate([take], 1) == [[cold.Turn(1.0, 1.0 if with_cold else None)]]
    return seen


def test_a_turn_ends_with_its_cold_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert turns_of(100.0, True, monkeypatch) == [1.0] * (cold.UNTIMED + cold.WARM) + [2.0]


def test_long_steps_have_short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert turns_of(0.5, True, monkeypatch) == [1.0, 2.0]
    assert turns_of(3.0, False, monkeypatch) == [None] * (2 + 3)
