# SPDX-License-Identifier: Apache-2.0
"""Trains a linear layer on frozen features with ASGD, SGD, Momentum and Adam, and measures how near each gets.

    python examples/linear_probe.py

A small network learns scikit-learn's handwritten digits. What it computes below its last layer is kept in memory, and a
last layer is trained anew on that. This is a convex problem whose batches repeat exactly: the place in deep learning
where ASGD has an advantage. Each optimizer may choose the best of several learning rates.
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
from paddle import nn
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from paddle_asgd import ASGD, FixedBatchSampler

BATCH_SIZE = 32
WEIGHT_DECAY = 0.01
THETA = 0.3  # how much of a gradient's change enters a step at once: see docs/learning-rate.md
NETWORK_EPOCHS = 10

# Learning rates that are tried. The best lies inside of each range.
RATES = {
    "ASGD": (0.2, 0.4, 0.8, 1.6),
    "SGD": (0.01, 0.02, 0.05, 0.1, 0.2),
    "Momentum": (0.001, 0.002, 0.005, 0.01, 0.02),
    "Adam": (0.0005, 0.001, 0.002, 0.005, 0.01),
}


class Problem(NamedTuple):
    """Features and labels to train a linear layer on, in memory, and the smallest loss that there is."""

    features: paddle.Tensor
    labels: paddle.Tensor
    smallest: float


class Run(NamedTuple):
    """One optimizer with one learning rate: loss and gradient norm before the first epoch and after each."""

    name: str
    learning_rate: float
    losses: list[float]
    norms: list[float]


def compute_features() -> tuple[np.ndarray, np.ndarray]:
    """Train a network for some epochs, and return what its last layer sees of every digit, and the labels."""
    images, labels = load_digits(return_X_y=True)
    x, y = paddle.to_tensor(images.reshape(-1, 1, 8, 8).astype("float32") / 16), paddle.to_tensor(labels)
    paddle.seed(0)
    body = nn.Sequential(
        *(nn.Conv2D(1, 16, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2D(2), nn.Flatten()),
        *(nn.Linear(16 * 4 * 4, 64), nn.ReLU()),
    )
    network = nn.Sequential(body, nn.Linear(64, 10))
    optimizer = paddle.optimizer.Adam(0.002, parameters=network.parameters())
    draw = np.random.default_rng(0)
    for _ in tqdm(range(NETWORK_EPOCHS), desc="network", unit="epoch"):
        for batch in np.split(draw.permutation(len(labels)), range(64, len(labels), 64)):
            rows = paddle.to_tensor(batch)
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.clear_grad()
    with paddle.no_grad():
        return body(x).numpy().astype("float64"), labels


def make_problem(features: np.ndarray, labels: np.ndarray) -> Problem:
    """Standardise the features, and find the smallest loss by Newton's method."""
    # Whole batches only, because a short last one would weigh as much as the others.
    whole = len(labels) // BATCH_SIZE * BATCH_SIZE
    features, labels = StandardScaler().fit_transform(features[:whole]), labels[:whole]
    # scikit-learn does not decay an intercept. A feature that is always 1 stands for it.
    extended = np.hstack([features, np.ones((whole, 1))])
    strength = 1 / (WEIGHT_DECAY * whole)
    model = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cg", tol=1e-12, max_iter=1000)
    weights = model.fit(extended, labels).coef_.T
    head = nn.Linear(features.shape[1], 10)
    head.weight.set_value(weights[:-1])
    head.bias.set_value(weights[-1])
    problem = Problem(paddle.to_tensor(features), paddle.to_tensor(labels), 0.0)
    return problem._replace(smallest=evaluate(head, problem)[0])


def evaluate(head: nn.Linear, problem: Problem) -> tuple[float, float]:
    """What is minimised, the mean loss and half of the decay times the squared parameters, and its gradient's norm."""
    parameters = head.parameters()
    squares = paddle.add_n([p.square().sum() for p in parameters])
    loss = nn.functional.cross_entropy(head(problem.features), problem.labels) + WEIGHT_DECAY / 2 * squares
    gradients = paddle.grad(loss, parameters)
    return float(loss), float(paddle.add_n([g.square().sum() for g in gradients]).sqrt())


