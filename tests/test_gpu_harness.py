# SPDX-License-Identifier: Apache-2.0
"""The programs of tests/gpu, tried without a GPU: they compare, they see a wrong bit, and nvcc takes them.

Says nothing about a GPU: on the host the kernels' threads run one after the other.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from gpu import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> build.Built:
    return build.for_host(tmp_path_factory.mktemp("gpu_on_host"), build.CHECKS)


def rows_of(program: Path, *arguments: str) -> tuple[int, list[dict]]:
    """Run a program; return its exit status and its lines of JSON."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_all_checks_compare_and_agree(built: build.Built) -> None:
    code, rows = rows_of(built.program("check_bits"), "quick", "exact")
    assert code == 0, rows
    assert len(rows) == 6
    assert all(row["compared"] > 100 and row["different"] == 0 for row in rows)


def test_one_wrong_bit_is_seen_in_every_check_that_takes_steps(built: build.Built) -> None:
    code, rows = rows_of(built.program("check_bits"), "quick", "flip")
    assert code == 1
    assert [row["different"] > 0 for row in rows] == [row["check"] != "special numbers" for row in rows]
    assert "d from byte 0" in rows[0]["first"][0]


def test_replays_and_a_large_tensor(built: build.Built) -> None:
    code, rows = rows_of(built.program("check_graph"))
    assert code == 0, rows
    assert all(other == 0 for *_, other in rows[1]["tensors, watch, kernels, other nodes"])
    code, rows = rows_of(built.program("check_large"), "100003")
    assert code == 0, rows
    assert [(row["different"], row["compared"]) for row in rows] == [(0, 12), (0, 12)]


def test_averages(built: build.Built) -> None:
    code, rows = rows_of(built.program("check_average"))
    assert code == 0, rows
    assert [row["check"] for row in rows] == ["averages", "rounded averages", "copies and exchanges"]
    assert all(row["compared"] > 50 and row["different"] == 0 for row in rows)
    code, rows = rows_of(built.program("check_average"), "flip")
    assert code == 1
    assert all(row["different"] > 0 for row in rows)


def test_averaged_sgd(built: build.Built) -> None:
    code, rows = rows_of(built.program("check_average_sgd"), "quick", "exact")
    assert code == 0, rows
    assert [row["check"].partition(" of ")[0] for row in rows] == [
        "types and modes",
        "sizes and offsets",
        "2,603 tensors",
        "special numbers",
    ]
    assert all(row["compared"] > 1000 and row["different"] == 0 for row in rows)
    code, rows = rows_of(built.program("check_average_sgd"), "quick", "flip")
    assert code == 1
    assert all(row["different"] > 0 for row in rows)
    assert "param from byte 0" in rows[0]["first"][0]
    assert "step from byte 0" in rows[3]["first"][0]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("program", build.CHECKS, ids=lambda path: path.stem)
def test_nvcc_takes_the_checks_without_a_warning(program: Path, tmp_path: Path) -> None:
    flags = [*build.list_of_setup("NVCC_FLAGS"), "-arch=sm_90", "-Werror", "all-warnings"]
    build.run("nvcc", *flags, *build.includes(), "-c", program, "-o", tmp_path / "check.o")
