# SPDX-License-Identifier: Apache-2.0
"""Draws a report: one panel a model, time on a logarithmic scale. Must not compute figures (timed.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .cases import REFERENCE_BATCHES, TITLES
from .report import Report, duration, label

COLOURS = {"paddle_asgd": "#c0392b", "bytes only": "#7f8c8d", "paddle": "#2c5f8a", "torch": "#d68910"}
SHORT = {"float32": "", "bfloat16": " bf16", "float16": " fp16"}


def draw(report: Report, path: Path) -> None:
    """One panel a model, and one of the executor; the format follows the file's name."""
    models = list(dict.fromkeys(case["model"] for case in report["cases"]))
    panels = [(TITLES[model], _bars(report, model)) for model in models]
    # All but the call of no tensors, beside which the others would shrink to one point.
    calls = [(_name(row), row) for row in report["calls"] if "times_ours" in row and row["seconds"] > 0]
    if calls:
        panels.append(("Added to a run of a static graph, 160 tensors of 10,000", sorted(calls, key=_seconds)[::-1]))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(len(bars) for _, bars in panels)
    figure, axes = plt.subplots(rows, columns, figsize=(6.4 * columns, (0.24 * tallest + 0.9) * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, bars) in zip(axes.flat, panels):
        _panel(axis, title, bars)
    machine = report["machine"]
    figure.suptitle("One optimizer step, median; the line spans the quartiles", fontsize=12, fontweight="bold")
    figure.text(
        0.5, 0.004, f"{machine['processor']}; {machine['versions']}; {machine['threads']}", ha="center", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.015, 1, 0.99))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(report: Report, model: str) -> list[tuple[str, dict[str, Any]]]:
    """From bottom to top: the slowest first, all of a dtype together."""
    bars = []
    for case in [case for case in report["cases"] if case["model"] == model][::-1]:
        rows = case["rows"]
        if case["dtype"] != "float32":
            rows = [row for row in rows if row["batches"] == REFERENCE_BATCHES]
        bars += sorted([(_name(row) + SHORT[case["dtype"]], row) for row in rows], key=_seconds)[::-1]
    return bars


def _name(row: dict[str, Any]) -> str:
    return label(row).replace("paddle.optimizer", "paddle").replace("torch.optim", "torch")


def _seconds(bar: tuple[str, dict[str, Any]]) -> float:
    return bar[1]["seconds"]


def _panel(axis: Axes, title: str, bars: list[tuple[str, dict[str, Any]]]) -> None:
    for place, (_, row) in enumerate(bars):
        colour = next(c for prefix, c in COLOURS.items() if row["contestant"].startswith(prefix))
        milliseconds = row["seconds"] * 1e3
        low, high = (quartile * 1e3 for quartile in row["quartiles"])
        axis.plot([low, high], [place, place], color=colour, linewidth=5, alpha=0.35)
        axis.plot(milliseconds, place, "o", color=colour, markersize=5)
        beside = (max(high, milliseconds), place)
        axis.annotate(duration(row["seconds"]), beside, (7, -3), textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    times = [row["seconds"] * 1e3 for _, row in bars]
    axis.set_xlim(min(times) / 1.6, max(times) * 2.6)
    axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    for tick, (_, row) in zip(axis.get_yticklabels(), bars):
        if row["contestant"].startswith("paddle_asgd"):
            tick.set_fontweight("bold")
    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("milliseconds", fontsize=8)
    axis.grid(axis="x", which="major", alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
