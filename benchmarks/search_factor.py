# SPDX-License-Identifier: Apache-2.0
"""How far LipschitzSearch's rule comes without a number to tune, for several factors and thetas side by side.

    python -m benchmarks.search_factor                # twelve problems, two orders
    python -m benchmarks.search_factor --problems 0 3 --thetas 0.2 0.3 1 --factors 0.25 0.5 1

The rule is written here in NumPy, because one run of the package for every factor takes longer; benchmarks.untuned
runs the package. Must not hold the problems (recipe_problems.py).
"""

from __future__ import annotations

import argparse

import numpy as np

from examples.stability import Columns

from .recipe_problems import Problem, convex_problems

PASSES = 60
ORDERS = ("reshuffle", "replacement")


def run(problem: Problem, order: str, thetas: list[float], factors: list[float], seed: int) -> np.ndarray:
    """What is left of the start after the passes, of every theta and factor; 0 as a theta is SAG."""
    sampler, classes, decay = problem.sampler(order, seed), problem.classes, problem.weight_decay
    factor, theta = (grid.ravel() for grid in np.meshgrid(factors, [t or np.nan for t in thetas]))
    start = np.zeros((problem.samples.shape[1], len(factor) * classes))
    columns = Columns(start, problem.n, np.zeros_like(factor), np.repeat(theta, classes), decay, sampler.batch_weights)
    lipschitz, batches = np.ones_like(factor), sampler.batches
    with np.errstate(over="ignore", invalid="ignore"):
        for epoch in range(PASSES):
            for i in sampler.epoch_order(epoch):
                x, batch = columns.x, batches[i]
                g, loss = problem.gradients(batch, x), problem.losses(batch, x)
                squares = np.square(g).reshape(len(g), -1, classes).sum(axis=(0, 2))
                violated = (squares > 1e-8) & np.isfinite(squares)
                while violated.any():
                    tried = problem.losses(batch, x - g / np.repeat(lipschitz, classes))
                    bound = loss - squares / (2 * lipschitz) + abs(loss) * 2.0**-50
                    # What has diverged would double for ever.
                    violated &= ~(tried <= bound) & (lipschitz < 1e12)
                    lipschitz[violated] *= 2
                columns.rates = np.repeat(factor / (lipschitz + decay), classes)
                columns.step(i, g)
                lipschitz *= 2 ** (-1 / problem.n)
        objective = problem.objective(columns.x)
    smallest, first = problem.minimum(), problem.objective(start[:, :classes])[0]
    return ((objective - smallest) / (first - smallest)).clip(1e-17).reshape(len(thetas), -1)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.search_factor", description="Factors of LipschitzSearch.")
    parser.add_argument("--problems", type=int, nargs="+", help="only these, by number")
    parser.add_argument("--thetas", type=float, nargs="+", default=[0.3], help="0 is SAG")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 0.7, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problems = convex_problems()
    for number in options.problems or range(len(problems)):
        p = problems[number]
        for order in ORDERS:
            found = run(p, order, options.thetas, options.factors, options.seed)
            for theta, values in zip(options.thetas, found):
                cells = "  ".join(f"{f:g}: {value:.0e}" for f, value in zip(options.factors, values))
                print(f"{p.name:14} {p.kind:9} n={p.n:4} {order:12} theta={theta:<4g} {cells}", flush=True)


if __name__ == "__main__":
    main()
