# SPDX-License-Identifier: Apache-2.0
"""Solves a ridge regression with ASGD to the accuracy of the closed form, and compares with scikit-learn's own SAG.

    python examples/ridge.py

Shows batches of unequal size, weighted by how many samples they have, and gradient_norm() as the rule when to stop. The
data are scikit-learn's 442 diabetes samples.
"""

from __future__ import annotations

import argparse
import sys
import zlib  # noqa: F401  Paddle 2.6 brings a zlib of its own, which breaks Python's unless that is loaded first

import numpy as np
import paddle
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.preprocessing import scale

from paddle_asgd import ASGD, FixedBatchSampler

WEIGHT_DECAY = 0.01
MOST_PASSES = 1000
# Over the largest curvature of a batch. 2 takes little more than half the passes, but with some seeds the watch warns.
LEARNING_RATE = 1.0


def gradient(samples: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of what is minimised: the mean of half the squared errors, and half of the decay times the squared weights."""
    return samples.T @ (samples @ weights - targets) / len(samples) + WEIGHT_DECAY * weights


def train(
    samples: np.ndarray, targets: np.ndarray, batch_size: int, tolerance: float, seed: int, weighted: bool
) -> tuple[np.ndarray, int]:
    """The weights that ASGD finds, and the passes it took."""
    dataset = list(zip(samples, targets[:, np.newaxis]))
    sampler = FixedBatchSampler(dataset, batch_size, order="replacement", seed=seed)
    loader = paddle.io.DataLoader(dataset, batch_sampler=sampler)
    largest = max(np.linalg.norm(samples[batch], 2) ** 2 / len(batch) for batch in sampler.batches)
    model = paddle.nn.Linear(samples.shape[1], 1, bias_attr=False)
    optimizer = ASGD(
        learning_rate=LEARNING_RATE / largest,
        batch_num=sampler.batch_num,
        parameters=model.parameters(),
        weight_decay=WEIGHT_DECAY,
        # Without them each sample of a short last batch would count for more than any other sample.
        batch_weights=sampler.batch_weights if weighted else None,
    )
    for passes in range(1, MOST_PASSES + 1):
        for batch_index, (x, y) in sampler.enumerate(loader):
            loss = paddle.nn.functional.mse_loss(model(x), y) / 2
            loss.backward()
            optimizer.batch_index = batch_index
            optimizer.step()
            optimizer.clear_grad()
        # Of the whole objective, as far as the history knows it: this has cost no further gradient.
        if optimizer.gradient_norm() < tolerance:
            return model.weight.numpy()[:, 0], passes
    sys.exit(f"After {MOST_PASSES} passes gradient_norm() is {optimizer.gradient_norm():.1e}, above {tolerance:.1e}.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Solve a ridge regression with ASGD and with scikit-learn.")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tolerance", type=float, default=1e-10, help="stop where gradient_norm() is below")
    parser.add_argument("--seed", type=int, default=0, help="of what is in a batch, and of the order of the batches")
    arguments = parser.parse_args()
    paddle.set_default_dtype("float64")
    # With features and targets of mean 0 no constant is needed.
    samples, targets = map(scale, load_diabetes(return_X_y=True))

    strength = WEIGHT_DECAY * len(samples)  # scikit-learn minimises a sum over the samples, not a mean
    closed = Ridge(strength, fit_intercept=False, solver="cholesky").fit(samples, targets)
    sag = Ridge(
        strength, fit_intercept=False, solver="sag", tol=1e-12, max_iter=MOST_PASSES, random_state=arguments.seed
    ).fit(samples, targets)
    found = {"closed form": (closed.coef_, "-"), "scikit-learn, solver='sag'": (sag.coef_, sag.n_iter_[0])}
    for label, weighted in (("ASGD with batch_weights", True), ("ASGD without", False)):
        found[label] = train(
            samples, targets, arguments.batch_size, arguments.tolerance, arguments.seed, weighted=weighted
        )

    rest = len(samples) % arguments.batch_size
    print(f"{len(samples)} samples in batches of {arguments.batch_size}, the last of {rest or arguments.batch_size}:")
    print(f"  {'':28} passes  gradient  largest error of a weight")
    for label, (weights, passes) in found.items():
        norm = np.linalg.norm(gradient(samples, targets, weights))
        print(f"  {label:28} {passes!s:>6}  {norm:8.1e}  {abs(weights - closed.coef_).max():8.1e}")


if __name__ == "__main__":
    main()
