# SPDX-License-Identifier: Apache-2.0
"""Turns results.json into the tables of README.md: the bars with their figures first. Must run nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..report import duration
from .stages import BILLION, SANITIZERS

Results = dict[str, Any]
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
TORCH_ASGD = "torch.optim.ASGD(foreach, capturable, t0=0)"
#: Calls that a step must not make, as a profiler names them.
FORBIDDEN = ("Malloc", "cudaFree", "Memcpy", "Memset", "Synchronize", "EventQuery", "StreamQuery")


class Bar(NamedTuple):
    """What was promised, and what was found; ``passed`` is None where nothing was measured."""

    promise: str
    found: str
    passed: bool | None


def rows(results: Results, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage, none if it did not run."""
    return [row for done in results["stages"] if done["name"] == stage for row in done["rows"]]


def code(results: Results, stage: str) -> int | None:
    """The exit status of a stage; None if it did not come to its end, or did not run."""
    return next((done["code"] for done in results["stages"] if done["name"] == stage), None)


def figure(results: Results, case: str, dtype: str, n: int, what: str, how: str) -> dict[str, Any] | None:
    """One row of ``measure``."""
    wanted = {"case": case, "dtype": dtype, "n": n, "what": what, "how": how}
    return next((r for r in rows(results, "measure") if all(r.get(k) == v for k, v in wanted.items())), None)


def rate(row: dict[str, Any] | None) -> float | None:
    """GB/s."""
    return None if row is None or "us" not in row else row["bytes"] / row["us"] / 1e3


def copy_rate(results: Results) -> float | None:
    """The best that a large copy reached, read and written bytes together."""
    found = [rate(r) for r in rows(results, "measure") if r.get("what") == "copy" and r["numel"] == BILLION]
    return max(found, default=None)


# ---- Bars -----------------------------------------------------------------------------------------------------------


def bars(results: Results) -> list[Bar]:
    """All of them, in the order of the README."""
    found = [_bits(results), _sanitizers(results)]
    for dtype, least in (("float32", 0.92), ("bfloat16", 0.90)):
        found.append(_bandwidth(results, dtype, least))
    return [*found, _resnet_floor(results), _launches(results), _beside_torch(results), _nothing_else(results)]


def _bits(results: Results) -> Bar:
    names = ("bits", "averages", "averaged_sgd", "graph", "large")
    codes = [done["code"] for done in results["stages"] if done["name"] in names]
    checks = [row for name in names for row in rows(results, name) if "check" in row]
    different = sum(row["different"] for row in checks)
    compared = sum(row["compared"] for row in checks)
    broken = different > 0 or any(code != 0 for code in codes)
    found = f"{len(checks)} checks, {compared:,} comparisons, {different} differ" if checks else "not run"
    # All of them must have run to keep the promise; one is enough to break it.
    passed = False if broken else True if len(codes) == len(names) else None
    return Bar("equal bits on CPU and GPU in all cases", found, passed)


def _sanitizers(results: Results) -> Bar:
    found, passed = [], []
    names = [name for tool in SANITIZERS for name in (tool, f"{tool}_averaged_sgd")]
    for name in names:
        findings = [row["findings"] for row in rows(results, name) if "findings" in row]
        found.append(f"{name} {sum(findings) if findings else 'did not finish'}")
        passed.append(bool(findings) and sum(findings) == 0 and code(results, name) == 0)
    ran = any(rows(results, name) for name in names)
    return Bar("no finding of compute-sanitizer", ", ".join(found), all(passed) if ran else None)


def _bandwidth(results: Results, dtype: str, least: float) -> Bar:
    title = "float32" if dtype == "float32" else "bfloat16 with master weights"
    promise = f"{BILLION:,} elements of {title}: at least {least:.2f} of a copy's bandwidth"
    copy = copy_rate(results)
    steps = [r for r in rows(results, "measure") if (r.get("case"), r.get("dtype")) == (str(BILLION), dtype)]
    rates = {r["n"]: rate(r) for r in steps if r.get("what") == "step" and r.get("how") == "warm"}
    if copy is None or not rates:
        return Bar(promise, "not measured", None)
    words = ", ".join(f"n={n}: {value:.0f} GB/s ({value / copy:.3f})" for n, value in rates.items())
    return Bar(promise, f"{words}; copy {copy:.0f} GB/s", min(rates.values()) >= least * copy)


def _resnet_floor(results: Results) -> Bar:
    promise = "ResNet-50's list in float32, n=8: at least 0.70 of the floor of its bytes at a copy's bandwidth"
    copy, step = copy_rate(results), figure(results, "resnet50", "float32", 8, "step", "flushed")
    if copy is None or step is None:
        return Bar(promise, "not measured", None)
    floor = step["bytes"] / copy / 1e3
    return Bar(
        promise, f"{step['us']:.0f} us, floor {floor:.0f} us ({floor / step['us']:.2f})", floor / step["us"] >= 0.7
    )


