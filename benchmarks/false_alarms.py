# SPDX-License-Identifier: Apache-2.0
"""Counts how often SlotMismatchWarning comes: with right slots, where it is a false alarm, and with samples that are
shuffled behind the optimizer's back: ``python -m benchmarks.false_alarms``.

Least squares of 5 weights, batches of 10 samples, runs of 60 passes. Runs with right slots that do not converge are
counted apart: their learning rate is too large for the order, so a warning is right. All runs of a kind are computed
side by side in NumPy, with the sums that the kernel would sample, and judged by the package; a part of them is repeated
with ASGD itself. Must not time anything, nor know the rule.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from itertools import product

import numpy as np

with warnings.catch_warnings():
    # What Paddle says while it is imported: no ccache, a GPU build on a machine without a GPU.
    warnings.simplefilter("ignore")
    from paddle_asgd.sag.watch import ENTRIES, PASSES_KEPT, WATCH_SIZE, does_harm
    from tests.least_squares import LIMITS, PASSES, WEIGHTS, LeastSquares, Run, train

BATCH_NUMS = (2, 3, 5, 8, 13, 25, 50)
#: Of the targets; they would be of size 2.2 without.
NOISES = (1.0, 0.1, 0.01)
#: Learning rates, over the largest that the order allows.
STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)


def simulate(n: int, noise: float, order: str, seeds: range) -> list[Run]:
    """What ``train`` gives for all STEPS, with each seed in turn. The watch samples all of 5 weights."""
    problems = [LeastSquares(n, noise, order, seed) for seed in seeds]
    every = np.arange(len(problems))
    rate = np.outer([problem.largest_rate for problem in problems], STEPS)[..., np.newaxis]
    solution = np.array([problem.solution for problem in problems])[:, np.newaxis]
    x, d = np.zeros([2, len(problems), len(STEPS), WEIGHTS])
    y = np.zeros([n, len(problems), len(STEPS), WEIGHTS])
    seen = np.zeros([n, len(problems)], bool)
    sums = np.zeros([PASSES, 3, len(problems), len(STEPS)])
    distances = [np.linalg.norm(x - solution, axis=-1)]
    for epoch in range(PASSES):
        if order == "shuffled":
            for problem in problems:
                problem.deal()
        curvature = np.array([problem.curvature for problem in problems])
        offset = np.array([problem.offset for problem in problems])
        for batch in np.array([problem.sampler.epoch_order(epoch) for problem in problems]).T:
            g = np.einsum("siw,stw->sti", curvature[every, batch], x) - offset[every, batch][:, np.newaxis]
            again = seen[batch, every][:, np.newaxis]
            replaced = g - y[batch, every]
            centred = g - d / np.maximum(seen.sum(0), 1)[:, np.newaxis, np.newaxis]
            sums[epoch] += again * [(replaced**2).sum(-1), (centred**2).sum(-1), np.full(g.shape[:2], WEIGHTS)]
            d += replaced
            y[batch, every] = g
            seen[batch, every] = True
            x -= rate * d / seen.sum(0)[:, np.newaxis, np.newaxis]
        distances.append(np.linalg.norm(x - solution, axis=-1))
    trace = np.array(distances)
    return [Run(first_warning(sums[..., s, t], n), trace[:, s, t].tolist()) for s in every for t in range(len(STEPS))]


def first_warning(sums: np.ndarray, n: int) -> int | None:
    """The pass in which the package warns if the kernel leaves these three sums behind each pass."""
    values = np.zeros(WATCH_SIZE)
    kept = values[len(ENTRIES) :].reshape(PASSES_KEPT, 3)
    for number, last in enumerate(sums):
        kept[number % PASSES_KEPT] = last
        values[ENTRIES.index("passes")] = number + 1
        if does_harm(values, n):
            return number + 1
    return None


def row(label: str, noise: float, runs: list[Run]) -> str:
    """How many of these runs were warned, and when."""
    found = sorted(run.warned_in for run in runs if run.warned_in is not None)
    quartiles = [round(q) for q in statistics.quantiles(found, method="inclusive")] if len(found) > 1 else found
    part = f"{len(found) / len(runs):7.2%}" if runs else " " * 7
    return f"{label:28}{noise:5} {len(found):6} {len(runs):5} {part}  {found[:1]} {quartiles} {found[-1:]}"


def repeat(noise: float, order: str, seeds: int, runs: list[Run], every: int) -> tuple[int, int]:
    """Repeat some runs with ASGD itself; returns how many warn in the same pass, or not at all, and how many ran."""
    cases = list(product(BATCH_NUMS, range(seeds), STEPS))[::every]
    same = [
        train(n, noise, order, step, seed).warned_in == run.warned_in
        for (n, seed, step), run in zip(cases, runs[::every])
    ]
    return sum(same), len(same)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the watch's warnings with right and with wrong slots.")
    parser.add_argument("--seeds", type=int, default=20, help="35 runs for each, noise and order")
    parser.add_argument("--every", type=int, default=101, help="one run of so many is repeated with ASGD itself")
    arguments = parser.parse_args()
    same = repeated = 0
    print("least squares               noise warned    of   part  passes of the warnings: first, quartiles, last")
    for noise in NOISES:
        right: list[Run] = []
        for order in LIMITS:
            runs = [run for n in BATCH_NUMS for run in simulate(n, noise, order, range(arguments.seeds))]
            alike, count = repeat(noise, order, arguments.seeds, runs, arguments.every)
            same, repeated = same + alike, repeated + count
            if order == "shuffled":
                print(row("wrong slots, shuffled", noise, runs), flush=True)
            else:
                print(row(f"right slots, {order}", noise, [run for run in runs if run.converged]), flush=True)
                right += runs
        print(row("right slots, all orders", noise, [run for run in right if run.converged]), flush=True)
        print(row("right slots, not converged", noise, [run for run in right if not run.converged]), flush=True)
    print(
        f"Repeated with ASGD itself: {repeated} runs, of which {same} are warned in the same pass, or never, as above"
    )


if __name__ == "__main__":
    main()
