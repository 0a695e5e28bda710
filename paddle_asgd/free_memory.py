# SPDX-License-Identifier: Apache-2.0
"""How much memory this process may still take, according to Linux. Must not decide what is too much."""

from __future__ import annotations

import math
import os
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take before Linux ends it, swap included.

    That is the least of what the machine and each control group of the process leave. Where the machine does not say,
    it is all memory that the machine has.

    Args:
        root: the folder in which ``proc`` and ``sys`` are looked for; another one only in tests.

    Examples:
        >>> free_memory() > 0
        True
    """
    try:
        info = _numbers(root / "proc/meminfo", 1024)
        swap = info["SwapFree"]
        machine = info["MemAvailable"] + swap
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(max(0, min([machine, *(_left_in(folder, version, swap) for folder, version in _control_groups(root))])))


def _control_groups(root: Path) -> list[tuple[Path, int]]:
    """Control groups of this process that may limit its memory, the parents of each included.

    Args:
        root: the folder in which ``proc`` and ``sys`` are looked for.

    Returns:
        The folder of each group and its version, 1 or 2. A folder need not exist.
    """
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
        # In a container the path may be the host's, and only its end, or nothing but the mount itself, exists here.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        found += [(mount.joinpath(*parts[:length]), version) for length in range(len(parts), -1, -1)]
    return found


def _left_in(folder: Path, version: int, swap: float) -> float:
    """Bytes that one control group leaves; infinite where it sets no limit.

    Args:
        folder: the group's folder.
        version: the version of control groups, 1 or 2, which name their files differently.
        swap: the bytes of swap that the machine has free, beyond which a group's limit on swap is of no use.
    """
    limit, usage, prefix = ("max", "current", "") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
    # The usage includes cached files, which the kernel gives up as soon as a process needs the memory.
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
    """Number in a file.

    Args:
        file: a file of a control group, which holds a number of bytes or the word "max".
        otherwise: what is returned if the file does not exist or holds no number.
    """
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return otherwise


def _numbers(file: Path, unit: int) -> dict[str, int]:
    """Numbers by their names, from the lines of a file such as "MemFree: 1024 kB".

    Args:
        file: a file whose lines each begin with a name and a number; other lines are passed over.
        unit: the factor by which the numbers are multiplied, so that they are bytes.

    Raises:
        OSError: the file cannot be read.
    """
    words = [line.replace(":", " ").split() for line in file.read_text().splitlines()]
    return {line[0]: unit * int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _statistics(file: Path) -> dict[str, int]:
    """Counts of a control group by their names, in bytes; empty where there is no such file."""
    try:
        return _numbers(file, 1)
    except OSError:
        return {}
