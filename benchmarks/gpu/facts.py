# SPDX-License-Identifier: Apache-2.0
"""What is known of the GPU and the kernel without timing: the machine, registers, occupancy. Changes no setting."""

from __future__ import annotations

import math
import platform
import re
import subprocess
from typing import Any

#: The query changes nothing: clocks are measured as they are.
QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,"
    "power.limit,ecc.mode.current"
)
#: Of a multiprocessor of compute capability 9.0.
REGISTERS, WARPS, BLOCKS, REGISTERS_A_WARP = 65536, 64, 32, 256
MULTIPROCESSORS = 132
THREADS = 256


def said(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu() -> dict[str, str]:
    """The driver's words, empty without a GPU."""
    line = said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    return {} if not line else dict(zip(QUERY.split(","), (word.strip() for word in line.splitlines()[0].split(","))))


def machine() -> dict[str, Any]:
    """For the head of a report; never the name of a host."""
    nvcc = said("nvcc", "--version")
    return {
        "gpu": gpu(),
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "g++": (said("g++", "--version") or "").split("\n")[0],
        "python": platform.python_version(),
    }


def kernels(resource_usage: str) -> list[dict[str, Any]]:
    """Registers, spills and occupancy of each kernel, from what nvcc --resource-usage says (demangled)."""
    rows = []
    blocks = re.split(r"Compiling entry function '", resource_usage)[1:]
    for block in blocks:
        name = re.sub(r"paddle_asgd::|\(anonymous namespace\)::|^void ", "", block.split("'", 1)[0])
        name = re.sub(r"\(.*", "", name)
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", block)))
        rows.append({"kernel": name, "registers": registers, "spilled": spilled, **occupancy(registers)})
    return sorted(rows, key=lambda row: row["kernel"])


def occupancy(registers: int, threads: int = THREADS) -> dict[str, float]:
    """Blocks and the share of warps that a multiprocessor holds. Registers are given out in 256 a warp."""
    warps = threads // 32
    a_warp = math.ceil(registers * 32 / REGISTERS_A_WARP) * REGISTERS_A_WARP
    blocks = min(REGISTERS // a_warp // warps, WARPS // warps, BLOCKS)
    return {"blocks": blocks, "occupancy": blocks * warps / WARPS}
