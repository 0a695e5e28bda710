# SPDX-License-Identifier: Apache-2.0
"""Starts one process for each rank over gloo, with free ports and a time limit, and collects what each of them reports.

Must not hold tests, nor what the ranks do: each test file has its own jobs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paddle.distributed import fleet

#: Far above the 5 to 9 seconds that a job takes, for a machine that does other work beside it.
SECONDS = 150


def fleet_starts() -> bool:
    """Whether this Paddle's fleet can read its own settings: that of 3.0 cannot with protobuf 7."""
    try:
        return bool(fleet.DistributedStrategy().hybrid_configs)
    except AttributeError:
        return False


#: Marks the tests of a file whose ranks need fleet.
needs_fleet = pytest.mark.skipif(not fleet_starts(), reason="fleet of this Paddle does not start with this protobuf")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def started(job: str, folder: Path, ranks: int) -> Iterator[list[subprocess.Popen]]:
    """One process for each rank, all of which are over when the context ends. What they print is in ``folder``."""
    endpoints = [f"127.0.0.1:{port}" for port in free_ports(ranks)]
    code = f"import ranks; ranks.report({job!r}, {str(folder)!r})"
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(ranks):
            environment = {
                **os.environ,
                "PADDLE_DISTRI_BACKEND": "gloo",
                "PADDLE_TRAINER_ID": str(rank),
                "PADDLE_TRAINERS_NUM": str(ranks),
                "PADDLE_MASTER": endpoints[0],
                "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
                "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            }
            command = [sys.executable, "-W", "ignore", "-c", code]
            with (folder / f"{rank}.txt").open("w") as said:
                processes.append(
                    subprocess.Popen(
                        command, cwd=Path(__file__).parent, env=environment, stdout=said, stderr=subprocess.STDOUT
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ends(processes: list[subprocess.Popen], folder: Path) -> Iterator[tuple[int | str, str]]:
    """How each process ends, in the order of the ranks: its exit code or "time limit", and what it has printed."""
    end = time.monotonic() + SECONDS
    for rank, process in enumerate(processes):
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = "time limit"
        yield code, (folder / f"{rank}.txt").read_text()


def run_on_ranks(job: str, folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    """Run a job in one process for each rank; returns what each rank reported.

    Args:
        job: ``module.function`` of a test file. The function gets a dict, which it fills with what JSON can hold, and
            the folder.
        folder: an empty folder, the same for all ranks.
    """
    with started(job, folder, ranks) as processes:
        for rank, (code, _) in enumerate(ends(processes, folder)):
            texts = [(folder / f"{number}.txt").read_text()[-1500:] for number in range(ranks)]
            assert code == 0, (rank, code, *texts)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def report(job: str, folder: str) -> None:
    """What one rank runs."""
    module, _, function = job.rpartition(".")
    found: dict[str, Any] = {}
    getattr(importlib.import_module(module), function)(found, Path(folder))
    Path(folder, f"{os.environ['PADDLE_TRAINER_ID']}.json").write_text(json.dumps(found))


def caught(call: Any) -> str:
    """What a call raises, as text; an empty text if it raises nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
