# SPDX-License-Identifier: Apache-2.0
"""The recipe: fixed batches, reshuffled, theta = 0.3, and SGD's learning rate or a search for one.

Must not hold the evidence for it (benchmarks/recipe.py), nor test the search's rule (test_lipschitz.py) or the limits
that an order sets (test_order.py).
"""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.preprocessing import StandardScaler

from paddle_asgd import ASGD, FixedBatchSampler, LipschitzSearch

THETA = 0.3
stability = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "examples" / "stability.py")))


def features(load: Any) -> tuple[np.ndarray, np.ndarray]:
    samples, targets = load(return_X_y=True)
    return np.hstack([StandardScaler().fit_transform(samples), np.ones((len(samples), 1))]), targets


# ---- How large a learning rate may be --------------------------------------------------------------------------------


def test_stability_example_computes_what_the_optimizer_does() -> None:
    """Several learning rates and thetas side by side, with weights, decay and batches in any order."""
    draw, n, weights = np.random.default_rng(2), 4, [0.5, 1.5, 1.25, 0.75]
    rates, thetas = np.array([0.1, 0.3, 0.2]), np.array([np.nan, 0.3, 1.0])
    start, slopes, shifts = draw.normal(size=(5, 3)), draw.uniform(0.5, 1, n), draw.normal(size=(n, 5, 3))
    columns = stability.Columns(start, n, rates, thetas, 0.05, weights)
    params = [paddle.to_tensor(start[:, c], stop_gradient=False) for c in range(3)]
    optimizers = [
        ASGD(rate, n, [param], 0.05, batch_weights=weights, theta=None if np.isnan(theta) else theta)
        for rate, theta, param in zip(rates, thetas, params)
    ]
    for i in draw.integers(n, size=5 * n):
        columns.step(i, slopes[i] * columns.x - shifts[i])
        for c, (optimizer, param) in enumerate(zip(optimizers, params)):
            (slopes[i] / 2 * param * param - paddle.to_tensor(shifts[i][:, c]) * param).sum().backward()
            optimizer.batch_index = int(i)
            optimizer.step()
            optimizer.clear_grad()
        np.testing.assert_allclose(columns.x, np.stack([p.numpy() for p in params], axis=1), rtol=0, atol=1e-13)


def test_largest_stable_learning_rate() -> None:
    """Times the largest curvature. Without theta it is about 5 / n; SGD's is 2 at most."""
    samples = features(load_breast_cancer)[0]
    batches = samples[np.random.default_rng(0).permutation(560)].reshape(35, 16, -1)
    without, recommended = stability.largest_stable(batches, "reshuffle", [None, THETA])
    assert without < 0.25
    assert recommended >= 1.1


# ---- No learning rate at all -----------------------------------------------------------------------------------------


class Problem:
    """A data set in fixed batches, float64, with the loss of a batch and the minimum of the whole."""

    def __init__(self, kind: str) -> None:
        self.decay, self.is_ridge = 0.01, kind == "ridge"
        self.samples, targets = features(load_diabetes if self.is_ridge else load_breast_cancer)
        self.targets = (targets - targets.mean()) / targets.std() if self.is_ridge else 2.0 * targets - 1
        self.x, self.y = paddle.to_tensor(self.samples), paddle.to_tensor(self.targets)

    def loss(self, weights: Any, rows: Any = None) -> Any:
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        scores = paddle.mv(x, weights)
        return (scores - y).square().mean() / 2 if self.is_ridge else paddle.nn.functional.softplus(-y * scores).mean()

    def excess(self, weights: Any) -> float:
        """Above the smallest loss, as a fraction of what it is at 0."""
        smallest = self._objective(paddle.to_tensor(self._minimum()))
        return (self._objective(weights) - smallest) / (self._objective(paddle.zeros_like(weights)) - smallest)

    def _objective(self, weights: Any) -> float:
        return float(self.loss(weights) + self.decay / 2 * weights.square().sum())

    def _minimum(self) -> np.ndarray:
        """By Newton's method."""
        w = np.zeros(self.samples.shape[1])
        for _ in range(20):
            scores = self.samples @ w
            p = 1 / (1 + np.exp(self.targets * scores))
            slopes = scores - self.targets if self.is_ridge else -self.targets * p
            curvatures = np.ones_like(p) if self.is_ridge else p * (1 - p)
            hessian = (self.samples.T * curvatures) @ self.samples / len(p) + self.decay * np.eye(len(w))
            w = w - np.linalg.solve(hessian, self.samples.T @ slopes / len(p) + self.decay * w)
        return w


