# SPDX-License-Identifier: Apache-2.0
"""Convex problems on which a theta is chosen (recipe.py, untuned.py): data, batches, losses, gradients and minima.

Must not know a method, nor how results are printed.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import numpy as np
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

from paddle_asgd import FixedBatchSampler


class Problem(NamedTuple):
    """A mean loss over samples, the last feature of which is the constant 1, and half the decay times the squares.

    ``classes`` is the number of scores of a sample: 1 for squares, and for the logistic loss of two classes.
    """

    name: str
    samples: np.ndarray
    targets: np.ndarray  # numbers for squares, -1 and 1 for the logistic loss, else classes
    kind: str  # "ridge", "logistic" or "softmax"
    batch_size: int
    weight_decay: float
    passes: int

    @property
    def classes(self) -> int:
        return int(self.targets.max()) + 1 if self.kind == "softmax" else 1

    @property
    def n(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def sampler(self, order: str, seed: int) -> FixedBatchSampler:
        return FixedBatchSampler(self.samples, self.batch_size, order=order, seed=seed)

    def lipschitz(self, sampler: FixedBatchSampler) -> float:
        """The largest of all batches' bounds on the curvature, with the decay."""
        squares = max(np.linalg.norm(self.samples[batch], 2) ** 2 / len(batch) for batch in sampler.batches)
        return squares * {"ridge": 1.0, "logistic": 0.25, "softmax": 0.5}[self.kind] + self.weight_decay

    def slopes(self, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The derivatives of each sample's loss by its scores, of shape [samples, columns, classes]."""
        if self.kind == "ridge":
            return scores - targets[:, None, None]
        if self.kind == "logistic":
            signs = targets[:, None, None]
            return -signs / (1 + np.exp(signs * scores))
        p = np.exp(scores - scores.max(axis=2, keepdims=True))
        p /= p.sum(axis=2, keepdims=True)
        p[np.arange(len(targets)), :, targets] -= 1
        return p

    def gradients(self, batch: list[int] | slice, x: np.ndarray) -> np.ndarray:
        """Of the mean loss of these samples without the decay; x has the shape [features, columns * classes]."""
        rows, targets = self.samples[batch], self.targets[batch]
        slopes = self.slopes((rows @ x).reshape(len(rows), -1, self.classes), targets)
        return rows.T @ slopes.reshape(len(rows), -1) / len(rows)

    def losses(self, batch: list[int] | slice, x: np.ndarray) -> np.ndarray:
        """The mean loss of these samples for each column, without the decay."""
        rows, targets = self.samples[batch], self.targets[batch]
        scores = (rows @ x).reshape(len(rows), -1, self.classes)
        if self.kind == "ridge":
            return np.square(scores[:, :, 0] - targets[:, None]).mean(axis=0) / 2
        if self.kind == "logistic":
            return np.logaddexp(0, -targets[:, None] * scores[:, :, 0]).mean(axis=0)
        largest = scores.max(axis=2)
        own = scores[np.arange(len(targets)), :, targets]
        return (np.log(np.exp(scores - largest[:, :, None]).sum(axis=2)) + largest - own).mean(axis=0)

    def objective(self, x: np.ndarray) -> np.ndarray:
        """What is minimised, for each column."""
        squares = np.square(x).reshape(len(x), -1, self.classes).sum(axis=(0, 2))
        return self.losses(slice(None), x) + self.weight_decay / 2 * squares

    def minimum(self) -> float:
        """The smallest objective, by Newton's method."""
        features, classes = self.samples.shape[1], self.classes
        x = np.zeros((features, classes))
        for _ in range(50):
            gradient = self.gradients(slice(None), x) + self.weight_decay * x
            step = np.linalg.solve(self._hessian(x), gradient.T.ravel()).reshape(classes, features).T
            scale = 1.0
            while scale > 1e-6 and self.objective(x - scale * step)[0] > self.objective(x)[0]:
                scale /= 2
            x = x - scale * step
            if np.abs(gradient).max() < 1e-14:
                break
        return float(self.objective(x)[0])

    def _hessian(self, x: np.ndarray) -> np.ndarray:
        """At x of one column, for parameters of one class after another."""
        features, classes, count = *x.shape, len(self.samples)
        scores, blocks = self.samples @ x, np.zeros((classes, features, classes, features))
        if self.kind == "ridge":
            curvatures = np.ones((count, 1, 1))
        elif self.kind == "logistic":
            p = 1 / (1 + np.exp(-scores))
            curvatures = (p * (1 - p))[:, :, None]
        else:
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            curvatures = p[:, :, None] * (np.eye(classes) - p[:, None, :])
        for k in range(classes):
            for j in range(k + 1):
                block = (self.samples.T * curvatures[:, k, j]) @ self.samples / count
                blocks[k, :, j], blocks[j, :, k] = block, block
        hessian = blocks.reshape(classes * features, -1)
        return hessian + self.weight_decay * np.eye(len(hessian))


def standardised(samples: np.ndarray) -> np.ndarray:
    """With the constant 1 as the last feature."""
    return np.hstack([StandardScaler().fit_transform(samples), np.ones((len(samples), 1))])


def binary(load: Callable) -> tuple[np.ndarray, np.ndarray]:
    samples, labels = load(return_X_y=True)
    return standardised(samples), 2.0 * (labels % 2) - 1


def several(load: Callable) -> tuple[np.ndarray, np.ndarray]:
    samples, labels = load(return_X_y=True)
    return standardised(samples), labels


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Digits from 0 to 1: standardised, pixels that are nearly always 0 would decide the Lipschitz constant."""
    samples, labels = datasets.load_digits(return_X_y=True)
    return np.hstack([samples / 16, np.ones((len(samples), 1))]), labels


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    samples, targets = datasets.load_diabetes(return_X_y=True)
    return standardised(samples), (targets - targets.mean()) / targets.std()


def probe() -> tuple[np.ndarray, np.ndarray]:
    """Digits behind a frozen layer of 96 random ReLU units: what a linear probe is trained on."""
    samples, labels = datasets.load_digits(return_X_y=True)
    draw = np.random.default_rng(0)
    hidden = np.maximum(samples / 16 @ draw.normal(size=(64, 96)) + draw.normal(size=96), 0)
    return standardised(hidden), labels


def synthetic(rows: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian features; labels that follow them with noise, or numbers for one class."""
    draw = np.random.default_rng(1)
    samples = np.hstack([draw.normal(size=(rows, features)), np.ones((rows, 1))])
    scores = samples @ draw.normal(size=(features + 1, classes)) / np.sqrt(features) + draw.normal(size=(rows, classes))
    return samples, scores[:, 0] if classes == 1 else scores.argmax(axis=1)


def convex_problems() -> list[Problem]:
    """Twelve, with n from 10 to 1,500; the five of the first tables come first."""
    cancer, digits = binary(datasets.load_breast_cancer), pixels()
    return [
        Problem("breast cancer", *cancer, "logistic", 16, 0.01, 40),
        Problem("digits", *digits, "softmax", 64, 0.01, 40),
        Problem("digits", *digits, "softmax", 16, 5e-4, 60),
        Problem("wine", *several(datasets.load_wine), "softmax", 4, 0.005, 60),
        Problem("synthetic", *synthetic(8000, 60, 3), "softmax", 32, 1e-4, 25),
        Problem("breast cancer", *cancer, "logistic", 57, 0.01, 60),
        Problem("breast cancer", *cancer, "logistic", 1, 0.01, 40),
        Problem("iris", *several(datasets.load_iris), "softmax", 5, 1e-3, 60),
        Problem("diabetes", *diabetes(), "ridge", 16, 0.01, 60),
        Problem("diabetes", *diabetes(), "ridge", 1, 0.1, 40),
        Problem("linear probe", *probe(), "softmax", 45, 1e-3, 60),
        Problem("synthetic", *synthetic(12000, 40, 1), "ridge", 8, 1e-3, 25),
    ]
