"""Fits a logistic regression with ASGD and with SGD, and measures how far each ends above the smallest possible loss.

    python examples/converge_exactly.py

On a convex problem a constant step size takes ASGD to the minimum itself, while SGD stays above it by an amount that
grows with the step size. The data are scikit-learn's 569 breast cancer samples.
"""

from __future__ import annotations

import argparse
import math
import zlib  # noqa: F401  Paddle 2.6 brings a zlib of its own, which breaks Python's unless that is loaded first
from pathlib import Path

import numpy as np
import paddle
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from paddle_asgd import ASGD

BATCH_SIZE = 16
WEIGHT_DECAY = 0.01


def load_batches() -> tuple[np.ndarray, np.ndarray]:
    """Samples and their labels, -1 or 1, shuffled once and cut to whole batches."""
    samples, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(samples))[: len(samples) // BATCH_SIZE * BATCH_SIZE]
    samples = StandardScaler().fit_transform(samples[order])
    constant = np.ones((len(samples), 1))
    return np.hstack([samples, constant]), 2.0 * labels[order] - 1


def total_loss(weights: np.ndarray, samples: np.ndarray, labels: np.ndarray) -> float:
    """What is minimised: the mean logistic loss, and half of the weight decay times the squared weights."""
    return np.logaddexp(0, -labels * (samples @ weights)).mean() + WEIGHT_DECAY / 2 * (weights @ weights)


def solve(samples: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The smallest possible loss, by Newton's method, and the largest curvature there."""
    strength = 1 / (WEIGHT_DECAY * len(samples))
    model = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cholesky", tol=1e-12)
    weights = model.fit(samples, labels).coef_[0]
    p = 1 / (1 + np.exp(-samples @ weights))
    hessian = (samples.T * (p * (1 - p))) @ samples / len(samples)
    return total_loss(weights, samples, labels), np.linalg.eigvalsh(hessian).max() + WEIGHT_DECAY


def train(kind: type, samples: np.ndarray, labels: np.ndarray, epochs: int, **options: float) -> np.ndarray:
    """The loss before the first epoch and after each; the options are the optimizer's."""
    weights = paddle.create_parameter(
        [samples.shape[1]], "float64", default_initializer=paddle.nn.initializer.Constant(0.0)
    )
    optimizer = kind(parameters=[weights], weight_decay=WEIGHT_DECAY, **options)
    batches = [
        (paddle.to_tensor(samples[i : i + BATCH_SIZE]), paddle.to_tensor(labels[i : i + BATCH_SIZE]))
        for i in range(0, len(samples), BATCH_SIZE)
    ]
    losses = [total_loss(weights.numpy(), samples, labels)]
    for _ in range(epochs):
        for x, y in batches:
            # Without the squared weights, which the optimizers add as weight decay.
            loss = paddle.nn.functional.softplus(-y * paddle.mv(x, weights)).mean()
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
        losses.append(total_loss(weights.numpy(), samples, labels))
    return np.array(losses)


def draw(excess: dict[str, np.ndarray], output: Path) -> None:
    """The distance to the smallest loss over the epochs, in powers of ten."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (label, values), style in zip(excess.items(), ("-", "--", "-.", ":")):
        # What is smaller than 1e-16 is rounding, and may be negative.
        axes.semilogy(np.maximum(values, 1e-16), style, linewidth=2, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss above the smallest possible")
    axes.set_title(f"Logistic regression in float64, batches of {BATCH_SIZE} in a fixed order")
    axes.set_xlim(0, len(values) - 1)
    axes.grid(True, which="major", alpha=0.4)
    axes.legend()
    figure.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a logistic regression with ASGD and with SGD.")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("converge_exactly.png"), help="picture of the losses")
    arguments = parser.parse_args()
    samples, labels = load_batches()
    n = len(samples) // BATCH_SIZE
    smallest, curvature = solve(samples, labels)

    # The bound on the step size, learning_rate * n * curvature < pi^2 / 2, can be computed here, since the problem has
    # been solved already. Close to it convergence is slow, and beyond it the loss grows; half of it is a good choice.
    learning_rate = 0.5 * math.pi**2 / 2 / (n * curvature)
    losses = {
        f"ASGD, learning rate {learning_rate:.2g}": train(
            ASGD, samples, labels, arguments.epochs, learning_rate=learning_rate, batch_num=n
        )
    }
    for learning_rate in (1.0, 0.1, 0.01):
        losses[f"SGD, learning rate {learning_rate:.2g}"] = train(
            paddle.optimizer.SGD, samples, labels, arguments.epochs, learning_rate=learning_rate
        )

    excess = {label: values - smallest for label, values in losses.items()}
    draw(excess, arguments.output)
    print(f"Loss above the smallest possible after {arguments.epochs} epochs:")
    for label, values in excess.items():
        print(f"  {label:24} {values[-1]:8.1e}")
    print(f"Drawn to {arguments.output}")


if __name__ == "__main__":
    main()
