# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks: ``python -m benchmarks --help``. Must not hold what is timed, nor how a report looks."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

# Before Paddle, which sets a variable that this reads.
from . import cases, machine, report
from .measure import Effort

EFFORT = Effort(rounds=21, seconds_a_turn=0.03)
QUICK = Effort(rounds=5, seconds_a_turn=0.01)


def arguments() -> argparse.Namespace:
    names = ", ".join([*cases.MODELS, cases.STATIC])
    parser = argparse.ArgumentParser("benchmarks", description="Times one step of paddle_asgd.ASGD beside others.")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: under 40 seconds")
    parser.add_argument(
        "--case", nargs="+", metavar="NAME", help=f"only these: {names}; or resnet50/bfloat16, */float16"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="report from this file, time nothing")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    return parser.parse_args()


def run(quick: bool, patterns: list[str] | None) -> report.Report:
    """Time the selected cases and print each as soon as it is done."""
    chosen, static = cases.select(cases.quick_cases() if quick else cases.all_cases(), patterns)
    effort = QUICK if quick else EFFORT
    facts = machine.facts()
    with warnings.catch_warnings():
        # What Paddle says while it is imported: no ccache, a GPU build on a machine without a GPU.
        warnings.simplefilter("ignore")
        from . import timed
    print(report.head(facts), flush=True)
    done: report.Report = {"machine": facts, "cases": [], "calls": []}
    for case in chosen:
        done["cases"].append(timed.time_case(case, effort))
        print(report.case_table(done["cases"][-1]), flush=True)
    if static:
        done["calls"] = timed.time_calls(effort)
        print(report.calls_table(done["calls"]), flush=True)
    facts["load after"] = f"{os.getloadavg()[0]:.2f}"
    return done


def main() -> None:
    options = arguments()
    if options.source:
        done = report.read(options.source)
        if not options.markdown:
            print(report.text(done))
    else:
        done = run(options.quick, options.case)
    if options.json:
        report.write(done, options.json)
    if options.markdown:
        print(report.markdown(done))


if __name__ == "__main__":
    sys.exit(main())
