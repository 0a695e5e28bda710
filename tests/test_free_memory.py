# SPDX-License-Identifier: Apache-2.0
"""How much memory there is to take, by machine and by control group, from folders made to look like Linux's."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddle_asgd.free_memory import free_memory

UNLIMITED = 2**63 - 4096  # as version 1 has it

MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\nSwapFree: 1000 kB\nHugePages_Total: 0\n"}
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
V1_LINES = {"proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n"}
V2_LINE = {"proc/self/cgroup": "0::/a/b\n"}
FULL = 5000 * 1024


def v1(folder: str, limit: int, usage: int, cache: int = 0, **more: int) -> dict:
    files = {"limit_in_bytes": limit, "usage_in_bytes": usage, **more}
    statistics = f"total_inactive_file {cache}\ntotal_active_file 0\ninactive_file 7\n"
    return {f"{V1}{folder}/memory.stat": statistics} | {f"{V1}{folder}/memory.{k}": v for k, v in files.items()}


def v2(folder: str, limit: object, usage: int, cache: int = 0, **swap: object) -> dict:
    files = {"max": limit, "current": usage, **{f"swap.{k}": v for k, v in swap.items()}}
    statistics = f"anon 5\ninactive_file {cache}\nactive_file {cache}\n"
    return {f"{V2}{folder}/memory.stat": statistics} | {f"{V2}{folder}/memory.{k}": v for k, v in files.items()}


CASES = {
    "no control group": ({}, FULL),
    "v2, no limit": ({**V2_LINE, **v2("/a/b", "max", 10)}, FULL),
    "v2": ({**V2_LINE, **v2("/a/b", 500_000, 100_000, max=0, current=0)}, 400_000),
    "v2, cached files can be dropped": ({**V2_LINE, **v2("/a/b", 500_000, 100_000, 20_000, max=0)}, 440_000),
    "v2, a parent's limit": ({**V2_LINE, **v2("/a", 300_000, 100_000, max=0), **v2("/a/b", "max", 9)}, 200_000),
    "v2, swap of its own": ({**V2_LINE, **v2("/a/b", 500_000, 100_000, max=70_000, current=10_000)}, 460_000),
    "v2, the machine's swap": ({**V2_LINE, **v2("/a/b", 500_000, 100_000, max="max", current=1)}, 400_000 + 1_024_000),
    "v2, nothing left": ({**V2_LINE, **v2("/a/b", 100_000, 200_000, max=0)}, 0),
    "v2, only the mount is there": ({**V2_LINE, **v2("", 500_000, 100_000, max=0)}, 400_000),
    "v2, no files": (V2_LINE, FULL),
    "v1, no limit": ({**V1_LINES, **v1("/a/b", UNLIMITED, 10)}, FULL),
    "v1": ({**V1_LINES, **v1("/a/b", 500_000, 100_000)}, 400_000 + 1_024_000),
    "v1, memory and swap": (
        {**V1_LINES, **v1("/a/b", 500_000, 100_000, 5, **{"memsw.limit_in_bytes": 600_000, "memsw.usage_in_bytes": 1})},
        600_004,
    ),
    "v1, a parent's limit": ({**V1_LINES, **v1("", 900_000, 0), **v1("/a", 300_000, 100_000)}, 200_000 + 1_024_000),
    "garbage": ({"proc/self/cgroup": "x\n::\n4:memory:/../a\n", f"{V1}/a/memory.limit_in_bytes": "?"}, FULL),
}


def tree(root: Path, files: dict) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


@pytest.mark.parametrize("case", CASES)
def test_the_smaller_of_machine_and_control_group(case: str, tmp_path: Path) -> None:
    files, expected = CASES[case]
    assert free_memory(tree(tmp_path, {**MACHINE, **files})) == expected


def test_a_machine_that_does_not_say(tmp_path: Path) -> None:
    assert free_memory(tmp_path) > 2**20
    assert free_memory(tree(tmp_path, {"proc/meminfo": "MemTotal: 5 kB"})) > 2**20
