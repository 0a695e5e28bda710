# SPDX-License-Identifier: Apache-2.0
"""What is run, in which order and for how long at most. Must not know what a figure means (report.py)."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.gpu import build

from .. import cases

NATIVE = Path(__file__).resolve().parent / "native"
#: The checks of tests/gpu come with the timings, so that whoever times a kernel knows that it is right.
PROGRAMS = (*build.CHECKS, NATIVE / "measure.cu")
#: For ``torch_side``, which calls it.
LIBRARY = NATIVE / "library.cu"
BILLION = 1 << 30
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Name, dtype and n of what is timed; a name that is a number is one tensor of so many elements.
MEASURED = [
    *(("resnet50", "float32", n) for n in (1, 8, 64, 1024)),
    *(("resnet50", "bfloat16", n) for n in (8, 64)),
    *((model, dtype, 8) for model in ("gpt2", "160x10000", "1000x64") for dtype in ("float32", "bfloat16")),
    # float32 with a narrow history.
    *((model, dtype, 8) for model in ("resnet50", "gpt2") for dtype in ("int16", "int8")),
    # Of a slot that does not begin at 16 bytes.
    *((str((1 << 27) + 1), dtype, 2) for dtype in ("float32", "bfloat16")),
    *((str(BILLION), "float32", n) for n in (2, 8, 24)),
    *((str(BILLION), "bfloat16", n) for n in (2, 8, 32)),
]
BESIDE_TORCH = [
    *(f"{model}/{dtype}/8" for model in ("resnet50", "gpt2") for dtype in ("float32", "bfloat16")),
    *(f"{BILLION}/{dtype}/2" for dtype in ("float32", "bfloat16")),
]
#: To try the programs where no GPU is.
TINY = [("1000x64", "float32", 3), ("160x10000", "bfloat16", 2), ("4100", "int8", 2)]


class Stage(NamedTuple):
    """One command; its lines of JSON are its result."""

    name: str
    command: list[str]
    seconds: int


class Done(NamedTuple):
    """A stage's end. ``code`` is None if its time ran out or it could not be started."""

    name: str
    code: int | None
    seconds: float
    rows: list[dict[str, Any]]
    said: str


def sizes(model: str) -> list[int]:
    """The elements of each tensor."""
    return [math.prod(s) for s in cases.MODELS[model]()] if model in cases.MODELS else [int(model)]


def write_cases(path: Path, chosen: list[tuple[str, str, int]], samples: int) -> None:
    """The input of ``measure``."""
    lines = [" ".join(map(str, (*case, samples, *sizes(case[0])))) for case in chosen]
    path.write_text("\n".join(lines) + "\n")


def of(built: build.Built) -> Iterator[Stage]:
    """All stages: bits first, then times, then what may take long."""
    real = built.kind == "cuda"
    listed = built.folder / "cases.txt"
    write_cases(listed, MEASURED if real else TINY, 15 if real else 3)
    bits = str(built.program("check_bits"))
    torch_side = [sys.executable, "-m", "benchmarks.gpu.torch_side", "--device", "cuda" if real else "cpu"]
    torch_side += ["--samples", "15" if real else "2", "--case", *(BESIDE_TORCH if real else ["1000x64/float32/2"])]
    torch_side += ["--library", str(built.library(LIBRARY.stem))] if real else []
    yield Stage("bits", [bits] if real else [bits, "quick"], 90)
    yield Stage("averages", [str(built.program("check_average"))], 60)
    averaged_sgd = str(built.program("check_average_sgd"))
    yield Stage("averaged_sgd", [averaged_sgd] if real else [averaged_sgd, "quick"], 60)
    yield Stage("graph", [str(built.program("check_graph"))], 60)
    yield Stage("measure", [str(built.program("measure")), str(listed)], 120)
    yield Stage("torch", torch_side, 100)
    yield Stage("large", [str(built.program("check_large")), *([] if real else ["100003"])], 120)
    if not real:
        return
    for tool in SANITIZERS:
        # racecheck alone looks at shared memory; all others at every access.
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
        yield Stage(tool, [*command, bits, "quick", "exact"], 60)
        yield Stage(f"{tool}_averaged_sgd", [*command, averaged_sgd, "quick", "exact"], 60)
    few = built.folder / "few.txt"
    # Not as large as above: ncu runs a kernel several times, and puts back what it has written.
    write_cases(few, [(str(1 << 27), "float32", 2), (str(1 << 27), "bfloat16", 2), ("resnet50", "float32", 8)], 1)
    metrics = "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    metrics += "sm__warps_active.avg.pct_of_peak_sustained_active,sm__inst_issued.avg.pct_of_peak_sustained_active,"
    metrics += "launch__registers_per_thread,launch__occupancy_limit_registers,dram__bytes.sum"
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--metrics", metrics]
    kernels = ["--kernel-name", "regex:step_tensors|step_narrow_tensors|move_bytes", "--launch-count", "80"]
    yield Stage("ncu", [*command, *kernels, str(built.program("measure")), str(few)], 60)


def perform(stage: Stage, log: Path) -> Done:
    """Run a stage to its end, or to that of its time; everything that it says goes to the log."""
    begin = time.monotonic()
    code = None
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        # A session of its own, to be ended with all that it started: a checker's program would hold the pipe open.
        process = subprocess.Popen(stage.command, cwd=build.ROOT, start_new_session=True, **pipes)
    except OSError as error:
        output = str(error).encode()
    else:
        try:
            output, _ = process.communicate(timeout=stage.seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nstopped after {stage.seconds} s".encode()
    text = output.decode(errors="replace")
    with log.open("a") as file:
        file.write(f"\n==== {stage.name}: {' '.join(stage.command)}\n{text}\n")
    return Done(stage.name, code, time.monotonic() - begin, list(_rows(text)), text[-2000:])


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:
                continue  # cut off when the time ran out
        # ========= ERROR SUMMARY: 0 errors; RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
        found = re.match(r"=+ (?:\w+ )?SUMMARY: (\d+) (errors?|hazards?)", line)
        if found:
            yield {"findings": int(found[1])}
