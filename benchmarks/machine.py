# SPDX-License-Identifier: Apache-2.0
"""What a figure depends on besides the code: processor, memory, versions, threads. Must not name the host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

#: Read before Paddle is imported, which sets it.
OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS", "not set")


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def facts() -> dict[str, str]:
    """For the head of every report."""
    versions = {
        "paddle": _version("paddlepaddle", "paddlepaddle-gpu"),
        "paddle_asgd": _version("paddle_asgd"),
        "torch": _version("torch"),
        "python": platform.python_version(),
    }
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory_bytes() / 2**30:.0f} GiB",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "threads": f"OMP_NUM_THREADS {OMP_NUM_THREADS}",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }
