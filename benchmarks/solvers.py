# SPDX-License-Identifier: Apache-2.0
"""Whole problems: the time that ASGD and other solvers take to come within 1e-4, 1e-6 and 1e-8 of the smallest loss.

    python -m benchmarks.solvers                       # four problems, a part of make bench
    python -m benchmarks.solvers --problems 0 1 2 --markdown

Every solver begins at 0 and has the samples as NumPy arrays, in float64, and one thread. A figure is the processor time
of a whole fit of the fewest iterations that reach the target; what other processes do at the same time counts little.
Must not hold the method (untuned.py), nor the small problems (recipe_problems.py).
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from .recipe_problems import Problem, convex_problems, synthetic
from .untuned import THETA, Training, smallest_of_large

try:
    from cyanure.estimators import Classifier
except ImportError:  # takes part where it is installed, like torch in the other benchmarks
    Classifier = None

SCIKIT_LEARN = ("sag", "saga", "lbfgs", "newton-cholesky")
CYANURE = ("qning-ista", "catalyst-svrg")
TARGETS = (1e-4, 1e-6, 1e-8)
#: A solver that has not come to a target within this time is not asked for more.
MOST_SECONDS = 20.0
#: What is shorter is repeated, and the median counts.
SHORT, REPEATS = 0.3, 5

#: From a problem and a number of iterations to weights of shape [features, classes].
Fit = Callable[[Problem, int], np.ndarray]
#: The seconds to each target; infinity where a solver does not get there.
Times = list[float]


class Contest(NamedTuple):
    """A problem and the learning rate that ASGD has there, times L, the bound on the largest curvature of a batch."""

    problem: Problem
    rate: float


# ---- The solvers -----------------------------------------------------------------------------------------------------


def scikit_learn(solver: str, problem: Problem, iterations: int) -> np.ndarray:
    """The loss is summed there, not averaged. The last feature is 1 and stands for the intercept."""
    strength = 1 / (problem.weight_decay * len(problem.samples))
    model = LogisticRegression(
        C=strength, fit_intercept=False, solver=solver, tol=0.0, max_iter=iterations, random_state=0
    )
    return model.fit(problem.samples, problem.targets).coef_.T


def cyanure(solver: str, problem: Problem, iterations: int) -> np.ndarray:
    """J. Mairal's toolbox, C++ for problems of this kind alone."""
    model = Classifier(
        loss="logistic" if problem.kind == "logistic" else "multiclass-logistic",
        penalty="l2",
        lambda_1=problem.weight_decay,
        solver=solver,
        fit_intercept=False,
        tol=0.0,
        max_iter=iterations,
        n_threads=1,
        verbose=False,
    )
    model.fit(problem.samples, problem.targets)
    return np.reshape(model.get_weights(), (problem.samples.shape[1], problem.classes))


def others() -> dict[str, Fit]:
    """All but ours."""
    found = {f"scikit-learn, {name}": partial(scikit_learn, name) for name in SCIKIT_LEARN}
    if Classifier is not None:
        found.update({f"Cyanure, {name}": partial(cyanure, name) for name in CYANURE})
    return found


# ---- Measuring -------------------------------------------------------------------------------------------------------


def time_asgd(problem: Problem, rate: float | None, smallest: float) -> Times:
    """The recipe with a learning rate, or with LipschitzSearch: the seconds to each target, of one fit."""
    found, excess = [], np.inf
    begin = time.process_time()
    passes = Training(problem, "reshuffle", THETA, rate).passes()
    spent = time.process_time() - begin
    while len(found) < len(TARGETS) and spent < MOST_SECONDS:
        begin = time.process_time()
        weights = next(passes)
        spent += time.process_time() - begin
        excess = problem.objective(weights)[0] - smallest
        found += [spent for target in TARGETS[len(found) :] if excess <= target]
    return [*found, *[np.inf] * (len(TARGETS) - len(found))]


def time_fit(fit: Fit, problem: Problem, iterations: int, smallest: float) -> tuple[float, float]:
    """The seconds of a fit from the start, and how far above the smallest loss it ends."""
    begin = time.process_time()
    weights = fit(problem, iterations)
    return time.process_time() - begin, problem.objective(weights)[0] - smallest


