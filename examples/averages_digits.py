# SPDX-License-Identifier: Apache-2.0
"""Trains a small network with batch normalisation on handwritten digits, and averages its weights in several ways.

    python examples/averages_digits.py

One training at a high learning rate gives the weights in training, their EMA, their SWA, and EMAs of several widths,
made afterwards. A second training has no average: its learning rate falls to zero, which removes the noise as well.
All are judged on digits that were held out, and the figures are means over the seeds.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
import zlib  # noqa: F401  Paddle 2.6 brings a zlib of its own, which breaks Python's unless that is loaded first
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle
from matplotlib.figure import Figure
from paddle import nn
from paddle.optimizer.lr import CosineAnnealingDecay, LRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from paddle_asgd import SWALR, AveragedModel, PostHocEMA, ema, swa, update_bn

BATCH_SIZE = 32
LEARNING_RATE = 0.2  # in the first half of the training
SWA_RATE = 0.05  # constant, in the second half
WEIGHT_DECAY = 5e-3  # below batch normalisation it keeps the weights small, and so the steps large
DECAY = 0.99  # reaches back over about 100 steps; an epoch has 28
WIDTHS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.14, 0.20)  # of the averages that are made afterwards

RAW, ANNEALED, EMA, SWA = "weights in training", "rate falls to zero", f"ema({DECAY})", "swa()"
STYLES = {RAW: ("0.6", "-"), ANNEALED: ("black", ":"), EMA: ("tab:blue", "-"), SWA: ("tab:orange", "--")}


class Digits(NamedTuple):
    """Half of the digits to train on, and the other half to judge by."""

    labels: paddle.Tensor
    shifted: paddle.Tensor  # nine times the images, each time moved in another way
    held_images: paddle.Tensor
    held_labels: paddle.Tensor


class Score(NamedTuple):
    """Of the digits held out: the cross entropy, the fraction taken for another digit, and the first of them before
    the statistics of batch normalisation were computed anew."""

    loss: float
    error: float
    before_update_bn: float


def load_data() -> Digits:
    images, labels = load_digits(return_X_y=True)  # 1797 images of 8 x 8 pixels, from 0 to 16
    images = images.reshape(-1, 1, 8, 8).astype("float32") / 16
    # Which digits are held out does not depend on the seed.
    images, held_images, labels, held_labels = train_test_split(
        images, labels, test_size=0.5, stratify=labels, random_state=0
    )
    wide = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    shifted = np.concatenate([wide[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    return Digits(*map(paddle.to_tensor, (labels, shifted, held_images, held_labels)))


def draw_images(digits: Digits, rows: np.ndarray, draw: np.random.Generator) -> paddle.Tensor:
    """These digits, each moved by up to a pixel. Digits that never move are soon learned by heart, without noise."""
    return digits.shifted[paddle.to_tensor(rows + len(digits.labels) * draw.integers(0, 9, len(rows)))]


def build_network(seed: int) -> nn.Layer:
    """The same seed gives the same first weights."""
    paddle.seed(seed)
    return nn.Sequential(
        *(nn.Conv2D(1, 16, kernel_size=3, padding=1), nn.BatchNorm2D(16), nn.ReLU(), nn.MaxPool2D(2)),
        *(nn.Conv2D(16, 32, kernel_size=3, padding=1), nn.BatchNorm2D(32), nn.ReLU(), nn.MaxPool2D(2)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
    )


def judge(network: nn.Layer, digits: Digits) -> Score:
    """Score the weights that are in the network, with the statistics it has and with those of these weights."""

    def loss_and_error() -> tuple[float, float]:
        network.eval()
        with paddle.no_grad():
            scores = network(digits.held_images)
            wrong = (scores.argmax(axis=1) != digits.held_labels).astype("float32")
            loss = nn.functional.cross_entropy(scores, digits.held_labels)
        network.train()
        return float(loss), float(wrong.mean())

    before_update_bn, _ = loss_and_error()
    # One batch of all training digits; with more data, the loader of the training.
    update_bn([draw_images(digits, np.arange(len(digits.labels)), np.random.default_rng(0))], network)
    return Score(*loss_and_error(), before_update_bn)


def train_epoch(
    network: nn.Layer, optimizer: paddle.optimizer.Optimizer, digits: Digits, draw: np.random.Generator, averages: list
) -> None:
    order = draw.permutation(len(digits.labels))
    for rows in np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE))[:-1]:  # whole batches only
        scores = network(draw_images(digits, rows, draw))
        nn.functional.cross_entropy(scores, digits.labels[paddle.to_tensor(rows)]).backward()
        optimizer.step()
        optimizer.clear_grad()
        for average in averages:
            average.update()


def make_optimizer(network: nn.Layer, learning_rate: LRScheduler) -> paddle.optimizer.Momentum:
    return paddle.optimizer.Momentum(learning_rate, parameters=network.parameters(), weight_decay=WEIGHT_DECAY)


def train_with_averages(digits: Digits, seed: int, epochs: int, progress: tqdm) -> dict[Any, list[Score]]:
    """Return the scores after each epoch by name, and those of the averages that were made afterwards by width."""
    network, draw, steps = build_network(seed), np.random.default_rng(seed), len(digits.labels) // BATCH_SIZE
    start, annealing = epochs // 2, epochs // 8
    scheduler = SWALR(LEARNING_RATE, swa_lr=SWA_RATE, anneal_epochs=annealing, swa_start=start)
    optimizer = make_optimizer(network, scheduler)
    averaged = {
        EMA: AveragedModel(network, ema(DECAY, warmup="ratio"), optimizer=optimizer),
        SWA: AveragedModel(network, swa(), optimizer=optimizer, update_after=steps * (start + annealing)),
    }
    scores = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        afterwards = PostHocEMA(network, folder=folder, every=steps, optimizer=optimizer)
        for _ in range(epochs):
            train_epoch(network, optimizer, digits, draw, [*averaged.values(), afterwards])
            scheduler.step()
            scores[RAW].append(judge(network, digits))
            for name, average in averaged.items():
                if average.num_updates:
                    with average.averaged_parameters():
                        scores[name].append(judge(network, digits))
            progress.set_postfix({name: f"{scores[name][-1].loss:.3f}" for name in (RAW, EMA)})
            progress.update()
        for width in WIDTHS:
            network.set_state_dict(afterwards.reconstruct(width))
            scores[width].append(judge(network, digits))
    return scores


def train_annealed(digits: Digits, seed: int, epochs: int, progress: tqdm) -> dict[Any, list[Score]]:
    """Train from the same weights on the same batches with a learning rate that falls to zero as a cosine."""
    network, draw = build_network(seed), np.random.default_rng(seed)
    scheduler = CosineAnnealingDecay(LEARNING_RATE, T_max=epochs)
    optimizer = make_optimizer(network, scheduler)
    scores = []
    for _ in range(epochs):
        train_epoch(network, optimizer, digits, draw, [])
        scheduler.step()
        scores.append(judge(network, digits))
        progress.update()
    return {ANNEALED: scores}


def draw_picture(means: dict[Any, np.ndarray], epochs: int, seeds: int, output: Path) -> None:
    """The held-out loss over the epochs, and beside it that of the last epoch by the width of the average."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, (color, style) in STYLES.items():
        losses = means[name][:, 0]
        left.plot(range(epochs - len(losses) + 1, epochs + 1), losses, style, color=color, linewidth=2, label=name)
        right.axhline(losses[-1], color=color, linestyle=style, linewidth=1)
    right.plot(WIDTHS, [means[width][-1, 0] for width in WIDTHS], "o-", color="tab:green", label="PostHocEMA")
    left.set(xlabel="epoch", ylabel="cross entropy of the digits held out", yscale="log", xlim=(1, epochs))
    right.set(xlabel="width, sigma_rel", title=f"after epoch {epochs}", xlim=(0, WIDTHS[-1] * 1.05))
    left.set_title(f"Handwritten digits, mean over {seeds} seeds, after update_bn")
    for axes in (left, right):
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    figure.savefig(output, dpi=100)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Average the weights of a small network in several ways.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings of each kind")
    parser.add_argument("--output", type=Path, default=Path("averages_digits.png"), help="picture of the losses")
    arguments = parser.parse_args()
    for name, least in (("epochs", 4), ("seeds", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: received {getattr(arguments, name)}, expected at least {least}")
    if not arguments.output.parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # Paddle tells this once to everybody who trains with batch normalisation.
    warnings.filterwarnings("ignore", "When training, we now always track global mean and variance")
    digits, runs = load_data(), defaultdict(list)
    with tqdm(total=2 * arguments.seeds * arguments.epochs, unit="epoch") as progress:
        for seed in range(arguments.seeds):
            for train in (train_with_averages, train_annealed):
                progress.set_description(f"seed {seed}")
                for name, scores in train(digits, seed, arguments.epochs, progress).items():
                    runs[name].append(scores)
    means = {name: np.mean(scores, axis=0) for name, scores in runs.items()}

    print(f"Digits held out, after epoch {arguments.epochs}, means over {arguments.seeds} seed(s):")
    print(f"  {'':24}   loss   error   loss before update_bn")
    rows = {name: name for name in STYLES} | {width: f"PostHocEMA, width {width:.2f}" for width in WIDTHS}
    for name, label in rows.items():
        loss, error, before = means[name][-1]
        print(f"  {label:24}  {loss:.4f}  {error:.2%}  {before:.4f}")
    draw_picture(means, arguments.epochs, arguments.seeds, arguments.output)
    print(f"Drawn to {arguments.output}")

    shares = {name: means[name][-1, 0] / means[RAW][-1, 0] for name in rows}
    best = min(WIDTHS, key=shares.get)
    print(
        f"Of the loss of the weights in training, {EMA} leaves {shares[EMA]:.0%}, {SWA} {shares[SWA]:.0%}, the best "
        f"width, {best:g}, {shares[best]:.0%}; a learning rate that falls to zero, without an average, leaves "
        f"{shares[ANNEALED]:.0%}."
    )


if __name__ == "__main__":
    main()
