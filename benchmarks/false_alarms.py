# SPDX-License-Identifier: Apache-2.0
"""Counts how often SlotMismatchWarning comes: with right slots, where it is a false alarm, and with samples that are
shuffled behind the optimizer's back: ``python -m benchmarks.false_alarms``.

Least squares of 5 weights, batches of 10 samples, runs of 60 passes. Runs with right slots that do not converge are
counted apart: their learning rate is too large for the order, so a warning is right. Must not time anything, nor know
the rule.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from itertools import product
from typing import NamedTuple

import numpy as np

with warnings.catch_warnings():
    # What Paddle says while it is imported: no ccache, a GPU build on a machine without a GPU.
    warnings.simplefilter("ignore")
    import paddle

    from paddle_asgd import ASGD, FixedBatchSampler, SlotMismatchWarning

WEIGHTS, BATCH_SIZE, PASSES = 5, 10, 60
BATCH_NUMS = (2, 3, 5, 8, 13, 25, 50)
#: Of the targets; they would be of size 2.2 without.
NOISES = (1.0, 0.1, 0.01)
#: Learning rates, over the largest that the order allows.
STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)
#: Distances from the solution, over that at the start, which are as near as float64 comes in a few thousand steps.
ROUNDING = 1e-9
#: learning_rate * n * the largest curvature of the mean loss, below which an order converges.
LIMITS = {"replacement": np.inf, "reshuffle": 5.4, "sequential": np.pi**2 / 2, "shuffled": np.pi**2 / 2}


class LeastSquares:
    """Samples, the order in which they come, and the learning rate that is the limit of that order."""

    def __init__(self, n: int, noise: float, order: str, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.n, self.order = n, order
        self.samples = self.draw.normal(size=(n * BATCH_SIZE, WEIGHTS))
        self.targets = self.samples @ self.draw.normal(size=WEIGHTS) + noise * self.draw.normal(size=len(self.samples))
        fixed = "sequential" if order == "shuffled" else order
        self.sampler = FixedBatchSampler(self.targets, BATCH_SIZE, fixed, shuffle_once=False, seed=seed)
        steepest = max(np.linalg.norm(rows, 2) ** 2 for rows in self.samples.reshape(n, BATCH_SIZE, WEIGHTS))
        mean = np.linalg.norm(self.samples, 2) ** 2 / len(self.samples)
        self.largest_rate = min(BATCH_SIZE / steepest, LIMITS[order] / (n * mean))

    def gradient(self, batch: int, x: np.ndarray) -> np.ndarray:
        rows = slice(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)
        return self.samples[rows].T @ (self.samples[rows] @ x - self.targets[rows]) / BATCH_SIZE

    def deal(self) -> None:
        """Put other samples into every batch, as a loader with shuffle=True does in every pass."""
        dealt = self.draw.permutation(len(self.samples))
        self.samples, self.targets = self.samples[dealt], self.targets[dealt]


class Run(NamedTuple):
    """How a training went."""

    warned_in: int | None  # the pass
    distances: list[float]  # from the solution: at the start, and after every pass

    @property
    def converged(self) -> bool:
        """The second half of the passes has at least halved the distance, or nothing but rounding was left of it."""
        start, halfway, end = (self.distances[i] for i in (0, len(self.distances) // 2, -1))
        return end < max(halfway / 2, ROUNDING * start)


def train(n: int, noise: float, order: str, step: float, seed: int, passes: int = PASSES) -> Run:
    """Train with a learning rate of ``step`` times the largest that the order allows."""
    problem = LeastSquares(n, noise, order, seed)
    solution = np.linalg.lstsq(problem.samples, problem.targets, rcond=None)[0]
    x = paddle.create_parameter([WEIGHTS], "float64", default_initializer=paddle.nn.initializer.Constant(0.0))
    x.grad = paddle.zeros([WEIGHTS], "float64")
    optimizer = ASGD(step * problem.largest_rate, n, [x])
    warned_in, distances = None, [float(np.linalg.norm(solution))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlotMismatchWarning)
        for epoch in range(passes):
            if order == "shuffled":
                problem.deal()
            for batch in problem.sampler.epoch_order(epoch):
                x.grad.set_value(problem.gradient(batch, x.numpy()))
                if order in ("replacement", "reshuffle"):
                    optimizer.batch_index = batch
                optimizer.step()
            distances.append(float(np.linalg.norm(x.numpy() - solution)))
            if warned_in is None and any(issubclass(warning.category, SlotMismatchWarning) for warning in caught):
                warned_in = epoch + 1
    return Run(warned_in, distances)


def row(label: str, noise: float, runs: list[Run]) -> str:
    """How many of these runs were warned, and when."""
    found = sorted(run.warned_in for run in runs if run.warned_in is not None)
    quartiles = [round(q) for q in statistics.quantiles(found, method="inclusive")] if len(found) > 1 else found
    part = f"{len(found) / len(runs):7.2%}" if runs else " " * 7
    return f"{label:28}{noise:5} {len(found):6} {len(runs):5} {part}  {found[:1]} {quartiles} {found[-1:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the watch's warnings with right and with wrong slots.")
    parser.add_argument("--seeds", type=int, default=3, help="35 runs for each, noise and order; thrice that if wrong")
    seeds = parser.parse_args().seeds
    print("least squares               noise warned    of   part  passes of the warnings: first, quartiles, last")
    for noise in NOISES:
        converged: list[Run] = []
        others: list[Run] = []
        for order in LIMITS:
            is_wrong = order == "shuffled"
            cases = product(BATCH_NUMS, STEPS, range(3 * seeds if is_wrong else seeds))
            runs = [train(n, noise, order, step, seed) for n, step, seed in cases]
            if is_wrong:
                print(row("wrong slots, shuffled", noise, runs), flush=True)
                continue
            good = [run for run in runs if run.converged]
            print(row(f"right slots, {order}", noise, good), flush=True)
            converged += good
            others += [run for run in runs if not run.converged]
        print(row("right slots, all orders", noise, converged), flush=True)
        print(row("right slots, not converged", noise, others), flush=True)


if __name__ == "__main__":
    main()