def search(problem: Problem, order: str | None, theta: Any, passes: int) -> float:
    """What is left after so many passes. No order: batches come in theirs, and nobody says which is which."""
    sampler = FixedBatchSampler(problem.samples, 16, order=order or "sequential", seed=0)
    weights = paddle.zeros([problem.samples.shape[1]], "float64")
    weights.stop_gradient = False
    batches = [paddle.to_tensor(batch) for batch in sampler.batches]
    optimizer = ASGD(*(1.0, len(batches), [weights], problem.decay), batch_weights=sampler.batch_weights, theta=theta)
    finder = LipschitzSearch(optimizer)
    for epoch in range(passes):
        for i in sampler.epoch_order(epoch):
            if order is not None:
                optimizer.batch_index = i
            finder.step(lambda i=i: problem.loss(weights, batches[i]))
    return problem.excess(weights.detach())


@pytest.mark.parametrize("order", ["reshuffle", "replacement"])
@pytest.mark.parametrize(("kind", "bar"), [("logistic", 1e-4), ("ridge", 1e-3)])
def test_untuned_search_converges(kind: str, bar: float, order: str) -> None:
    """After 30 passes, without a number to tune; measured: 2e-6 on the first, reshuffled."""
    assert search(Problem(kind), order, THETA, 30) < bar


@pytest.mark.parametrize("theta", [None, THETA])
def test_untuned_search_in_a_fixed_order_does_not_diverge(theta: float | None) -> None:
    """With factor=0.5 the loss grew 7e12-fold without theta."""
    assert search(Problem("ridge"), None, theta, 30) < 0.05


def test_search_warns_where_theta_is_needed() -> None:
    with pytest.warns(UserWarning, match=r"once in each of two passes with theta=None.*below 5\.4.*theta=0\.3"):
        search(Problem("ridge"), "reshuffle", None, 2)


def test_search_warns_where_the_order_is_always_the_same() -> None:
    with pytest.warns(UserWarning, match=r'same order in two passes with theta=0\.3.*13\.2.*order="reshuffle"'):
        search(Problem("ridge"), "sequential", THETA, 2)


@pytest.mark.parametrize(
    ("order", "theta"), [("reshuffle", THETA), ("reshuffle", lambda step: THETA), ("replacement", None)]
)
def test_search_does_not_warn_without_need(order: str, theta: float | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(Problem("ridge"), order, theta, 3)


@pytest.mark.parametrize(
    ("n", "theta", "index", "factor"),
    [
        (100, None, 0, 0.7),
        (100, 0.3, 0, 0.7),
        (19, 0.3, 0, 0.5),
        (100, 2.0, 0, 0.125),
        (100, lambda step: 0.3, 0, 0.7),
        (100, None, None, np.pi**2 / 400),
        (2, None, None, 0.5),
    ],
)
def test_factor_that_is_chosen(n: int, theta: Any, index: int | None, factor: float) -> None:
    """The learning rate times L, which is 1 in the first step."""
    param = paddle.to_tensor([1.0], dtype="float64", stop_gradient=False)
    optimizer = ASGD(7.0, n, [param], theta=theta)
    if index is not None:
        optimizer.batch_index = index
    LipschitzSearch(optimizer).step(lambda: (param * param).sum() / 2)
    assert optimizer.get_lr() == pytest.approx(factor, rel=1e-12)