def train(name: str, learning_rate: float, problem: Problem, epochs: int, progress: tqdm) -> Run:
    """Train a linear layer from zeros, on the same batches in the same order as all others."""
    # The samples are dealt to the batches once. In every epoch the batches come in another order.
    sampler = FixedBatchSampler(problem.labels, BATCH_SIZE, order="reshuffle", seed=0)
    batches = [(problem.features[b], problem.labels[b]) for b in map(paddle.to_tensor, sampler.batches)]
    head = nn.Linear(problem.features.shape[1], 10, weight_attr=nn.initializer.Constant(0.0))
    make: Any = {
        "ASGD": partial(ASGD, batch_num=sampler.batch_num, theta=THETA),
        "SGD": paddle.optimizer.SGD,
        "Momentum": paddle.optimizer.Momentum,
        "Adam": paddle.optimizer.Adam,
    }[name]
    optimizer = make(learning_rate=learning_rate, parameters=head.parameters(), weight_decay=WEIGHT_DECAY)
    history = [evaluate(head, problem)]
    for epoch in range(epochs):
        for batch_index in sampler.epoch_order(epoch):
            x, y = batches[batch_index]
            nn.functional.cross_entropy(head(x), y).backward()
            if isinstance(optimizer, ASGD):
                optimizer.batch_index = batch_index
            optimizer.step()
            optimizer.clear_grad()
        history.append(evaluate(head, problem))
        progress.update()
    losses, norms = map(list, zip(*history))
    return Run(name, learning_rate, losses, norms)


def draw(best: list[Run], smallest: float, output: Path) -> None:
    """The distance to the smallest loss and the norm of the gradient over the epochs, in powers of ten."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for run, style in zip(best, ("-", "--", "-.", ":")):
        # What is smaller than 1e-16 is rounding, and may be negative.
        excess = np.maximum(np.array(run.losses) - smallest, 1e-16)
        for axes, values in zip(panels, (excess, run.norms)):
            axes.semilogy(values, style, linewidth=2, label=f"{run.name}, learning rate {run.learning_rate:g}")
    for axes, title in zip(panels, ("loss above the smallest possible", "norm of the whole gradient")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_xlim(0, len(values) - 1)
        axes.grid(True, which="major", alpha=0.4)
    panels[0].legend()
    figure.suptitle("A linear layer on frozen features, each optimizer at its best learning rate")
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a linear layer on frozen features with four optimizers.")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("linear_probe.png"), help="picture of loss and gradient")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs: received {arguments.epochs}, expected at least 1")
    if not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")

    features, labels = compute_features()
    paddle.set_default_dtype("float64")
    problem = make_problem(features, labels)
    tried = [(name, rate) for name, rates in RATES.items() for rate in rates]
    with tqdm(total=len(tried) * arguments.epochs, desc=f"{len(tried)} runs", unit="epoch") as progress:
        runs = [train(*one, problem, arguments.epochs, progress) for one in tried]

    print(f"After {arguments.epochs} epochs, each optimizer with the learning rate that ends lowest:")
    print(f"  {'':9} {'learning rate':>13}  {'loss above the smallest':>23}  {'gradient norm':>13}")
    best = []
    for name in RATES:
        # A run that diverged may end as nan.
        run = min((run for run in runs if run.name == name), key=lambda run: np.nan_to_num(run.losses[-1], nan=np.inf))
        excess = run.losses[-1] - problem.smallest
        print(f"  {name:9} {run.learning_rate:13g}  {excess:23.1e}  {run.norms[-1]:13.1e}")
        best.append(run)
    draw(best, problem.smallest, arguments.output)
    print(f"Drawn to {arguments.output}")


if __name__ == "__main__":
    main()
