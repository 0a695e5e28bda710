# SPDX-License-Identifier: Apache-2.0
"""Evidence for the recipe: which theta, in which order of the batches, converges best and at most learning rates.

    python -m benchmarks.recipe                       # twelve convex problems, three seeds: under ten minutes
    python -m benchmarks.recipe --problems 0 3 --seeds 1
    python -m benchmarks.recipe --from recipe.json    # the tables again

Must not hold the problems (recipe_problems.py), networks (recipe_networks.py) or the search (untuned.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from examples.stability import Columns

from .recipe_problems import Problem, convex_problems

ORDERS = ("replacement", "reshuffle", "sequential")
THETAS = (None, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0)
RATES = 2.0 ** np.arange(-2, 4)  # over the largest Lipschitz constant of a batch
CONVERGED = 1e-3  # of the start

#: suboptimality as a fraction of that at the start, of each theta and learning rate, after the problem's passes
Result = list[list[float]]


def run(problem: Problem, order: str, seed: int, smallest: float) -> Result:
    """All thetas and learning rates side by side."""
    sampler = problem.sampler(order, seed)
    rates = np.tile(RATES / problem.lipschitz(sampler), len(THETAS))
    thetas = np.repeat([np.nan if theta is None else theta for theta in THETAS], len(RATES))
    start = np.zeros((problem.samples.shape[1], len(rates) * problem.classes))
    columns = Columns(
        start,
        problem.n,
        np.repeat(rates, problem.classes),
        np.repeat(thetas, problem.classes),
        problem.weight_decay,
        sampler.batch_weights,
    )
    batches = sampler.batches
    with np.errstate(over="ignore", invalid="ignore"):
        for epoch in range(problem.passes):
            for i in sampler.epoch_order(epoch):
                columns.step(i, problem.gradients(batches[i], columns.x))
        objective = problem.objective(columns.x)
    excess = (objective - smallest) / (problem.objective(start[:, : problem.classes])[0] - smallest)
    return np.nan_to_num(excess, nan=np.inf).clip(1e-16, 1e16).reshape(len(THETAS), -1).tolist()


def label(problem: Problem) -> str:
    return f"{problem.name}, {problem.kind} ({problem.batch_size}, {problem.weight_decay:g}, {problem.n})"


def markdown(results: dict[str, dict[str, list[Result]]], passes: dict[str, int]) -> str:
    """For each problem and order the best of all rates, median over seeds, and the rates that converge, of all runs."""
    head = " | ".join("SAG" if theta is None else f"{theta:g}" for theta in THETAS)
    lines = [f"| problem (batch size, decay, n) | passes | order | {head} |", "|---" * (3 + len(THETAS)) + "|"]
    for name, orders in results.items():
        for order, seeds in orders.items():
            values = np.array(seeds)
            best = np.median(values.min(axis=2), axis=0)
            shares = (values < CONVERGED).mean(axis=0).sum(axis=1)
            cells = " | ".join(f"{b:.0e} ({s:.2g})" for b, s in zip(best, shares))
            lines.append(f"| {name} | {passes[name]} | {order} | {cells} |")
    return "\n".join(lines)


def shares(results: dict[str, dict[str, list[Result]]]) -> str:
    """Over all problems and seeds: the learning rates that converge, and how far the best lies from the very best."""
    lines = [f"| order | {' | '.join('SAG' if t is None else f'{t:g}' for t in THETAS)} |"]
    lines.append("|---" * (1 + len(THETAS)) + "|")
    best = {
        name: np.array([np.median(np.array(seeds).min(axis=2), axis=0) for seeds in orders.values()])
        for name, orders in results.items()
    }
    for k, order in enumerate(ORDERS):
        converged = [(np.array(orders[order]) < CONVERGED).mean(axis=(0, 2)) for orders in results.values()]
        # Below 1e-12 the difference is of no use to anybody.
        behind = np.max([np.maximum(b[k], 1e-12) / max(b.min(), 1e-12) for b in best.values()], axis=0)
        lines.append(
            f"| {order} | " + " | ".join(f"{s:.0%}, {w:.1g}" for s, w in zip(np.mean(converged, axis=0), behind)) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.recipe", description="Compare thetas and orders on convex problems.")
    parser.add_argument("--problems", type=int, nargs="+", help="only these, by number")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("recipe.json"), help="keeps results; a run goes on there")
    parser.add_argument("--from", type=Path, dest="source", help="print the tables of this file, run nothing")
    options = parser.parse_args()
    path = options.source or options.json
    kept = json.loads(path.read_text()) if path.is_file() else {"results": {}, "passes": {}}
    problems = convex_problems()
    for number in [] if options.source else options.problems or range(len(problems)):
        problem = problems[number]
        smallest = problem.minimum()
        orders = kept["results"].setdefault(label(problem), {order: [] for order in ORDERS})
        kept["passes"][label(problem)] = problem.passes
        for order in ORDERS:
            for seed in range(len(orders[order]), options.seeds):
                orders[order].append(run(problem, order, seed, smallest))
                path.write_text(json.dumps(kept))
        print(markdown({label(problem): orders}, kept["passes"]), flush=True)
    print(markdown(kept["results"], kept["passes"]))
    print(shares(kept["results"]))


if __name__ == "__main__":
    main()
