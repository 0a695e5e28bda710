# SPDX-License-Identifier: Apache-2.0
"""On real data: how close to the minimum each order of the batches gets, and who is warned that slots do not match.

Losses and gradients are NumPy's, to be quick, and the minima scikit-learn's. Must not know the formula of a step.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from paddle_asgd import ASGD, FixedBatchSampler, SlotMismatchWarning

WEIGHT_DECAY = 0.01


class Problem:
    """Logistic regression on standardised samples with a constant 1 at their end; one column of weights, or a class."""

    def __init__(self, load: Callable[..., Any], count: int) -> None:
        samples, labels = load(return_X_y=True)
        chosen = np.random.default_rng(0).permutation(len(samples))[:count]
        samples = StandardScaler().fit_transform(samples)[chosen]
        self.samples, self.labels = np.hstack([samples, np.ones((count, 1))]), labels[chosen]
        strength = 1 / (WEIGHT_DECAY * count)
        model = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cholesky", tol=1e-12)
        self.solution = model.fit(self.samples, self.labels).coef_.T
        self.smallest = self.loss(self.solution)

    def loss(self, weights: np.ndarray) -> float:
        scores = self.samples @ weights
        if scores.shape[1] == 1:
            losses = -log_expit((2 * self.labels - 1) * scores[:, 0])
        else:
            losses = -log_softmax(scores, axis=1)[np.arange(len(scores)), self.labels]
        return losses.mean() + WEIGHT_DECAY / 2 * (weights**2).sum()

    def gradient(self, weights: np.ndarray, rows: np.ndarray, noise: float = 0.0) -> np.ndarray:
        """Of the mean loss of these samples, without the weight decay."""
        samples = self.samples[rows]
        samples[:, :-1] += noise * np.random.standard_normal(samples[:, :-1].shape)
        scores = samples @ weights
        if scores.shape[1] == 1:
            errors = expit(scores) - self.labels[rows, np.newaxis]
        else:
            errors = softmax(scores, axis=1) - np.eye(scores.shape[1])[self.labels[rows]]
        return samples.T @ errors / len(rows)

    def lipschitz(self, batches: list[list[int]]) -> float:
        """The largest bound on the curvature of a batch."""
        largest = max(np.linalg.norm(self.samples[rows], 2) ** 2 / len(rows) for rows in batches)
        return largest * (0.25 if self.solution.shape[1] == 1 else 0.5)


class Training:
    """ASGD on a problem, in passes; ``step`` is the learning rate in units of one over the Lipschitz constant."""

    def __init__(self, problem: Problem, size: int, step: float, order: str | None, noise: float = 0.0, **options: Any):
        rows = list(range(len(problem.samples)))
        self.sampler = FixedBatchSampler(rows, size, order or "replacement", seed=0)
        if order is None:  # all samples are dealt anew in every pass, and nobody knows which batch it is
            self.loader = paddle.io.DataLoader(rows, batch_size=size, shuffle=True)
        else:
            self.loader = paddle.io.DataLoader(rows, batch_sampler=self.sampler)
        self.problem, self.order, self.noise = problem, order, noise
        zeros = paddle.nn.initializer.Constant(0.0)
        self.weights = paddle.create_parameter(problem.solution.shape, "float64", default_initializer=zeros)
        self.optimizer = ASGD(
            step / problem.lipschitz(self.sampler.batches),
            **{"batch_num": len(self.loader), **options},
            parameters=[self.weights],
            weight_decay=WEIGHT_DECAY,
        )

    def one_pass(self, with_index: bool = True) -> None:
        for index, rows in enumerate(self.loader) if self.order is None else self.sampler.enumerate(self.loader):
            gradient = self.problem.gradient(self.weights.numpy(), rows.numpy(), self.noise)
            self.weights.grad = paddle.to_tensor(gradient)
            if self.order is not None and with_index:
                self.optimizer.batch_index = index
            self.optimizer.step()

    def passes(self, count: int, with_index: bool = True) -> None:
        for _ in range(count):
            self.one_pass(with_index)

    def excess(self) -> float:
        return self.problem.loss(self.weights.numpy()) - self.problem.smallest


@pytest.fixture(scope="module")
def breast_cancer() -> Problem:
    """Without the last 9 samples: whole batches of 16."""
    return Problem(load_breast_cancer, 560)


@pytest.fixture(scope="module")
def digits() -> Problem:
    """Whole batches of 64."""
    return Problem(load_digits, 1792)


# The learning rate is the best of the powers of 2. Every warning is an error: nobody here may be warned.
@pytest.mark.parametrize(
    ("problem", "size", "order", "step", "bar"),
    [
        ("breast_cancer", 16, "replacement", 8, 1e-11),
        ("breast_cancer", 16, "reshuffle", 4, 1e-9),
        ("breast_cancer", 16, "sequential", 4, 1e-9),
        ("breast_cancer", 1, "replacement", 4, 1e-12),
        ("digits", 64, "replacement", 8, 1e-6),
    ],
)
def test_fifty_passes(
    problem: str, size: int, order: str, step: float, bar: float, request: pytest.FixtureRequest
) -> None:
    training = Training(request.getfixturevalue(problem), size, step, order)
    training.passes(50)
    assert training.excess() <= bar
    assert training.optimizer.variance_ratio < 0.01


@pytest.mark.parametrize("step", [0.25, 0.5, 1, 2, 4])
def test_shuffled_samples(breast_cancer: Problem, step: float) -> None:
    """The best that a shuffling loader can do is what SGD does, and who uses one is told so, once."""
    training = Training(breast_cancer, 16, step, None)
    with pytest.warns(SlotMismatchWarning, match="batch_num=35") as warned:
        training.passes(14)
    training.passes(36)  # in which a second warning would be an error
    assert len(warned) == 1
    assert training.excess() > 1e-6
    assert training.optimizer.variance_ratio > 1.3


@pytest.mark.parametrize("batch_num", [34, 36])
def test_batch_num_off_by_one(breast_cancer: Problem, batch_num: int) -> None:
    training = Training(breast_cancer, 16, 1, "sequential", batch_num=batch_num)
    with pytest.warns(SlotMismatchWarning, match=f"batch_num={batch_num}"):
        training.passes(12, with_index=False)


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("order", ["replacement", "reshuffle", "sequential"])
def test_noise_is_no_mismatch(breast_cancer: Problem, order: str, step: float) -> None:
    """Samples that differ by 30 % at every visit: the stored gradients still tell something. A warning is an error."""
    training = Training(breast_cancer, 16, step, order, noise=0.3)
    training.passes(50)
    assert 0.2 < training.optimizer.variance_ratio < 0.9


def until_gradient_is_small(training: Training, tolerance: float, most: int) -> None:
    for _ in range(most):
        training.one_pass()
        if training.optimizer.gradient_norm() < tolerance:
            return
    pytest.fail(f"after {most} passes gradient_norm() is {training.optimizer.gradient_norm():.1e}")


def test_short_last_batch() -> None:
    """569 samples in batches of 16: the 9 of the last one weigh what 9 samples weigh, if batch_weights says so."""
    problem = Problem(load_breast_cancer, 569)
    errors = []
    for weighted in (True, False):
        training = Training(problem, 16, 8, "replacement")
        if weighted:
            training = Training(problem, 16, 8, "replacement", batch_weights=training.sampler.batch_weights)
        until_gradient_is_small(training, 1e-10, 300)
        errors.append(abs(training.weights.numpy() - problem.solution).max())
    # Within gradient_norm() over the weight decay, and some: both gradients are those of slightly different points.
    assert errors[0] < 1e-7
    assert errors[1] > 1e-6


def test_gradient_norm_tells_the_gradient(breast_cancer: Problem) -> None:
    """It becomes the gradient of the whole objective as the steps become small."""
    training = Training(breast_cancer, 16, 4, "sequential")
    until_gradient_is_small(training, 1e-6, 100)
    weights = training.weights.numpy()
    gradient = breast_cancer.gradient(weights, np.arange(560)) + WEIGHT_DECAY * weights
    assert np.linalg.norm(gradient) == pytest.approx(training.optimizer.gradient_norm(), rel=0.2)