def _launches(results: Results) -> Bar:
    counts = [row for row in rows(results, "graph") if row.get("check") == "launches of a step"]
    if not counts or results["kind"] != "cuda":
        return Bar("ResNet-50's list: at most 3 launches", "not counted", None)
    table = {(tensors, watch): n for tensors, watch, n, _ in counts[0]["tensors, watch, kernels, other nodes"]}
    found = f"{table[161, False]}, with the watch {table[161, True]}; 1,000 tensors: {table[1000, False]}"
    return Bar("ResNet-50's list: at most 3 launches", found, table[161, True] <= 3)


def _beside_torch(results: Results) -> Bar:
    promise = f"ResNet-50's list in float32: at least 3 times as quick as {TORCH_ASGD}"
    ratios = {}
    for how, ours_how, what in (("eager", "warm", "step"), ("graph", "warm", "step in a graph")):
        ours = figure(results, "resnet50", "float32", 8, what, ours_how)
        theirs = [
            row["us"]
            for row in rows(results, "torch")
            if (row.get("case"), row.get("dtype"), row.get("what"), row.get("how"))
            == ("resnet50", "float32", TORCH_ASGD, how)
            and "us" in row
        ]
        if ours and theirs:
            ratios[how] = theirs[0] / ours["us"]
    if not ratios:
        return Bar(promise, "not measured", None)
    return Bar(promise, ", ".join(f"{how} {r:.1f} x" for how, r in ratios.items()), min(ratios.values()) >= 3)


def _nothing_else(results: Results) -> Bar:
    promise = "no copy, no wait, no allocation in a step"
    profiles = [row for row in rows(results, "torch") if "profile" in row]
    symbols = [s for s in results.get("symbols", []) if any(word in s for word in FORBIDDEN)]
    if not profiles:
        known = "by the object file's symbols it cannot" if results.get("symbols") and not symbols else "not profiled"
        return Bar(promise, known, None)
    odd: dict[str, int] = {}
    for row in profiles:
        for name, count in row["events"].items():
            # Fewer than steps: the profiler's own.
            if any(word in name for word in FORBIDDEN) and count >= row["steps"]:
                odd[name] = count
    allocated = sum(row["allocated"] for row in profiles)
    seen = {name for row in profiles for name in row["events"] if "step_tensors" in name or "advance" in name}
    found = f"forbidden calls: {odd or 'none'}; the object file can call {symbols or 'none'}; kernels seen: {len(seen)}"
    return Bar(promise, found, not odd and not symbols and allocated == 0 and bool(seen))


# ---- Tables ---------------------------------------------------------------------------------------------------------


def table(head: list[str], body: list[list[str]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def markdown(results: Results) -> str:
    """Everything that the README shows of a run."""
    words = {True: "yes", False: "**NO**", None: "not measured"}
    parts = [table(["promise", "found", "kept"], [[b.promise, b.found, words[b.passed]] for b in bars(results)])]
    if results["kind"] != "cuda":
        parts.insert(0, "**These figures are of the host, not of a GPU.**")
    for title, made in (
        ("Steps", _steps(results)),
        ("Beside torch", _torch(results)),
        ("Kernels", kernels(results.get("kernels", []))),
    ):
        if made:
            parts.append(f"### {title}\n\n{made}")
    known = {k: v for k, v in results["machine"].items() if k != "gpu" and v}
    parts.append("; ".join(f"{k}: {v}" for k, v in {**results["machine"]["gpu"], **known}.items()))
    return "\n\n".join(parts)


def _steps(results: Results) -> str:
    order = ("step", "step with watch", "step in a graph", "floor", "copy", "norm")
    found = rows(results, "measure")
    keys = dict.fromkeys((r["case"], r["dtype"], r["n"]) for r in found if "us" in r)
    body = []
    for case, dtype, n in keys:
        for what in order:
            warm, flushed, host = (figure(results, case, dtype, n, what, how) for how in ("warm", "flushed", "host"))
            if warm is None or flushed is None or host is None:
                continue
            times = [duration(r["us"] / 1e6) for r in (warm, flushed, host)]
            body.append([f"{case}, {dtype}, n={n}", what, *times[:2], f"{rate(flushed):.0f}", times[2]])
    return "" if not body else table(["case", "what", "warm", "flushed", "GB/s, flushed", "host's time"], body)


def _torch(results: Results) -> str:
    body = []
    for row in rows(results, "torch"):
        if "what" in row:
            time = duration(row["us"] / 1e6) if "us" in row else row["error"][:60]
            body.append([f"{row['case']}, {row['dtype']}, n={row['n']}", row["what"], row["how"], time])
    return "" if not body else table(["case", "who", "how", "a step"], body)


def kernels(found: list[dict[str, Any]]) -> str:
    """Registers and what follows from them, from facts.kernels()."""
    body = [
        [k["kernel"], str(k["registers"]), str(k["spilled"]), str(k["blocks"]), f"{100 * k['occupancy']:.0f} %"]
        for k in found
    ]
    return table(["kernel", "registers", "spilled bytes", "blocks", "occupancy"], body) if body else ""


def put_into(path: Path, made: str) -> None:
    """Replace what stands between the marks."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")
