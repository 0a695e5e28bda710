# SPDX-License-Identifier: Apache-2.0
"""Trains a small convolutional network on scikit-learn's handwritten digits with ASGD, and again with SGD.

    python examples/train_digits.py

Prints the accuracy on digits that were held out, and draws both training losses. Both optimizers take the same batches
in the same order, at the same learning rate. Where ASGD gains something is shown by converge_exactly.py; on a small
network it does not, and the last line says so.
"""

from __future__ import annotations

import argparse
import sys
import zlib  # noqa: F401  Paddle 2.6 brings a zlib of its own, which breaks Python's unless that is loaded first
from pathlib import Path

import paddle
from matplotlib.figure import Figure
from paddle import nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from paddle_asgd import ASGD, FixedBatchSampler

# Half of the largest of 0.2, 0.4, 0.8 and 1.6 with which SGD trained in 40 epochs with all of the seeds 0 to 2.
LEARNING_RATE = 0.4
THETA = 0.3  # how much of a gradient's change enters a step at once: docs/learning-rate.md

HELD_OUT = 360  # of 1797 digits
REQUIRED_ACCURACY = 0.97


def load_data(seed: int, batch_size: int) -> tuple[list, tuple, tuple]:
    """Returns the digits to train on, the same as one pair of tensors, and the digits held out."""
    images, labels = load_digits(return_X_y=True)  # 1797 images of 8 x 8 pixels, from 0 to 16
    images = images.reshape(-1, 1, 8, 8).astype("float32") / 16
    labels = labels.astype("int64")
    # Which digits are held out does not depend on the seed.
    images, held_images, labels, held_labels = train_test_split(
        images, labels, test_size=HELD_OUT, stratify=labels, random_state=0
    )
    # Whole batches only, because a short last one would weigh as much as the others.
    images, labels = (values[: len(values) // batch_size * batch_size] for values in (images, labels))
    training = paddle.to_tensor(images), paddle.to_tensor(labels)
    return list(zip(images, labels)), training, (paddle.to_tensor(held_images), paddle.to_tensor(held_labels))


def load_batches(digits: list, batch_size: int, seed: int) -> tuple[FixedBatchSampler, paddle.io.DataLoader]:
    """Batches whose digits never change, in an order that is drawn anew in every epoch; the same for the same seed."""
    sampler = FixedBatchSampler(digits, batch_size, order="reshuffle", seed=seed)
    return sampler, paddle.io.DataLoader(digits, batch_sampler=sampler)


def build_network(seed: int) -> nn.Layer:
    """The same seed gives the same first weights."""
    paddle.seed(seed)
    # No dropout and no batch norm: a batch must give the same gradient when it comes again with the same weights.
    return nn.Sequential(
        nn.Conv2D(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2D(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def evaluate(network: nn.Layer, digits: tuple) -> tuple[float, float]:
    """Loss and accuracy over all these digits at once."""
    images, labels = digits
    with paddle.no_grad():
        scores = network(images)
        loss = nn.functional.cross_entropy(scores, labels)
        return float(loss), float((scores.argmax(axis=1) == labels).astype("float32").mean())


def train(
    network: nn.Layer, optimizer: paddle.optimizer.Optimizer, batches: tuple, training: tuple, epochs: int
) -> list[float]:
    """Returns the loss over all training digits, before the first epoch and after each."""
    sampler, loader = batches
    losses = [evaluate(network, training)[0]]
    progress = tqdm(range(epochs), desc=f"{type(optimizer).__name__:4}", unit="epoch")
    for _ in progress:
        for batch_index, (images, labels) in sampler.enumerate(loader):
            loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            if isinstance(optimizer, ASGD):
                optimizer.batch_index = batch_index
            optimizer.step()
            optimizer.clear_grad()
        loss, accuracy = evaluate(network, training)
        losses.append(loss)
        progress.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2%}")
    return losses


def draw(losses: dict[str, list[float]], batch_size: int, output: Path) -> None:
    """Both training losses over the epochs, the loss in powers of ten."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (label, values), style in zip(losses.items(), ("-", "--")):
        axes.semilogy(values, style, linewidth=2, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("cross entropy over all training digits")
    axes.set_title(f"Handwritten digits, batches of {batch_size}, the same first weights")
    axes.set_xlim(0, len(values) - 1)
    axes.grid(True, which="major", alpha=0.4)
    axes.legend()
    figure.savefig(output, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on handwritten digits with ASGD and with SGD.")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("digits_loss.png"), help="picture of the training losses")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the split into batches")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs: received {arguments.epochs}, expected at least 1")
    if not 1 <= arguments.batch_size <= 1797 - HELD_OUT:
        parser.error(f"--batch-size: received {arguments.batch_size}, expected 1 to {1797 - HELD_OUT}")
    if not arguments.output.parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    digits, training, held_out = load_data(arguments.seed, arguments.batch_size)
    losses, accuracies = {}, {}
    for name in ("ASGD", "SGD"):
        network, batches = build_network(arguments.seed), load_batches(digits, arguments.batch_size, arguments.seed)
        options = {"learning_rate": LEARNING_RATE, "parameters": network.parameters()}
        # batch_num, the n of the formula, is the number of batches in an epoch: no more, no less.
        optimizer = (
            ASGD(batch_num=batches[0].batch_num, theta=THETA, **options)
            if name == "ASGD"
            else paddle.optimizer.SGD(**options)
        )
        losses[name] = train(network, optimizer, batches, training, arguments.epochs)
        accuracies[name] = evaluate(network, held_out)[1]
    accuracy = accuracies["ASGD"]
    labelled = {f"{name}, held-out accuracy {accuracies[name]:.1%}": values for name, values in losses.items()}
    draw(labelled, arguments.batch_size, arguments.output)
    last = {name: values[-1] for name, values in losses.items()}
    print(f"Training loss:     ASGD {last['ASGD']:.4f}, SGD {last['SGD']:.4f}, drawn to {arguments.output}")
    print(f"Held-out accuracy: ASGD {accuracy:.2%}, SGD {accuracies['SGD']:.2%} of {HELD_OUT} digits")
    print("On a small network like this one the two are on a level: ASGD's memory of every batch buys nothing here.")
    if accuracy < REQUIRED_ACCURACY:
        sys.exit(
            f"The accuracy of ASGD, {accuracy:.2%}, is below {REQUIRED_ACCURACY:.0%}, which 50 epochs in batches of 64 "
            f"reach; this run took {arguments.epochs} epochs in batches of {arguments.batch_size}."
        )


if __name__ == "__main__":
    main()
