# SPDX-License-Identifier: Apache-2.0
"""Fits a logistic regression with ASGD, SGD, Momentum and Adam, and measures how far above the smallest loss each ends.

    python examples/converge_exactly.py

Each optimizer may choose the best of several learning rates. On a problem like this one ASGD goes to the minimum itself
with a constant learning rate; the others stay above it. The data are scikit-learn's 569 breast cancer samples.
"""

from __future__ import annotations

import argparse
import zlib  # noqa: F401  Paddle 2.6 brings a zlib of its own, which breaks Python's unless that is loaded first
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from paddle_asgd import ASGD, FixedBatchSampler

BATCH_SIZE = 16
WEIGHT_DECAY = 0.01
THETA = 0.3  # how much of a gradient's change enters a step at once: see docs/learning-rate.md
SHOWN = (10, 25)  # epochs in the table

# Powers of 2 that are tried as learning rates, in units of 1 / L, the inverse of the largest curvature that the loss of
# one batch can have. The best lies inside of each range.
POWERS = {"ASGD": range(1, 5), "SGD": range(-2, 2), "Momentum": range(-5, -1), "Adam": range(-6, -2)}


class Run(NamedTuple):
    """One optimizer with one learning rate, and the loss before the first epoch and after each."""

    name: str
    learning_rate: float
    weights: paddle.Tensor
    optimizer: paddle.optimizer.Optimizer
    losses: list[float]


def load_samples() -> tuple[np.ndarray, np.ndarray]:
    """Standardised samples with a constant feature, and their labels, -1 or 1, cut to whole batches."""
    samples, labels = load_breast_cancer(return_X_y=True)
    whole = len(samples) // BATCH_SIZE * BATCH_SIZE
    order = np.random.default_rng(0).permutation(len(samples))[:whole]
    samples = StandardScaler().fit_transform(samples[order])
    return np.hstack([samples, np.ones((whole, 1))]), 2.0 * labels[order] - 1


def total_loss(weights: np.ndarray, samples: np.ndarray, labels: np.ndarray) -> float:
    """What is minimised: the mean logistic loss, and half of the weight decay times the squared weights."""
    return np.logaddexp(0, -labels * (samples @ weights)).mean() + WEIGHT_DECAY / 2 * (weights @ weights)


def smallest_loss(samples: np.ndarray, labels: np.ndarray) -> float:
    """By Newton's method."""
    strength = 1 / (WEIGHT_DECAY * len(samples))
    model = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cholesky", tol=1e-14)
    return total_loss(model.fit(samples, labels).coef_[0], samples, labels)


def largest_curvature(samples: np.ndarray, batches: list[list[int]]) -> float:
    """L: a logistic loss has at most a quarter of the curvature of the squared one."""
    return max(np.linalg.norm(samples[batch], 2) ** 2 / len(batch) for batch in batches) / 4 + WEIGHT_DECAY


def make_run(name: str, learning_rate: float, features: int, batch_num: int) -> Run:
    """An optimizer with weights of its own, which start at 0."""
    weights = paddle.create_parameter([features], "float64", default_initializer=paddle.nn.initializer.Constant(0.0))
    make: Any = {
        "ASGD": partial(ASGD, batch_num=batch_num, theta=THETA),
        "SGD": paddle.optimizer.SGD,
        "Momentum": paddle.optimizer.Momentum,
        "Adam": paddle.optimizer.Adam,
    }[name]
    optimizer = make(learning_rate=learning_rate, parameters=[weights], weight_decay=WEIGHT_DECAY)
    return Run(name, learning_rate, weights, optimizer, [])


def train(samples: np.ndarray, labels: np.ndarray, epochs: int) -> list[Run]:
    """Train all optimizers with all their learning rates side by side, on the same batches in the same order."""
    # The samples are dealt to the batches once. In every epoch the batches come in another order.
    sampler = FixedBatchSampler(samples, BATCH_SIZE, order="reshuffle", seed=0)
    unit = 1 / largest_curvature(samples, sampler.batches)
    runs = [
        make_run(name, 2.0**power * unit, samples.shape[1], sampler.batch_num)
        for name, powers in POWERS.items()
        for power in powers
    ]
    batches = [(paddle.to_tensor(samples[batch]), paddle.to_tensor(labels[batch])) for batch in sampler.batches]
    for epoch in tqdm(range(epochs + 1), desc=f"{len(runs)} runs", unit="epoch"):
        for run in runs:
            run.losses.append(total_loss(run.weights.numpy(), samples, labels))
        for batch_index in sampler.epoch_order(epoch):
            x, y = batches[batch_index]
            # The gradient of the sum with respect to one run's weights is that of its own loss. The squared weights
            # are missing here, because the optimizers add them as weight decay.
            scores = paddle.matmul(x, paddle.stack([run.weights for run in runs], axis=1))
            paddle.nn.functional.softplus(-y.unsqueeze(1) * scores).mean(axis=0).sum().backward()
            for run in runs:
                if isinstance(run.optimizer, ASGD):
                    run.optimizer.batch_index = batch_index
                run.optimizer.step()
                run.optimizer.clear_grad()
    return runs


def draw(best: dict[str, np.ndarray], output: Path) -> None:
    """The distance to the smallest loss over the epochs, in powers of ten."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (label, values), style in zip(best.items(), ("-", "--", "-.", ":")):
        # What is smaller than 1e-16 is rounding, and may be negative.
        axes.semilogy(np.maximum(values, 1e-16), style, linewidth=2, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss above the smallest possible")
    axes.set_title("Logistic regression on the breast cancer data, each at its best learning rate")
    axes.set_xlim(0, len(values) - 1)
    axes.grid(True, which="major", alpha=0.4)
    axes.legend()
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a logistic regression with ASGD, SGD, Momentum and Adam.")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("converge_exactly.png"), help="picture of the losses")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs: received {arguments.epochs}, expected at least 1")
    if not arguments.output.parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")
    samples, labels = load_samples()
    smallest = smallest_loss(samples, labels)
    runs = train(samples, labels, arguments.epochs)

    shown = [epoch for epoch in SHOWN if epoch < arguments.epochs] + [arguments.epochs]
    print("Loss above the smallest possible, each optimizer with the learning rate that ends lowest:")
    print(f"  {'':9} {'learning rate':>13}" + "".join(f"  epoch {epoch:>3}" for epoch in shown))
    best = {}
    for name in POWERS:
        # A run that diverged may end as nan.
        run = min((run for run in runs if run.name == name), key=lambda run: np.nan_to_num(run.losses[-1], nan=np.inf))
        excess = np.array(run.losses) - smallest
        best[f"{name}, learning rate {run.learning_rate:.2g}"] = excess
        print(f"  {name:9} {run.learning_rate:13.2g}" + "".join(f"  {excess[epoch]:9.1e}" for epoch in shown))
    draw(best, arguments.output)
    print(f"Drawn to {arguments.output}")


if __name__ == "__main__":
    main()
