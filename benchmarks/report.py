# SPDX-License-Identifier: Apache-2.0
"""Tables and files of what was timed. Must not time anything, and must not import Paddle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

from .cases import REFERENCE_BATCHES, TITLES

Report = dict[str, Any]

MASTERS = {"float32": "float32", "bfloat16": "bfloat16, master weights", "float16": "float16, master weights"}
CALLS_TITLE = "Calls: 160 tensors of 10,000; what an optimizer adds to one run of a static graph"


def read(path: Path) -> Report:
    """What ``write`` wrote."""
    return json.loads(path.read_text())


def write(report: Report, path: Path) -> None:
    """All figures, as JSON."""
    path.write_text(json.dumps(report, indent=1) + "\n")


def label(row: dict[str, Any]) -> str:
    """A contestant, with the length of its history where it has one, and with its dtype where that is narrow."""
    name = row["contestant"] if row["batches"] is None else f"{row['contestant']} n={row['batches']}"
    return f"{name} {row['history']}" if row.get("history") else name


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    value, unit = (seconds * 1e6, "us") if seconds < 999.5e-6 else (seconds * 1e3, "ms")
    return (f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}") + f" {unit}"


def head(facts: dict[str, str]) -> str:
    """The machine, one fact a line."""
    return "\n".join(f"{name:12} {value}" for name, value in facts.items())


def text(report: Report) -> str:
    """Everything, as it is printed while it is timed."""
    parts = [head(report["machine"]), *map(case_table, report["cases"])]
    return "\n".join([*parts, calls_table(report["calls"])] if report["calls"] else parts)


def case_table(case: dict[str, Any]) -> str:
    """All contestants of one case."""
    lines = [_table(f"{TITLES[case['model']]}; {MASTERS[case['dtype']]}", case["rows"])]
    for out in case["left_out"]:
        lines.append(f"  left out: {label(out)}, which takes {out['bytes'] / 2**30:.1f} GiB")
    return "\n".join(lines)


def calls_table(rows: list[dict[str, Any]]) -> str:
    """The empty call and the executor."""
    return _table(CALLS_TITLE, rows)


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    warm = f"  {'':34}{'median':>9} {'lowest 10 %':>12} {'GB/s':>6} {'x ours':>7}"
    cold = f"   {'cold':>9} {'lowest 10 %':>12} {'x ours':>7}" if any("cold" in row for row in rows) else ""
    lines = [f"\n{title}", warm + cold]
    for row in rows:
        speed = "" if row["gb_per_second"] is None else f"{row['gb_per_second']:.1f}"
        line = f"  {label(row):34}{duration(row['seconds']):>9} {duration(row['low']):>12} {speed:>6} {_times(row):>7}"
        if "cold" in row:
            cold = row["cold"]
            line += f"   {duration(cold['seconds']):>9} {duration(cold['low']):>12} {_times(cold):>7}"
        lines.append(line)
    return "\n".join(lines)


def _times(figures: dict[str, Any]) -> str:
    return f"{figures['times_ours']:.2f}" if "times_ours" in figures else ""


# ---- Markdown -------------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """Tables with a column for each model, one of the calls, and the machine. 16-bit rows for one length only."""
    parts = [_matrix("warm caches", report["cases"], lambda row: row)] if report["cases"] else []
    cold = [case for case in report["cases"] if "cold" in case["rows"][0]]
    if cold:
        parts.append(_matrix("cold caches", cold, lambda row: row["cold"]))
    if report["calls"]:
        lines = [f"| {CALLS_TITLE} | time |", "|---|---|"]
        parts.append("\n".join(lines + [f"| {label(row)} | {_cell(row)} |" for row in report["calls"]]))
    parts.append("; ".join(f"{name}: {value}" for name, value in report["machine"].items()))
    return "\n\n".join(parts)


def _matrix(title: str, cases: list[dict[str, Any]], figures: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    columns: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        column = columns.setdefault(TITLES[case["model"]], {})
        wide = case["dtype"] == "float32"
        for row in case["rows"]:
            if wide or row["batches"] == REFERENCE_BATCHES:
                column[label(row) if wide else f"{label(row)}, {case['dtype']}"] = figures(row)
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        cells = [_cell(column[name]) if name in column else "" for column in columns.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _cell(figures: dict[str, Any]) -> str:
    times = figures.get("times_ours", 1.0)
    return duration(figures["seconds"]) + ("" if times == 1.0 else f" ({times:.2f} x)")
