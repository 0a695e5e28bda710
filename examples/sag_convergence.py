# SPDX-License-Identifier: Apache-2.0
"""Measures how far SAG, the mistake of a shuffling loader, SGD, momentum and Adam end above the smallest possible loss.

    python examples/sag_convergence.py              # three problems, 50 passes, 3 seeds: about ten minutes
    python examples/sag_convergence.py --quick      # one problem, few passes and steps: seconds

Logistic regressions on scikit-learn's data, in float64, from 0. Each method may choose its best learning rate from a
grid. Prints a table and draws the loss over the passes; also counts who was warned that slots and batches do not match.
"""

from __future__ import annotations

import argparse
import warnings
import zlib  # noqa: F401  Paddle 2.6 brings a zlib of its own, which breaks Python's unless that is loaded first
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import paddle
from matplotlib.figure import Figure
from paddle.nn import functional
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from paddle_asgd import ASGD, FixedBatchSampler, SlotMismatchWarning

WEIGHT_DECAY = 0.01
NOISE = 0.3  # of the standardised features


class Method(NamedTuple):
    """An optimizer, how its samples come, and which learning rates it tries."""

    order: str  # of the fixed batches; "samples": all samples are dealt anew in every pass
    optimizer: Callable[..., paddle.optimizer.Optimizer]
    powers: range  # the learning rates are these powers of 2, over the largest Lipschitz constant of a batch
    noise: float = 0.0


METHODS = {
    "SAG, replacement": Method("replacement", ASGD, range(1, 5)),
    "SAG, reshuffle": Method("reshuffle", ASGD, range(1, 5)),
    "SAG, sequential": Method("sequential", ASGD, range(0, 4)),
    "SAG, 30 % noise in the input": Method("replacement", ASGD, range(-2, 3), NOISE),
    "SAG, shuffle=True, no batch_index": Method("samples", ASGD, range(-2, 3)),
    "SGD": Method("samples", paddle.optimizer.SGD, range(-1, 3)),
    "SGD with momentum 0.9": Method("samples", partial(paddle.optimizer.Momentum, momentum=0.9), range(-5, 0)),
    "Adam": Method("samples", paddle.optimizer.Adam, range(-5, -1)),
}


class Problem(NamedTuple):
    """Whole batches of samples (a constant 1 is the last feature), and what is known of the loss over them."""

    name: str
    samples: np.ndarray
    labels: np.ndarray
    outputs: int  # scores of a sample: one a class, or a single one for two classes
    batch_size: int

    def smallest_loss(self) -> float:
        """By Newton's method."""
        strength = 1 / (WEIGHT_DECAY * len(self.samples))
        model = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cholesky", tol=1e-12)
        weights = paddle.to_tensor(model.fit(self.samples, self.labels).coef_.T)
        return total_losses(self, [weights])[0]

    def lipschitz(self, batches: list[list[int]]) -> float:
        """The largest of all batches' bounds on the curvature: 1/4 or, of the softmax, 1/2 times that of squares."""
        squares = max(np.linalg.norm(self.samples[batch], 2) ** 2 / len(batch) for batch in batches)
        return squares * (0.25 if self.outputs == 1 else 0.5)


