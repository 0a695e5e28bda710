# SPDX-License-Identifier: Apache-2.0
"""Trains a character model on Python's own help texts with SGD, and averages its weights when the loss stops falling.

    python examples/char_lm.py

A small LSTM in the manner of AWD-LSTM: a constant learning rate, the same units dropped at all times of a batch, and
NonMonotonicTrigger, which says when AveragedSGD begins to average. Prints the perplexity of text that was held out,
with the average and without it, and that of another end of the same training, whose rate falls to zero instead.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import zlib  # noqa: F401  Paddle 2.6 brings a zlib of its own, which breaks Python's unless that is loaded first
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle
from matplotlib.figure import Figure
from paddle import nn
from paddle.optimizer.lr import CosineAnnealingDecay
from tqdm import tqdm

from paddle_asgd import AveragedSGD, NonMonotonicTrigger

LEARNING_RATE = 20.0  # high, so that the loss soon stops falling; a step moves by at most 20 * 0.5
CLIP_NORM = 0.5
DROPOUT = 0.1
ROWS, LENGTH = 16, 64  # of a batch: parts of the text that are read side by side, and the characters of each
JUDGED_ROWS = 64  # into which a text is cut that is judged
CHECKS = 40  # validations in a training
NON_MONOTONE = 5  # how many of the latest validations the trigger leaves out
LATEST = 0.75  # the share of the steps after which averaging begins even if the trigger has not fired

RAW, AVERAGED, ANNEALED = "SGD, weights in training", "AveragedSGD, average", "SGD, rate falls to zero"
STYLES = {RAW: ("0.6", "-"), ANNEALED: ("black", ":"), AVERAGED: ("tab:blue", "-")}


class Text(NamedTuple):
    """Three parts of one text, whose characters are numbers from 0 to size - 1."""

    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    size: int


class Results(NamedTuple):
    """By what was judged: perplexities of the validation text by step, and of the test text at the end."""

    validation: dict[str, dict[int, float]]
    test: dict[str, float]


def load_text(length: int | None) -> Text:
    """The help on Python's language, each paragraph once, because many of them come under several topics."""
    topics = pydoc_data.topics.topics
    paragraphs = dict.fromkeys(part for name in sorted(topics) for part in topics[name].split("\n\n"))
    text = "\n\n".join(paragraphs)[:length]
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    numbers = np.array([alphabet[character] for character in text])
    return Text(*np.split(numbers, [len(numbers) * 8 // 10, len(numbers) * 9 // 10]), len(alphabet))


class CharacterModel(nn.Layer):
    """An LSTM from each character to the scores of the next."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, 32)
        self.lstm = nn.LSTM(32, 128)
        self.scores = nn.Linear(128, size)

    def forward(self, characters: paddle.Tensor, state: tuple | None = None) -> tuple[paddle.Tensor, tuple]:
        hidden, state = self.lstm(self._drop(self.embedding(characters)), state)
        return self.scores(self._drop(hidden)), state

    def _drop(self, values: paddle.Tensor) -> paddle.Tensor:
        """Variational dropout: one mask for all times of a batch. In evaluation mode nothing is dropped."""
        return values * nn.functional.dropout(paddle.ones_like(values[:, :1]), DROPOUT, training=self.training)


def read_rows(text: np.ndarray, rows: int) -> paddle.Tensor:
    return paddle.to_tensor(text[: len(text) // rows * rows].reshape(rows, -1))


def loss_of(scores: paddle.Tensor, following: paddle.Tensor) -> paddle.Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten())


def perplexity(model: CharacterModel, text: np.ndarray) -> float:
    """Of a character, given those before it in its row."""
    rows = read_rows(text, JUDGED_ROWS)
    model.eval()
    with paddle.no_grad():
        loss = float(loss_of(model(rows[:, :-1])[0], rows[:, 1:]))
    model.train()
    return math.exp(loss)


def train(
    model: CharacterModel, optimizer: paddle.optimizer.Optimizer, text: Text, steps: range, progress: tqdm
) -> Iterator[int]:
    """Take these steps, from the beginning of the text on, and yield the number of each."""
    rows, position, state = read_rows(text.training, ROWS), 0, None
    for step in steps:
        if position + LENGTH >= rows.shape[1]:
            position, state = 0, None
        scores, state = model(rows[:, position : position + LENGTH], state)
        loss_of(scores, rows[:, position + 1 : position + LENGTH + 1]).backward()
        optimizer.step()
        optimizer.clear_grad()
        state = tuple(part.detach() for part in state)  # no gradient goes back to the batch before
        position += LENGTH
        progress.update()
        yield step


def run(text: Text, steps: int, seed: int, progress: tqdm) -> tuple[Results, int]:
    """Train, and train on from where averaging began with a falling rate; returns the results and that step."""
    paddle.seed(seed)
    model, trigger, begun, every = CharacterModel(text.size), NonMonotonicTrigger(NON_MONOTONE), 0, steps // CHECKS
    clip = nn.ClipGradByGlobalNorm(CLIP_NORM)
    # With lambd=0 it is SGD with a constant rate. The mean begins with start_averaging().
    optimizer = AveragedSGD(LEARNING_RATE, lambd=0.0, parameters=model.parameters(), grad_clip=clip)
    validation, test = {name: {} for name in STYLES}, {}
    for step in train(model, optimizer, text, range(1, steps + 1), progress):
        if step % every:
            continue
        validation[RAW][step] = perplexity(model, text.validation)
        progress.set_postfix(perplexity=f"{validation[RAW][step]:.3f}")
        if begun:
            with optimizer.averaged_parameters():
                validation[AVERAGED][step] = perplexity(model, text.validation)
        elif trigger(validation[RAW][step]) or step >= LATEST * steps:
            begun, weights = step, {name: value.clone() for name, value in model.state_dict().items()}
            optimizer.start_averaging()
    test[RAW] = perplexity(model, text.test)
    with optimizer.averaged_parameters():
        test[AVERAGED] = perplexity(model, text.test)

    model.set_state_dict(weights)
    scheduler = CosineAnnealingDecay(LEARNING_RATE, T_max=steps - begun)
    optimizer = paddle.optimizer.SGD(scheduler, parameters=model.parameters(), grad_clip=clip)
    progress.total += steps - begun
    for step in train(model, optimizer, text, range(begun + 1, steps + 1), progress):
        scheduler.step()
        if step % every == 0:
            validation[ANNEALED][step] = perplexity(model, text.validation)
            progress.set_postfix(perplexity=f"{validation[ANNEALED][step]:.3f}")
    test[ANNEALED] = perplexity(model, text.test)
    return Results(validation, test), begun


def draw(results: Results, begun: int, output: Path) -> None:
    """The perplexities of the validation text over the steps."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, (color, style) in STYLES.items():
        values = results.validation[name]
        axes.plot(list(values), list(values.values()), style, color=color, linewidth=2, label=name)
    axes.axvline(begun, color="tab:orange", linestyle="--", label="averaging begins")
    lowest = min(value for values in results.validation.values() for value in values.values())
    axes.set(xlabel="step", ylabel="perplexity of a character, validation text", ylim=(0.95 * lowest, 2 * lowest))
    axes.set_title("An LSTM on the characters of Python's help texts")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=100)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a character model with SGD, then with averaged SGD.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--characters", type=int, help="of the text that are taken, from its beginning; else all")
    parser.add_argument("--output", type=Path, default=Path("char_lm.png"), help="picture of the perplexities")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the dropout")
    arguments = parser.parse_args()
    if arguments.steps < 2 * CHECKS or arguments.steps % CHECKS:
        parser.error(f"--steps: received {arguments.steps}, expected a multiple of {CHECKS} of at least {2 * CHECKS}")
    if arguments.characters is not None and arguments.characters < 10_000:
        parser.error(f"--characters: received {arguments.characters}, expected at least 10000")
    if not arguments.output.parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    text = load_text(arguments.characters)
    with tqdm(total=arguments.steps, unit="step") as progress:
        results, begun = run(text, arguments.steps, arguments.seed, progress)
    print(f"{len(text.training):,} characters to train on; averaging began at step {begun} of {arguments.steps}.")
    print(f"Perplexity of a character:    validation   test ({len(text.test):,} characters)")
    print(f"  {'at the step where it began':26}  {results.validation[RAW][begun]:10.3f}")
    for name in (RAW, AVERAGED, ANNEALED):
        print(f"  {name:26}  {results.validation[name][arguments.steps]:10.3f}   {results.test[name]:.3f}")
    draw(results, begun, arguments.output)
    print(f"Drawn to {arguments.output}")
    change = results.test[AVERAGED] / results.test[RAW] - 1
    other = results.test[AVERAGED] / results.test[ANNEALED] - 1
    print(
        f"At the same step, the perplexity of the average is {abs(change):.1%} {'below' if change < 0 else 'above'} "
        f"that of the weights in training, and {abs(other):.1%} {'below' if other < 0 else 'above'} that of a rate "
        "that falls to zero."
    )


if __name__ == "__main__":
    main()
