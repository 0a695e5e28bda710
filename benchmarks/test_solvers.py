# SPDX-License-Identifier: Apache-2.0
"""benchmarks/solvers.py: how the fewest iterations that reach a target are found. Must not time anything."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest

from . import solvers

#: What is left after so many iterations.
COURSES: dict[str, Callable[[int], float]] = {
    "linear": lambda count: 0.5 * 0.75**count,
    "quadratic": lambda count: 0.1**2 ** (count - 1),
    "in stairs": lambda count: 0.5 * 0.6 ** (count // 5 * 5),
    "nan at first": lambda count: np.nan if count < 5 else 1e-9,
    "below the minimum": lambda count: 1.0 if count < 40 else -1e-16,
}


@pytest.mark.parametrize("course", COURSES)
def test_fewest_iterations_to_within_a_tenth(monkeypatch: pytest.MonkeyPatch, course: str) -> None:
    """Counted as a second each, and with few fits, because each of them is a whole one."""
    left, fits = COURSES[course], []

    def time_fit(fit: Any, problem: Any, iterations: int, smallest: float) -> tuple[float, float]:
        fits.append(iterations)
        return float(iterations), left(iterations) - smallest

    monkeypatch.setattr(solvers, "time_fit", time_fit)
    monkeypatch.setattr(solvers, "MOST_SECONDS", 1000.0)
    found = solvers.time_other(lambda problem, iterations: np.zeros(1), None, 0.0)
    fewest = [next(count for count in range(1, 100) if left(count) <= target) for target in solvers.TARGETS]
    for seconds, count in zip(found, fewest):
        assert count <= seconds <= count + max(1, count // 9)
    assert len(fits) == len(set(fits)) <= 16


def test_a_solver_that_does_not_get_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is given up once a fit has taken too long, and keeps the targets that it reached."""
    fits = []

    def time_fit(fit: Any, problem: Any, iterations: int, smallest: float) -> tuple[float, float]:
        fits.append(iterations)
        return float(iterations), max(10.0**-iterations, 1e-5)

    monkeypatch.setattr(solvers, "time_fit", time_fit)
    assert solvers.time_other(lambda problem, iterations: np.zeros(1), None, 0.0) == [4.0, np.inf, np.inf]
    assert max(fits) <= 2 * solvers.MOST_SECONDS
