# SPDX-License-Identifier: Apache-2.0
"""LipschitzSearch without a number to tune: on the convex problems, and on a large one beside scikit-learn's sag.

    python -m benchmarks.untuned                      # twelve problems, two orders, 60 passes each
    python -m benchmarks.untuned --problems 0 3
    python -m benchmarks.untuned --large              # 50,000 x 200, 5 classes, to 1e-8: time of each in turn

Must not hold the problems (recipe_problems.py).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from paddle.nn import functional
from scipy.optimize import minimize
from sklearn.linear_model._sag import sag_solver

from paddle_asgd import ASGD, LipschitzSearch

from .recipe_problems import Problem, convex_problems, synthetic

THETA, PASSES, ENOUGH = 0.3, 60, 1e-8


class Training:
    """One problem with ASGD in float64, at a learning rate or with a search for it."""

    def __init__(self, problem: Problem, order: str, theta: float | None, rate: float | None, seed: int = 0) -> None:
        self._kind, self._sampler = problem.kind, problem.sampler(order, seed)
        self._weights = paddle.zeros([problem.samples.shape[1], problem.classes], "float64")
        self._weights.stop_gradient = False
        targets = problem.targets[:, None] if problem.kind != "softmax" else problem.targets
        self._batches = [
            (paddle.to_tensor(problem.samples[b]), paddle.to_tensor(targets[b])) for b in self._sampler.batches
        ]
        weights = self._sampler.batch_weights
        decay = problem.weight_decay
        self._optimizer = ASGD(rate or 1.0, problem.n, [self._weights], decay, batch_weights=weights, theta=theta)
        self._search = LipschitzSearch(self._optimizer) if rate is None else None

    def _loss(self, x: Any, y: Any) -> Any:
        scores = paddle.matmul(x, self._weights)
        if self._kind == "softmax":
            return functional.cross_entropy(scores, y)
        return (scores - y).square().mean() / 2 if self._kind == "ridge" else functional.softplus(-y * scores).mean()

    def passes(self) -> Iterator[np.ndarray]:
        """The weights after one pass, after two, and so on."""
        optimizer, epoch = self._optimizer, 0
        while True:
            for i in self._sampler.epoch_order(epoch):
                optimizer.batch_index = i
                x, y = self._batches[i]
                if self._search is not None:
                    self._search.step(lambda x=x, y=y: self._loss(x, y))
                else:
                    self._loss(x, y).backward()
                    optimizer.step()
                    optimizer.clear_grad()
            epoch += 1
            yield self._weights.numpy()


def sklearn_passes(problem: Problem) -> Iterator[np.ndarray]:
    """The same of scikit-learn's SAG, which takes its step size from the samples."""
    memory = {"coef": np.zeros((problem.samples.shape[1], problem.classes))}
    ones, count = np.ones(len(problem.samples)), len(problem.samples)
    # One generator for all passes: the same seed in each would draw the same samples, and never a third of them.
    draw = np.random.RandomState(0)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one pass has not converged
            *_, memory = sag_solver(
                problem.samples,
                problem.targets.astype(float),
                ones,
                loss="multinomial",
                alpha=problem.weight_decay * count,
                max_iter=1,
                tol=0.0,
                random_state=draw,
                check_input=False,
                warm_start_mem=memory,
            )
        yield memory["coef"]


def untuned(problem: Problem, order: str) -> tuple[float, int]:
    """What is left of the start after the passes, and how many warnings there were."""
    smallest, start = problem.minimum(), problem.objective(np.zeros((problem.samples.shape[1], problem.classes)))[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        passes = Training(problem, order, THETA, None).passes()
        for _ in range(PASSES):
            weights = next(passes)
    return (problem.objective(weights)[0] - smallest) / (start - smallest), len(caught)


def smallest_of_large(problem: Problem) -> float:
    """Where Newton's method would take minutes: L-BFGS, to a gradient of 1e-9."""
    shape = (problem.samples.shape[1], problem.classes)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        x = x.reshape(shape)
        gradient = problem.gradients(slice(None), x) + problem.weight_decay * x
        return problem.objective(x)[0], gradient.ravel()

    start, options = np.zeros(shape).ravel(), {"gtol": 1e-9, "ftol": 0.0, "maxiter": 1000}
    return float(minimize(objective, start, jac=True, method="L-BFGS-B", options=options).fun)


def race(problem: Problem, rounds: int) -> None:
    """Time and passes that each needs, one after another in every round."""
    sampler, smallest = problem.sampler("reshuffle", 0), smallest_of_large(problem)
    rate = 4 / problem.lipschitz(sampler)
    contestants = {
        "LipschitzSearch, reshuffle, theta=0.3": lambda: Training(problem, "reshuffle", THETA, None).passes(),
        "LipschitzSearch, replacement, theta=0.3": lambda: Training(problem, "replacement", THETA, None).passes(),
        "4 / L, reshuffle, theta=0.3": lambda: Training(problem, "reshuffle", THETA, rate).passes(),
        "4 / L, replacement, no theta": lambda: Training(problem, "replacement", None, rate).passes(),
        "scikit-learn, sag": lambda: sklearn_passes(problem),
    }
    for _ in range(rounds):
        for name, make in contestants.items():
            passes, taken, count, excess = make(), 0.0, 0, np.inf
            while excess > ENOUGH and count < 200:
                begin = time.process_time()
                weights = next(passes)
                taken, count = taken + time.process_time() - begin, count + 1
                excess = problem.objective(weights)[0] - smallest
            print(f"  {name:40} {taken:6.2f} s  {count:3} passes  {excess:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.untuned", description="LipschitzSearch without a number to tune.")
    parser.add_argument("--problems", type=int, nargs="+", help="only these, by number")
    parser.add_argument("--large", action="store_true", help="the race on the large problem")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    if options.large:
        race(Problem("large", *synthetic(50000, 200, 5), "softmax", 64, 1e-4, 0), options.rounds)
        return
    problems = convex_problems()
    for number in options.problems or range(len(problems)):
        for order in ("reshuffle", "replacement"):
            excess, warned = untuned(problems[number], order)
            p = problems[number]
            print(f"{p.name:14} {p.kind:9} n={p.n:4} {order:12} {excess:8.0e}  warnings: {warned}", flush=True)


if __name__ == "__main__":
    main()
