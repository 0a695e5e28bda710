# SPDX-License-Identifier: Apache-2.0
"""The recipe on small networks: training loss and gradient norm of SGD and ASGD, each at several learning rates.

    python -m benchmarks.recipe_networks                     # CNN and transformer, three seeds
    python -m benchmarks.recipe_networks --networks cnn --seeds 1
    python -m benchmarks.recipe_networks --from networks.json

Must not hold convex problems (recipe_problems.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from paddle_asgd import ASGD, FixedBatchSampler

BATCH_SIZE = 64
HELD_OUT = 360  # of 1797 digits, the same for every seed


class Method(NamedTuple):
    """An optimizer, the order of its batches, and its theta; SGD has neither slots nor theta."""

    optimizer: str
    order: str
    theta: float | None = None

    def __str__(self) -> str:
        return "SGD" if self.optimizer == "SGD" else f"ASGD, {self.order}, theta={self.theta}"


#: Methods with the learning rates that they try.
METHODS = {
    "cnn": {
        Method("SGD", "reshuffle"): (0.2, 0.4, 0.8, 1.6),
        Method("ASGD", "reshuffle", 0.2): (0.4, 0.8),
        Method("ASGD", "reshuffle", 0.3): (0.2, 0.4, 0.8, 1.6),
        Method("ASGD", "reshuffle", 0.4): (0.4, 0.8),
    },
    "transformer": {
        Method("SGD", "reshuffle"): (0.1, 0.2, 0.4, 0.8),
        Method("ASGD", "reshuffle", 0.3): (0.1, 0.2, 0.4, 0.8),
    },
}


def cnn() -> nn.Layer:
    """No dropout and no batch norm: a batch must give the same gradient again at the same weights."""
    return nn.Sequential(
        nn.Conv2D(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2D(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Transformer(nn.Layer):
    """Reads a digit as eight rows of eight pixels, without dropout; one encoder layer has 16 parameters."""

    def __init__(self, width: int = 32, layers: int = 1) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.place = self.create_parameter([8, width])
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, normalize_before=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width))
        self.leave = nn.Linear(width, 10)

    def forward(self, images: Any) -> Any:
        rows = self.enter(images.squeeze(1)) + self.place
        return self.leave(self.encoder(rows).mean(axis=1))


NETWORKS = {"cnn": (cnn, 50), "transformer": (Transformer, 30)}


def load_data() -> tuple[Any, ...]:
    """Images and labels to train on, and those held out."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype("float32") / 16
    parts = train_test_split(images, labels.astype("int64"), test_size=HELD_OUT, stratify=labels, random_state=0)
    return tuple(paddle.to_tensor(parts[i]) for i in (0, 2, 1, 3))


def train(name: str, method: Method, rate: float, seed: int) -> dict[str, float]:
    """The loss over all training images, the norm of its gradient, and the accuracy on what was held out."""
    images, labels, held, held_labels = load_data()
    build, epochs = NETWORKS[name]
    paddle.seed(seed)
    network = build()
    # drop_last: SGD has no weights for a short batch.
    sampler = FixedBatchSampler(range(len(images)), BATCH_SIZE, order=method.order, drop_last=True, seed=seed)
    batches = [(images[batch], labels[batch]) for batch in map(paddle.to_tensor, sampler.batches)]
    if method.optimizer == "SGD":
        optimizer = paddle.optimizer.SGD(rate, network.parameters())
    else:
        optimizer = ASGD(rate, sampler.batch_num, network.parameters(), theta=method.theta, watch=False)
    for epoch in range(epochs):
        for i in sampler.epoch_order(epoch):
            nn.functional.cross_entropy(network(batches[i][0]), batches[i][1]).backward()
            if method.optimizer == "ASGD":
                optimizer.batch_index = i
            optimizer.step()
            optimizer.clear_grad()
    used = paddle.to_tensor(np.concatenate(sampler.batches))
    loss = nn.functional.cross_entropy(network(images[used]), labels[used])
    loss.backward()
    squares = sum(float(p.grad.square().sum()) for p in network.parameters() if p.grad is not None)
    with paddle.no_grad():
        accuracy = float((network(held).argmax(axis=1) == held_labels).astype("float32").mean())
    return {"loss": float(loss), "norm": squares**0.5, "accuracy": accuracy}


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Medians over the seeds, and the range of the loss."""
    lines = []
    for name, runs in results.items():
        lines += [
            f"| {name} | learning rate | training loss (all seeds) | gradient norm | held out |",
            "|---" * 5 + "|",
        ]
        for key, seeds in runs.items():
            method, rate = key.rsplit(" @ ", 1)
            values = {kind: [run[kind] for run in seeds] for kind in ("loss", "norm", "accuracy")}
            loss, norm, accuracy = (np.median(values[kind]) for kind in values)
            extremes = f"{min(values['loss']):.2g} to {max(values['loss']):.2g}"
            lines.append(f"| {method} | {rate} | {loss:.2g} ({extremes}) | {norm:.1e} | {accuracy:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.recipe_networks", description="SGD and ASGD on small networks.")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("networks.json"), help="keeps results; a run goes on there")
    parser.add_argument("--from", type=Path, dest="source", help="print the tables of this file, run nothing")
    options = parser.parse_args()
    path = options.source or options.json
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for seed in [] if options.source else range(options.seeds):
        for name in options.networks:
            for method, rates in METHODS[name].items():
                for rate in rates:
                    runs = kept.setdefault(name, {}).setdefault(f"{method} @ {rate:g}", [])
                    if len(runs) == seed:
                        runs.append(train(name, method, rate, seed))
                        path.write_text(json.dumps(kept))
    print(table(kept))


if __name__ == "__main__":
    main()
