# SPDX-License-Identifier: Apache-2.0
"""The harness of the benchmarks on a GPU, tried without one: its cases, its report, and the probes through Paddle.

Must not test the checks of tests/gpu (tests/test_gpu_harness.py). Says nothing about a GPU: on the host the kernels'
threads run one after the other.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import build

from . import facts, report, slim_paddle, stages

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> build.Built:
    return build.for_host(tmp_path_factory.mktemp("gpu_on_host"), [stages.NATIVE / "measure.cu"], [stages.LIBRARY])


def rows_of(*command: str | Path) -> tuple[int, list[dict]]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_every_figure_of_a_case_is_printed(built: build.Built, tmp_path: Path) -> None:
    chosen = [("37", "float32", 3), ("4100", "bfloat16", 2)]
    stages.write_cases(tmp_path / "cases.txt", chosen, 3)
    code, rows = rows_of(built.program("measure"), tmp_path / "cases.txt")
    assert code == 0
    assert [(row["case"], row["dtype"], row["n"]) for row in rows[::18]] == chosen
    results = {"kind": "host", "stages": [{"name": "measure", "code": 0, "rows": rows}]}
    step = report.figure(results, "4100", "bfloat16", 2, "step", "warm")
    assert step is not None
    assert step["bytes"] == 24 * 4100


# ---- The report ------------------------------------------------------------------------------------------------------


def figures(us: float) -> list[dict]:
    """As ``measure`` prints them on a GPU that copies 4,000 GB/s."""
    billion, found = str(stages.BILLION), []
    for case, numel, dtype, moved in (
        (billion, stages.BILLION, "float32", 28),
        (billion, stages.BILLION, "bfloat16", 24),
    ):
        row = {"case": case, "dtype": dtype, "n": 2, "numel": numel, "bytes": moved * numel}
        at_4000 = moved * numel / 4e6
        found.append({**row, "what": "copy", "how": "warm", "us": at_4000})
        found.append({**row, "what": "step", "how": "warm", "us": at_4000 * us})
    resnet = {"case": "resnet50", "dtype": "float32", "n": 8, "numel": 25_557_032, "bytes": 28 * 25_557_032}
    found.append({**resnet, "what": "step", "how": "flushed", "us": 178.9 * us})
    return [*found, {**resnet, "what": "step", "how": "warm", "us": 178.9 * us}]


def results_of(
    us: float = 1.05,
    different: int = 0,
    finding: int = 0,
    other_finding: int = 0,
    watch_launches: int = 3,
    event: str = "",
) -> dict:
    check = {"check": "types and modes", "compared": 10, "different": different}
    launches = {"check": "launches of a step", "compared": 1, "different": 0}
    launches["tensors, watch, kernels, other nodes"] = [
        [161, False, 2, 0],
        [161, True, watch_launches, 0],
        [1000, False, 6, 0],
    ]
    asgd = {"case": "resnet50", "dtype": "float32", "n": 8, "what": report.TORCH_ASGD, "how": "eager", "us": 700.0}
    events = {"void paddle_asgd::step_tensors": 10, "cudaDeviceSynchronize": 1, **({event: 10} if event else {})}
    profile = {"profile": "resnet50", "steps": 10, "allocated": 0, "events": events}
    done = {
        "bits": [check],
        "averages": [check],
        "averaged_sgd": [check],
        "graph": [launches],
        "large": [check],
        "measure": figures(us),
        "torch": [asgd, profile],
        **{tool: [{"findings": finding}] for tool in stages.SANITIZERS},
        **{f"{tool}_averaged_sgd": [{"findings": other_finding}] for tool in stages.SANITIZERS},
    }
    ended = [{"name": name, "code": 0, "rows": rows} for name, rows in done.items()]
    return {"kind": "cuda", "machine": {"gpu": {}}, "symbols": ["cudaLaunchKernel"], "stages": ended}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"different": 1}, [0]),
        ({"finding": 1}, [1]),
        ({"other_finding": 1}, [1]),
        ({"us": 1.1}, [2]),  # 0.909 of the bandwidth
        ({"us": 1.5}, [2, 3, 4, 6]),
        ({"watch_launches": 4}, [5]),
        ({"event": "cudaMemcpyAsync"}, [7]),
    ],
    ids=["all kept", "bits", "sanitizer", "sanitizer of averaged SGD", "slower", "slow", "launches", "copy"],
)
def test_each_bar_says_what_is_broken(change: dict, broken: list[int]) -> None:
    found = report.bars(results_of(**change))
    assert [i for i, bar in enumerate(found) if not bar.passed] == broken, found


def test_what_did_not_run_is_neither_kept_nor_broken() -> None:
    results = {"kind": "cuda", "machine": {"gpu": {}}, "stages": []}
    assert [bar.passed for bar in report.bars(results)] == [None] * 8
    assert report.markdown(results).count("not measured") >= 8


def test_tables_replace_what_stands_between_the_marks(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.put_into(path, report.markdown(results_of()))
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| yes |") == 8


def test_lines_of_a_sanitizer_are_counted(tmp_path: Path) -> None:
    said = (
        "========= ERROR SUMMARY: 2 errors\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    )
    stage = stages.Stage("memcheck", ["printf", "%s", said], 10)
    assert stages.perform(stage, tmp_path / "log.txt").rows == [{"findings": 2}, {"findings": 0}]
    slow = stages.perform(stages.Stage("bits", ["sleep", "5"], 1), tmp_path / "log.txt")
    assert (slow.code, slow.rows) == (None, [])


def test_occupancy_of_hopper() -> None:
    """From CUDA's table for compute capability 9.0: 65,536 registers, 64 warps."""
    assert [facts.occupancy(r)["blocks"] for r in (32, 48, 62, 64, 73, 80, 81)] == [8, 5, 4, 4, 3, 3, 2]


# ---- Through Paddle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["copies", "updates", "optimizer_with_copied_zeros"])
def test_probe_of_paddle_on_the_cpu_place(probe: str) -> None:
    script = HERE / "through_paddle.py"
    code, rows = rows_of(sys.executable, script, "--place", "cpu", "--probe", probe)
    assert code == 0
    assert rows[-1]["passed"], rows


def test_only_fat_binaries_are_blanked(tmp_path: Path) -> None:
    """One of 24 bytes, what only looks like one at the end, and everything around them."""
    fat = slim_paddle.MAGIC + struct.pack("<HHQ", 1, 16, 24)
    library = tmp_path / "library.so"
    library.write_bytes(
        b"code" + fat + b"x" * 24 + b"more" + slim_paddle.MAGIC + struct.pack("<HHQ", 1, 16, 99) + b"end"
    )
    assert slim_paddle.blank(library) == 24
    blanked = slim_paddle.MAGIC + struct.pack("<HHQ", 1, 16, 0) + bytes(24)
    assert (
        library.read_bytes()
        == b"code" + blanked + b"more" + slim_paddle.MAGIC + struct.pack("<HHQ", 1, 16, 99) + b"end"
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("name", ["measure.cu", "library.cu"])
def test_nvcc_takes_the_programs_without_a_warning(name: str, tmp_path: Path) -> None:
    source = stages.NATIVE / name
    flags = [*build.list_of_setup("NVCC_FLAGS"), "-arch=sm_90", "-Werror", "all-warnings"]
    build.run("nvcc", *flags, *build.includes([source]), "-c", source, "-o", tmp_path / "program.o")
