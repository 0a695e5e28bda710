# SPDX-License-Identifier: Apache-2.0
"""Least squares in batches, and a run of ASGD on them that reports when the watch warned.

Serves test_watch.py and benchmarks/false_alarms.py. Must not judge whether a warning is right.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import paddle

from paddle_asgd import ASGD, FixedBatchSampler, SlotMismatchWarning

WEIGHTS, BATCH_SIZE, PASSES = 5, 10, 60
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

        self.solution = np.linalg.lstsq(self.samples, self.targets, rcond=None)[0]
        self.mean_squares()

    def mean_squares(self) -> None:
        """What the gradients of all batches are made of: ``curvature @ x - offset``."""
        rows = self.samples.reshape(self.n, BATCH_SIZE, WEIGHTS)
        self.curvature = rows.transpose(0, 2, 1) @ rows / BATCH_SIZE
        self.offset = np.einsum("nbw,nb->nw", rows, self.targets.reshape(self.n, BATCH_SIZE)) / BATCH_SIZE

    def gradient(self, batch: int, x: np.ndarray) -> np.ndarray:
        return self.curvature[batch] @ x - self.offset[batch]

    def deal(self) -> None:
        """Put other samples into every batch, as a loader with shuffle=True does in every pass."""
        dealt = self.draw.permutation(len(self.samples))
        self.samples, self.targets = self.samples[dealt], self.targets[dealt]
        self.mean_squares()


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
    """Train with ASGD, and a learning rate of ``step`` times the largest that the order allows."""
    problem = LeastSquares(n, noise, order, seed)
    x = paddle.create_parameter([WEIGHTS], "float64", default_initializer=paddle.nn.initializer.Constant(0.0))
    x.grad = paddle.zeros([WEIGHTS], "float64")
    optimizer = ASGD(step * problem.largest_rate, n, [x])
    warned_in, distances = None, [float(np.linalg.norm(problem.solution))]
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
            distances.append(float(np.linalg.norm(x.numpy() - problem.solution)))
            if warned_in is None and any(issubclass(warning.category, SlotMismatchWarning) for warning in caught):
                warned_in = epoch + 1
    return Run(warned_in, distances)
