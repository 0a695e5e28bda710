# SPDX-License-Identifier: Apache-2.0
"""How much memory this process may still take, as Linux tells it. Must not decide what is too much."""

from __future__ import annotations

import math
import os
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Bytes to be had without ending a process, swap included: the smaller of what the machine and what the control
    groups of this process leave. All of the machine's memory where the machine does not say.

    Args:
        root: where ``proc`` and ``sys`` are looked for.
    """
    try:
        info = _numbers(root / "proc/meminfo", 1024)
        swap = info["SwapFree"]
        machine = info["MemAvailable"] + swap
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(max(0, min([machine, *(_left_in(folder, version, swap) for folder, version in _control_groups(root))])))


def _control_groups(root: Path) -> list[tuple[Path, int]]:
    """The folder of every control group of this process that may limit memory, parents too, and its version, 1 or 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        version = 2 if not controllers else 1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        mount = root / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
        # In a container the path may be the host's, of which only the end, or nothing but the mount itself, is here.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        found += [(mount.joinpath(*parts[:length]), version) for length in range(len(parts), -1, -1)]
    return found


def _left_in(folder: Path, version: int, swap: float) -> float:
    """What one control group leaves, with at most this much swap; infinite where it sets no limit."""
    limit, usage, prefix = ("max", "current", "") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
    # What is counted includes the files that the kernel keeps for as long as nobody needs the memory.
    statistics = _statistics(folder / "memory.stat")
    cached = sum(statistics.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
    memory = _bytes(folder / f"memory.{limit}", math.inf) - _bytes(folder / f"memory.{usage}", 0) + cached
    if version == 2:
        return memory + max(
            0, min(swap, _bytes(folder / "memory.swap.max", math.inf) - _bytes(folder / "memory.swap.current", 0))
        )
    with_swap = (
        _bytes(folder / "memory.memsw.limit_in_bytes", math.inf)
        - _bytes(folder / "memory.memsw.usage_in_bytes", 0)
        + cached
    )
    return min(memory + swap, with_swap)


def _bytes(file: Path, otherwise: float) -> float:
    """The number in a file; ``otherwise`` where there is none, as in "max", or no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return otherwise


def _numbers(file: Path, unit: int) -> dict[str, int]:
    """The lines of a file that begin with a name and a number."""
    words = [line.replace(":", " ").split() for line in file.read_text().splitlines()]
    return {line[0]: unit * int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _statistics(file: Path) -> dict[str, int]:
    """The counts of a control group; empty where there is no such file."""
    try:
        return _numbers(file, 1)
    except OSError:
        return {}
