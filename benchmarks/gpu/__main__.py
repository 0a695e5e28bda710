# SPDX-License-Identifier: Apache-2.0
"""Builds, checks and times the CUDA kernels in one go: ``python -m benchmarks.gpu --out DIR``. Needs no Paddle.

Must not hold how programs are built (tests/gpu/build.py), what is run (stages.py) nor how a report looks (report.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu import build

from . import facts, report, stages


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.gpu", description="Checks and times paddle_asgd's kernel on a GPU.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json and log.txt there")
    parser.add_argument("--host", action="store_true", help="without a GPU: try the programs on the host")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="bits, graph, measure, torch, large, memcheck, ...")
    parser.add_argument("--arch", default="sm_90", help="what nvcc compiles for (sm_90)")
    parser.add_argument(
        "--csrc", type=Path, metavar="DIR", help="kernels of another folder, in files of the same names"
    )
    parser.add_argument("--limit", type=float, default=530, help="start no stage that might end later (530 s)")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="report from this file, run nothing")
    parser.add_argument("--known", action="store_true", help="registers and occupancy, for which nvcc is enough")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the tables into this file, between its marks")
    return parser.parse_args()


def run(out: Path, host: bool, only: list[str] | None, arch: str, limit: float) -> dict[str, Any]:
    """Build, then run stage after stage; results are on disk after each, so that nothing is lost if time runs out."""
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    log, folder = out / "log.txt", Path("build") / ("gpu_on_host" if host else "gpu")
    log.write_text("")
    results: dict[str, Any] = {"kind": "host" if host else "cuda", "machine": facts.machine(), "stages": []}

    def keep() -> None:
        results["seconds"] = time.monotonic() - begin
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    folder = folder.resolve()
    if host:
        built = build.for_host(folder, stages.PROGRAMS)
    else:
        built = build.for_cuda(folder, stages.PROGRAMS, [stages.LIBRARY], arch)
    if not host:
        results["kernels"] = facts.kernels(build.resources(folder, arch))
        results["symbols"] = build.undefined_symbols(folder)
    keep()
    print(f"built in {results['seconds']:.0f} s", flush=True)
    for stage in stages.of(built):
        if only and stage.name not in only:
            continue
        left = limit - (time.monotonic() - begin)
        if left < 5:
            results["stages"].append(stages.Done(stage.name, None, 0, [], "no time was left")._asdict())
            continue
        done = stages.perform(stage._replace(seconds=min(stage.seconds, int(left))), log)
        results["stages"].append(done._asdict())
        keep()
        print(f"{done.name:10} exit status {done.code}, {done.seconds:.0f} s, {len(done.rows)} rows", flush=True)
    results["machine after"] = facts.machine()["gpu"]
    keep()
    return results


def main() -> int:
    options = arguments()
    if options.csrc:
        build.CSRC = options.csrc.resolve()
    if options.known:
        with tempfile.TemporaryDirectory() as folder:
            found = facts.kernels(build.resources(Path(folder), options.arch))
        print(report.kernels(found))
        return 0
    if options.source:
        results = json.loads(options.source.read_text())
    elif options.out:
        results = run(options.out, options.host, options.only, options.arch, options.limit)
    else:
        sys.exit("either --out DIR, to run, or --from FILE, to report")
    bars = report.bars(results)
    print(report.markdown(results))
    if options.readme:
        report.put_into(options.readme, report.markdown(results))
    return 0 if all(bar.passed for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
