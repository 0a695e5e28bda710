# SPDX-License-Identifier: Apache-2.0
"""Counts how often SlotMismatchWarning comes: with right slots, where it is a false alarm, and with samples that are
shuffled behind the optimizer's back: ``python -m benchmarks.false_alarms``.

Least squares of 5 weights, batches of 10 samples, runs of 60 passes. Must not time anything, nor know the rule.
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
    import paddle

    from paddle_asgd import ASGD, FixedBatchSampler, SlotMismatchWarning

WEIGHTS, BATCH_SIZE, PASSES = 5, 10, 60
BATCH_NUMS = (2, 3, 5, 8, 13, 25, 50)
#: Of the targets; they would be of size 2.2 without.
NOISES = (1.0, 0.1, 0.01)
#: Learning rates, over the largest that the order allows.
STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)
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


def warned_in(n: int, noise: float, order: str, step: float, seed: int, passes: int = PASSES) -> int | None:
    """Train; returns the pass in which the warning came, None if it did not."""
    problem = LeastSquares(n, noise, order, seed)
    x = paddle.create_parameter([WEIGHTS], "float64", default_initializer=paddle.nn.initializer.Constant(0.0))
    x.grad = paddle.zeros([WEIGHTS], "float64")
    optimizer = ASGD(step * problem.largest_rate, n, [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlotMismatchWarning)
        for epoch in range(passes):
            if order == "shuffled":
                problem.deal()
            for batch in problem.sampler.epoch_order(epoch):
                x.grad.set_value(problem.gradient(batch, x.numpy()))
                if order in ("replacement", "reshuffle"):
                    optimizer.batch_index = batch
                try:
                    optimizer.step()
                except SlotMismatchWarning:
                    return epoch + 1
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the watch's warnings with right and with wrong slots.")
    parser.add_argument("--seeds", type=int, default=3, help="35 runs for each, noise and order; thrice that if wrong")
    seeds = parser.parse_args().seeds
    print("least squares          noise  warned  of   passes of the warnings: first, quartiles, last")
    for order, noise in product(LIMITS, NOISES):
        cases = product(BATCH_NUMS, STEPS, range(3 * seeds if order == "shuffled" else seeds))
        runs = [warned_in(n, noise, order, step, seed) for n, step, seed in cases]
        found = sorted(pass_ for pass_ in runs if pass_ is not None)
        quartiles = [round(q) for q in statistics.quantiles(found, method="inclusive")] if len(found) > 1 else found
        label = "wrong slots, shuffled" if order == "shuffled" else f"right slots, {order}"
        print(f"{label:24}{noise:4}  {len(found):6}  {len(runs):4}  {found[:1]} {quartiles} {found[-1:]}", flush=True)


if __name__ == "__main__":
    main()