def load_problem(load: Callable[..., Any], whole: int, batch_size: int) -> Problem:
    """Standardised, shuffled, and cut to a multiple of ``whole`` samples: every batch is complete."""
    samples, labels = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(samples))[: len(samples) // whole * whole]
    samples, labels = StandardScaler().fit_transform(samples)[order], labels[order]
    samples = np.hstack([samples, np.ones((len(samples), 1))])
    classes = int(labels.max()) + 1
    name = f"{load.__name__[len('load_') :]}, batches of {batch_size}"
    return Problem(name, samples, labels, 1 if classes == 2 else classes, batch_size)


class Rows(paddle.io.Dataset):
    """The samples of a problem, with other noise at every visit."""

    def __init__(self, problem: Problem, noise: float) -> None:
        self.samples, self.labels = problem.samples, problem.labels
        self.noise = np.append(np.full(problem.samples.shape[1] - 1, noise), 0.0) if noise else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        features = self.samples[index]
        if self.noise is not None:
            features = features + self.noise * np.random.standard_normal(len(features))
        return features, self.labels[index]


class Run:
    """One method with one learning rate, and what has become of it."""

    def __init__(self, problem: Problem, name: str, power: int, learning_rate: float) -> None:
        self.name, self.power = name, power
        shape = [problem.samples.shape[1], problem.outputs]
        zeros = paddle.nn.initializer.Constant(0.0)
        self.weights = paddle.create_parameter(shape, "float64", default_initializer=zeros)
        method = METHODS[name]
        batch_num = len(problem.samples) // problem.batch_size
        options = {"batch_num": batch_num} if method.optimizer is ASGD else {}
        self.optimizer = method.optimizer(
            learning_rate=learning_rate, parameters=[self.weights], weight_decay=WEIGHT_DECAY, **options
        )
        self.losses: list[float] = []
        self.warned_in: int | None = None  # the pass


def mean_losses(problem: Problem, weights: list[paddle.Tensor], x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """The mean loss of these samples for each of several weights, without their decay."""
    scores = paddle.matmul(x, paddle.concat(weights, axis=1)).reshape([len(x), len(weights), problem.outputs])
    if problem.outputs == 1:
        signs = (2 * y - 1).astype(scores.dtype).reshape([-1, 1])
        return -functional.log_sigmoid(signs * scores.squeeze(2)).mean(axis=0)
    labels = y.reshape([-1, 1, 1]).expand([-1, len(weights), 1])
    return functional.cross_entropy(scores, labels, reduction="none").squeeze(2).mean(axis=0)


@paddle.no_grad()
def total_losses(problem: Problem, weights: list[paddle.Tensor]) -> list[float]:
    """What is minimised: the mean loss of all samples, and half of the decay times the squared weights."""
    losses = mean_losses(problem, weights, paddle.to_tensor(problem.samples), paddle.to_tensor(problem.labels))
    return [loss + WEIGHT_DECAY / 2 * float(w.square().sum()) for loss, w in zip(losses.tolist(), weights)]


def train(
    problem: Problem, order: str, noise: float, seed: int, epochs: int, powers: slice, progress: tqdm
) -> list[Run]:
    """Train all whose samples come this way on the same batches, side by side."""
    np.random.seed(seed)  # of the shuffling loader and of the noise
    dataset, size = Rows(problem, noise), problem.batch_size
    # drop_last has nothing to drop here: all batches are complete. Else ASGD would need the sampler's batch_weights.
    if order == "samples":
        loader = paddle.io.DataLoader(dataset, batch_size=size, shuffle=True, drop_last=True)
    else:
        sampler = FixedBatchSampler(dataset, size, order, drop_last=True, seed=seed)
        loader = paddle.io.DataLoader(dataset, batch_sampler=sampler)
    largest = problem.lipschitz(FixedBatchSampler(dataset, size, drop_last=True, seed=0).batches)
    runs = [
        Run(problem, name, power, 2.0**power / largest)
        for name, method in METHODS.items()
        if (method.order, method.noise) == (order, noise)
        for power in method.powers[powers]
    ]
    weights = [run.weights for run in runs]
    for epoch in range(1, epochs + 1):
        # A loader that shuffles the samples has no batches that could be told apart.
        one_pass = ((None, batch) for batch in loader) if order == "samples" else sampler.enumerate(loader)
        for batch_index, (x, y) in one_pass:
            # The gradient of the sum by one run's weights is that of its own loss.
            mean_losses(problem, weights, x, y).sum().backward()
            for run in runs:
                if batch_index is not None:
                    run.optimizer.batch_index = batch_index
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", SlotMismatchWarning)
                    run.optimizer.step()
                if any(issubclass(warning.category, SlotMismatchWarning) for warning in caught):
                    run.warned_in = epoch
                run.optimizer.clear_grad()
        for run, loss in zip(runs, total_losses(problem, weights)):
            run.losses.append(loss)
        progress.update()
    return runs


class Result(NamedTuple):
    """A method with its best learning rate."""

    power: int
    excess: np.ndarray  # after every pass, the median over the seeds
    warned_in: list[int]  # the passes, of those seeds that were warned


def best(runs: list[Run], smallest: float) -> Result:
    """Of one method's runs, those with the learning rate that ends lowest in the median."""
    results = []
    for power in sorted({run.power for run in runs}):
        same = [run for run in runs if run.power == power]
        # What diverges may end as nan.
        excess = np.median([np.nan_to_num(np.array(run.losses), nan=np.inf) - smallest for run in same], axis=0)
        results.append(Result(power, excess, [run.warned_in for run in same if run.warned_in is not None]))
    return min(results, key=lambda result: result.excess[-1])


def draw(results: dict[str, dict[str, Result]], output: Path) -> None:
    """A panel for each problem, the distance to the smallest loss in powers of ten."""
    figure = Figure(figsize=(3 + 3.5 * len(results), 4.8), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (problem, methods) in zip(panels, results.items()):
        for number, (name, result) in enumerate(methods.items()):
            passes = np.arange(1, len(result.excess) + 1)
            # What is smaller than 1e-16 is rounding, and may be negative.
            axes.semilogy(passes, np.maximum(result.excess, 1e-16), ("-", "--")[number // 4], label=name)
        axes.set_title(problem)
        axes.set_xlabel("passes")
        axes.set_ylim(5e-17, 3)
        axes.grid(True, which="major", alpha=0.4)
    panels[0].set_ylabel("loss above the smallest possible")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(results))
    figure.savefig(output, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare SAG, in all orders of its batches, with SGD and Adam.")
    parser.add_argument("--quick", action="store_true", help="one problem, 15 passes, one seed, three learning rates")
    parser.add_argument("--seeds", type=int, default=3, help="how many; medians over them are reported")
    parser.add_argument("--output", type=Path, default=Path("sag_convergence.png"), help="picture of the losses")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds: received {arguments.seeds}, expected at least 1")
    if not arguments.output.parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")
    problems = [load_problem(load_breast_cancer, 16, 16)]
    if not arguments.quick:
        problems += [load_problem(load_breast_cancer, 16, 1), load_problem(load_digits, 64, 64)]
    epochs, seeds, powers = (15, 1, slice(1, 4)) if arguments.quick else (50, arguments.seeds, slice(None))

    ways = list(dict.fromkeys((method.order, method.noise) for method in METHODS.values()))
    progress = tqdm(total=len(problems) * len(ways) * seeds * epochs, unit="pass")
    results: dict[str, dict[str, Result]] = {}
    for problem in problems:
        smallest, runs = problem.smallest_loss(), []
        for order, noise in ways:
            for seed in range(seeds):
                progress.set_description(f"{problem.name}, {order}")
                runs += train(problem, order, noise, seed, epochs, powers, progress)
        results[problem.name] = {name: best([run for run in runs if run.name == name], smallest) for name in METHODS}
    progress.close()

    for name, methods in results.items():
        print(f"{name}: loss above the smallest possible after {epochs} passes, median over {seeds} seeds")
        for method, result in methods.items():
            warned = f"pass {', '.join(map(str, result.warned_in))}" if result.warned_in else "never"
            print(f"  {method:34} {result.excess[-1]:8.1e}  learning rate 2^{result.power:<3} / L  warned: {warned}")
    draw(results, arguments.output)
    print(f"Drawn to {arguments.output}")


if __name__ == "__main__":
    main()
