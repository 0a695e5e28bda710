# SPDX-License-Identifier: Apache-2.0
"""From cases to figures: the rows of a report. Must not print or draw them (report.py)."""

from __future__ import annotations

from typing import Any

import paddle

from paddle_asgd import native

from . import cases, contestants, machine, measure, static
from .contestants import BUILTIN, FLOOR, OURS


def time_case(case: cases.Case, effort: measure.Effort) -> dict[str, Any]:
    """One step of every contestant who fits into half of the machine's memory together with the others."""
    chosen, out = contestants.fitting(case, machine.memory_bytes() // 2)
    steps = contestants.admit(case, chosen)
    samples = measure.take_turns([contestant.step for contestant in steps], effort)
    moved = case.numel * cases.BYTES_A_STEP[case.dtype]
    rows = [
        _row(c.name, c.batches, measure.summary(s), moved if c.name in (OURS, BUILTIN, FLOOR) else None)
        for c, s in zip(steps, samples)
    ]
    compare(rows)
    left_out = [{"contestant": e.name, "batches": e.batches, "bytes": e.bytes_an_element * case.numel} for e in out]
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
    rows = [_row(r.name, r.batches, r.timing, None) for r in static.rows(effort)]
    compare(rows)
    return [_row("native call of no tensors", None, measure.summary(samples), None), *rows]


def compare(rows: list[dict[str, Any]]) -> None:
    """Say of each row how many times as long as ours it takes: ours of as many batches, else the reference's."""
    ours = {row["batches"]: row["seconds"] for row in rows if row["contestant"] == OURS}
    default = ours.get(cases.REFERENCE_BATCHES, next(iter(ours.values())))
    for row in rows:
        row["times_ours"] = row["seconds"] / ours.get(row["batches"], default)


def _row(name: str, batches: int | None, timing: measure.Timing, moved: int | None) -> dict[str, Any]:
    return {
        "contestant": name,
        "batches": batches,
        "seconds": timing.median,
        "quartiles": list(timing.quartiles),
        "gb_per_second": None if moved is None else moved / timing.median / 1e9,
    }
