"""Trains a small convolutional network on scikit-learn's handwritten digits with ASGD, and again with SGD.

    python examples/train_digits.py

Prints the accuracy on digits that were held out, and draws both training losses. Where ASGD gains something is shown by
converge_exactly.py; on a small network SGD is ahead, and the picture does not hide it.
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

from paddle_asgd import ASGD

# How the step sizes were found: 40 epochs in batches of 64, seeds 0 to 2, with learning_rate * n = 1.5, 3, 6, 12 for
# ASGD and learning_rate = 0.2, 0.4, 0.8, 1.6 for SGD. All seeds trained with all but the largest. Each optimizer takes
# half of the largest that trained.
ASGD_REACH = 3.0  # learning_rate * n
SGD_LEARNING_RATE = 0.4

HELD_OUT = 360  # of 1797 digits
REQUIRED_ACCURACY = 0.97


def load_data(seed: int, batch_size: int) -> tuple[paddle.io.DataLoader, tuple, tuple]:
    """Returns the batches to train on, the same digits as one pair of tensors, and the digits held out."""
    images, labels = load_digits(return_X_y=True)  # 1797 images of 8 x 8 pixels, from 0 to 16
    images = images.reshape(-1, 1, 8, 8).astype("float32") / 16
    labels = labels.astype("int64")
    # Which digits are held out does not depend on the seed.
    images, held_images, labels, held_labels = train_test_split(
        images, labels, test_size=HELD_OUT, stratify=labels, random_state=0
    )
    # ASGD remembers the last gradient of batch 0, of batch 1, and so on: the same digits must come in the same batch in
    # every epoch. So shuffle them here, once and for all, and not in the loader.
    paddle.seed(seed)
    order = paddle.randperm(len(images)).numpy()
    images, labels = images[order], labels[order]
    # drop_last, because a short last batch would weigh as much as a full one.
    loader = paddle.io.DataLoader(list(zip(images, labels)), batch_size=batch_size, shuffle=False, drop_last=True)
    used = len(loader) * batch_size
    training = paddle.to_tensor(images[:used]), paddle.to_tensor(labels[:used])
    return loader, training, (paddle.to_tensor(held_images), paddle.to_tensor(held_labels))


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
    network: nn.Layer, optimizer: paddle.optimizer.Optimizer, loader: paddle.io.DataLoader, training: tuple, epochs: int
) -> list[float]:
    """Returns the loss over all training digits, before the first epoch and after each."""
    losses = [evaluate(network, training)[0]]
    progress = tqdm(range(epochs), desc=f"{type(optimizer).__name__:4}", unit="epoch")
    for _ in progress:
        for images, labels in loader:
            loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
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
    loader, training, held_out = load_data(arguments.seed, arguments.batch_size)

    # batch_num, the n of the formula, is the number of batches in an epoch: no more, no less.
    n = len(loader)
    # Each step goes along the mean of n gradients, of which the oldest is n steps old. That bounds the step size:
    # learning_rate * n * curvature < pi^2 / 2, where the curvature is the largest eigenvalue of the loss's second
    # derivative. It changes while a network learns and nobody knows it beforehand, so try values of learning_rate * n.
    asgd_network = build_network(arguments.seed)
    asgd = ASGD(learning_rate=ASGD_REACH / n, batch_num=n, parameters=asgd_network.parameters())
    asgd_losses = train(asgd_network, asgd, loader, training, arguments.epochs)

    sgd_network = build_network(arguments.seed)
    sgd = paddle.optimizer.SGD(learning_rate=SGD_LEARNING_RATE, parameters=sgd_network.parameters())
    sgd_losses = train(sgd_network, sgd, loader, training, arguments.epochs)

    accuracy, sgd_accuracy = evaluate(asgd_network, held_out)[1], evaluate(sgd_network, held_out)[1]
    losses = {
        f"ASGD, learning rate {ASGD_REACH:g} / {n}, held-out accuracy {accuracy:.1%}": asgd_losses,
        f"SGD, learning rate {SGD_LEARNING_RATE:g}, held-out accuracy {sgd_accuracy:.1%}": sgd_losses,
    }
    draw(losses, arguments.batch_size, arguments.output)
    print(f"Training loss:     ASGD {asgd_losses[-1]:.4f}, SGD {sgd_losses[-1]:.4f}, drawn to {arguments.output}")
    print(f"Held-out accuracy: ASGD {accuracy:.2%}, SGD {sgd_accuracy:.2%} of {HELD_OUT} digits")
    if accuracy < REQUIRED_ACCURACY:
        sys.exit(
            f"The accuracy of ASGD, {accuracy:.2%}, is below {REQUIRED_ACCURACY:.0%}, which 50 epochs in batches of 64 "
            f"reach; this run took {arguments.epochs} epochs in batches of {arguments.batch_size}."
        )


if __name__ == "__main__":
    main()
