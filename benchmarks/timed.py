# SPDX-License-Identifier: Apache-2.0
"""From cases to figures: the rows of a report. Must not print or draw them (report.py)."""

from __future__ import annotations

import statistics
from typing import Any

import paddle

from paddle_asgd import native

from . import cases, cold, contestants, machine, measure, static
from .contestants import BUILTIN, FLOOR, OURS


def time_case(case: cases.Case, effort: measure.Effort) -> dict[str, Any]:
    """One step of every contestant who fits into half of the machine's memory together with the others."""
    chosen, out = contestants.fitting(case, machine.memory_bytes() // 2)
    with contestants.admit(case, chosen, effort.seconds_a_turn) as admitted:
        # What fits into no cache is timed in fewer rounds: it varies less, and takes longer.
        rounds = effort.rounds if case.cold else (effort.rounds + 1) // 2
        taken = cold.alternate([contestant.turn for contestant in admitted], rounds)
    rows = []
    for c, turns in zip(admitted, taken):
        moved = case.bytes_a_step(c.history) if c.name in (OURS, BUILTIN, FLOOR) else None
        row = {**_row(c.name, c.batches, [turn.warm for turn in turns], moved), "history": c.history}
        if case.cold:
            row["cold"] = _figures([turn.cold for turn in turns])
        rows.append(row)
    compare(rows)
    left_out = [
        {"contestant": e.name, "batches": e.batches, "history": e.history, "bytes": e.bytes_an_element * case.numel}
        for e in out
    ]
    return {
        "model": case.model,
        "dtype": case.dtype,
        "tensors": len(case.shapes()),
        "numel": case.numel,
        "rows": rows,
        "left_out": left_out,
    }


def time_calls(effort: measure.Effort) -> list[dict[str, Any]]:
    """What does not depend on a model's size: an empty native call, and what an optimizer adds to an executor's run."""

    def empty() -> None:
        native.asgd_update([], [], [], [], [], None, 0.1, 0.0)

    paddle.disable_static()
    (samples,) = measure.take_turns([empty], effort)
    rows = [_row(r.name, r.batches, r.samples, None) for r in static.rows(effort)]
    compare(rows)
    return [_row("native call of no tensors", None, samples, None), *rows]


def compare(rows: list[dict[str, Any]]) -> None:
    """Say of each row how many times as long as ours it takes: ours of as many batches, else the reference's.

    Ours is the one whose history is exact; narrow ones are compared with it like the others.
    """
    ours = {row["batches"]: row for row in rows if row["contestant"] == OURS and not row.get("history")}
    default = ours.get(cases.REFERENCE_BATCHES, next(iter(ours.values())))
    for row in rows:
        other = ours.get(row["batches"], default)
        row["times_ours"] = row["seconds"] / other["seconds"]
        if "cold" in row:
            row["cold"]["times_ours"] = row["cold"]["seconds"] / other["cold"]["seconds"]


def _row(name: str, batches: int | None, samples: list[float], moved: int | None) -> dict[str, Any]:
    figures = _figures(samples)
    speed = None if moved is None else moved / figures["seconds"] / 1e9
    return {"contestant": name, "batches": batches, **figures, "gb_per_second": speed}


def _figures(samples: list[float]) -> dict[str, Any]:
    """Median and 10th percentile of a row; what other programs did to the caches shows in their distance."""
    low = statistics.quantiles(samples, n=10, method="inclusive")[0]
    return {"seconds": statistics.median(samples), "low": low}