def time_other(fit: Fit, problem: Problem, smallest: float) -> Times:
    """The seconds to each target, of a fit of the fewest iterations that reach it, to within a tenth."""
    tried = {1: time_fit(fit, problem, 1, smallest)}
    seconds = []
    for target in TARGETS:
        while True:
            below = [count for count, (_, excess) in tried.items() if not excess <= target]
            high = min((count for count in tried if count not in below), default=None)
            low = max((count for count in below if high is None or count < high), default=0)
            if high is None and tried[low][0] > MOST_SECONDS:
                seconds.append(np.inf)
                break
            if high is not None and high - low <= max(1, high // 10):
                seconds.append(tried[high][0])
                break
            count = next_count({count: tried[count][1] for count in sorted(tried)}, low, high, target)
            tried[count] = time_fit(fit, problem, count, smallest)
    return seconds


def next_count(excess: dict[int, float], low: int, high: int | None, target: float) -> int:
    """Where a target lies between two numbers of iterations or beyond, as if each iteration left the same fraction."""
    first, last = (low, high) if high is not None else ([0, *(count for count in excess if count < low)][-1], low)
    logs = np.log([max(excess.get(count, np.inf), 1e-16) for count in (first, last)])
    guess = np.inf
    if np.isfinite(logs).all() and logs[0] > logs[1]:
        guess = 1.02 * (first + (last - first) * (logs[0] - np.log(target)) / (logs[0] - logs[1]))
    if high is None:
        return int(min(max(guess, 1.1 * low + 1), 2 * low))
    margin = (high - low + 7) // 8
    return int(min(max(guess, low + margin), high - margin)) if guess < np.inf else (low + high) // 2


def median(run: Callable[[], Times]) -> Times:
    """Of several runs where one is short."""
    runs = [run()]
    while runs[0][-1] < SHORT and len(runs) < REPEATS:
        runs.append(run())
    return np.median(runs, axis=0).tolist()


def duration(seconds: float) -> str:
    """Two digits."""
    if seconds == np.inf:
        return "-"
    return f"{seconds * 1e3:.2g} ms" if seconds < 0.0995 else f"{seconds:.2g} s"


def contests() -> list[Contest]:
    """The learning rates are the best of some powers of 2."""
    cancer, digits = convex_problems()[0], convex_problems()[1]
    return [
        Contest(cancer._replace(batch_size=64), 8),
        Contest(digits, 16),
        Contest(digits._replace(weight_decay=5e-4), 16),
        Contest(Problem("synthetic", *synthetic(50000, 200, 5), "softmax", 512, 1e-4, 0), 4),
    ]


def table(contest: Contest, markdown: bool) -> None:
    """Time all on one problem, and print each as soon as it is done."""
    problem = contest.problem
    smallest = smallest_of_large(problem) if len(problem.samples) > 10_000 else problem.minimum()
    rate = contest.rate / problem.lipschitz(problem.sampler("reshuffle", 0))
    runs: dict[str, Callable[[], Times]] = {
        f"ASGD, learning rate {rate:.2g}": partial(time_asgd, problem, rate, smallest),
        "ASGD, LipschitzSearch": partial(time_asgd, problem, None, smallest),
        **{name: partial(time_other, fit, problem, smallest) for name, fit in others().items()},
    }
    rows, features = problem.samples.shape
    title = f"{problem.name}, {rows:,} x {features - 1}, decay {problem.weight_decay:g}, n = {problem.n}"
    line = "| {:46} | {:>8} | {:>8} | {:>8} |" if markdown else "{:46} {:>10} {:>10} {:>10}"
    print("\n" + line.format(title, *(f"{target:.0e}" for target in TARGETS)))
    if markdown:
        print("|---|---|---|---|")
    for name, run in runs.items():
        print(line.format(name, *map(duration, median(run))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.solvers", description="Times whole problems beside scikit-learn.")
    parser.add_argument("--problems", type=int, nargs="+", help="only these, by number")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    options = parser.parse_args()
    every = contests()
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that so many iterations have not converged
        for number in options.problems or range(len(every)):
            table(every[number], options.markdown)


if __name__ == "__main__":
    main()
