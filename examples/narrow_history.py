# SPDX-License-Identifier: Apache-2.0
"""Measures how near to the smallest loss ASGD comes with a history in 16 and in 8 bits.

    python examples/narrow_history.py            # about a minute on two cores: a table and a picture
    python examples/narrow_history.py --full     # 300 passes, and batches of one sample, too: about ten minutes

Three convex problems on scikit-learn's data: breast cancer (logistic), digits (softmax), and diabetes with all products
of two features (ridge). Each history may choose the best of several learning rates. All but the histories is float64.

A history is narrow from 4,096 elements of a tensor on, and these models have 31, 650 and 66. So one tensor holds many
runs of a model, each of which has its samples dealt to the batches in another way. A run is filled up with zeros to
whole blocks of 128, so no two runs share a block, and each is stored as if it were alone.
"""

from __future__ import annotations

import argparse
import zlib  # noqa: F401  Paddle 2.6 brings a zlib of its own, which breaks Python's unless that is loaded first
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import paddle
from matplotlib.figure import Figure
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from tqdm import tqdm

from paddle_asgd import ASGD, FixedBatchSampler

BLOCK, NARROW_FROM = 128, 4096
#: Learning rates that are tried: these powers of 2 over L, the largest curvature that the loss of a batch can have.
POWERS = (0, 1, 2, 3)
#: Above this the curves of narrow histories are compared with that of the exact one.
COMPARED_ABOVE = 1e-9
#: What is smaller than this is rounding, and may be negative.
ROUNDING = 1e-16


class History(NamedTuple):
    """One way to keep gradients, and what is passed to ASGD for it."""

    label: str
    dtype: str | None
    theta: float | None = None
    #: what the learning rate is multiplied by in the last quarter of the passes
    at_the_end: float = 1.0


HISTORIES = (
    History("exact, float64", None),
    History("int16", "int16"),
    History("int8", "int8"),
    History("int8, theta=1", "int8", 1.0),
    History("int8, theta=1, at the end a quarter of the rate", "int8", 1.0, 0.25),
)


class Problem(NamedTuple):
    """Samples, targets with a column for each score, and a function from scores and targets to losses and slopes."""

    name: str
    samples: np.ndarray
    targets: np.ndarray
    loss: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    curvature: float  # the largest of the loss as a function of the scores
    weight_decay: float
    batch_size: int
    passes: int = 100

    @property
    def shape(self) -> tuple[int, int]:
        return self.samples.shape[1], self.targets.shape[1]

    def objective(self, weights: np.ndarray) -> np.ndarray:
        """The mean loss and half of the decay times the squared weights, for each matrix of weights."""
        features, scores = self.shape
        # One product of two matrices is much faster than one for each matrix of weights.
        flat = weights.reshape(-1, features, scores).swapaxes(0, 1).reshape(features, -1)
        losses = self.loss((self.samples @ flat).reshape(len(self.samples), -1, scores), self.targets[:, np.newaxis])[0]
        squares = np.square(weights).sum(axis=(-2, -1))
        return losses.mean(axis=0).reshape(squares.shape) + self.weight_decay / 2 * squares

    def smallest(self) -> float:
        """By the closed form or by Newton's method."""
        count, (features, scores) = len(self.samples), self.shape
        if self.loss is squared:
            hessian = self.samples.T @ self.samples / count + self.weight_decay * np.eye(features)
            return float(self.objective(np.linalg.solve(hessian, self.samples.T @ self.targets / count)))
        labels = self.targets[:, 0] if scores == 1 else self.targets.argmax(axis=1)
        strength = 1 / (self.weight_decay * count)
        model = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cg", tol=1e-13, max_iter=1000)
        return float(self.objective(model.fit(self.samples, labels).coef_.T))


def squared(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.square(scores - targets)[..., 0] / 2, scores - targets


def logistic(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For targets of -1 and 1."""
    margins = targets * scores
    return np.logaddexp(0, -margins)[..., 0], -targets / (1 + np.exp(margins))


def softmax(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For targets that are 1 in the column of the class."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    powers = np.exp(shifted)
    total = powers.sum(axis=-1, keepdims=True)
    return np.log(total)[..., 0] - (shifted * targets).sum(axis=-1), powers / total - targets


def whole_batches(samples: np.ndarray, targets: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """With a last feature of 1, and cut at random to a multiple of the batch size."""
    kept = np.random.default_rng(0).permutation(len(samples))[: len(samples) // batch_size * batch_size]
    return np.hstack([samples, np.ones((len(samples), 1))])[kept], targets[kept]


def make_problems(full: bool) -> list[Problem]:
    scale = StandardScaler().fit_transform
    samples, labels = datasets.load_breast_cancer(return_X_y=True)
    cancer = scale(samples), 2.0 * labels[:, np.newaxis] - 1
    samples, labels = datasets.load_digits(return_X_y=True)
    digits = samples / 16, np.eye(10)[labels]
    samples, targets = datasets.load_diabetes(return_X_y=True)
    products = PolynomialFeatures(2, include_bias=False).fit_transform(scale(samples))
    diabetes = scale(products), scale(targets[:, np.newaxis])
    found = [
        Problem("breast cancer", *whole_batches(*cancer, 16), logistic, 0.25, 0.01, 16),
        Problem("digits", *whole_batches(*digits, 64), softmax, 0.5, 0.01, 64),
        Problem("ridge", *whole_batches(*diabetes, 13), squared, 1.0, 0.1, 13),
    ]
    if not full:
        return found
    one_by_one = Problem("breast cancer, one by one", *whole_batches(*cancer, 1), logistic, 0.25, 0.01, 1)
    return [*(problem._replace(passes=300) for problem in found), one_by_one]


class Runs:
    """Many runs of one problem side by side, on the same batches with each history and learning rate."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.size = problem, int(np.prod(problem.shape))
        self.width = -(-self.size // BLOCK) * BLOCK
        self.runs = -(-NARROW_FROM // self.width)
        samplers = [
            FixedBatchSampler(problem.samples, problem.batch_size, order="replacement", seed=run)
            for run in range(self.runs)
        ]
        # Which samples: of each batch, in each run.
        dealt = np.array([sampler.batches for sampler in samplers]).swapaxes(0, 1)
        self.samples, self.targets = problem.samples[dealt], problem.targets[dealt]
        self.transposed = self.samples.swapaxes(-2, -1) / problem.batch_size
        self.sampler = samplers[0]  # the order of the batches is the same in all runs
        norms = (np.linalg.norm(batch, 2) for run in self.samples for batch in run)
        self.largest = max(norms) ** 2 / problem.batch_size * problem.curvature + problem.weight_decay
        smallest, start = problem.smallest(), float(problem.objective(np.zeros(problem.shape)))
        self.excess = lambda weights: (problem.objective(weights) - smallest) / (start - smallest)

    def weights(self, x: np.ndarray) -> np.ndarray:
        """Of each learning rate and run."""
        return x[..., : self.size].reshape(*x.shape[:-1], *self.problem.shape)

    def gradients(self, index: int, x: np.ndarray) -> np.ndarray:
        """Of one batch's mean loss in each run, without the decay, which the optimizer adds."""
        rates, (features, scores) = len(x), self.problem.shape
        by_run = self.weights(x).transpose(1, 2, 0, 3).reshape(self.runs, features, -1)
        found = (self.samples[index] @ by_run).reshape(self.runs, -1, rates, scores)
        slopes = self.problem.loss(found, self.targets[index][:, :, np.newaxis])[1]
        gradients = self.transposed[index] @ slopes.reshape(self.runs, -1, rates * scores)
        filled = np.zeros(x.shape)
        filled[..., : self.size] = (
            gradients.reshape(self.runs, features, rates, scores).transpose(2, 0, 1, 3).reshape(rates, self.runs, -1)
        )
        return filled

    def train(self, history: History, progress: Any) -> np.ndarray:
        """Of each pass, learning rate and run, the loss above the smallest, over that at the start."""
        zero = paddle.nn.initializer.Constant(0.0)
        shape = [self.runs, self.width]
        params = [paddle.create_parameter(shape, "float64", default_initializer=zero) for _ in POWERS]
        rates = [2.0**power / self.largest for power in POWERS]
        optimizers = [
            ASGD(
                rate,
                self.sampler.batch_num,
                [param],
                weight_decay=self.problem.weight_decay,
                theta=history.theta,
                history_dtype=history.dtype,
                watch=False,  # learning rates that are too large would make it warn
            )
            for rate, param in zip(rates, params)
        ]
        curves = []
        for epoch in range(self.problem.passes):
            if epoch == self.problem.passes * 3 // 4:
                for optimizer, rate in zip(optimizers, rates):
                    optimizer.set_lr(history.at_the_end * rate)
            for index in self.sampler.epoch_order(epoch):
                x = np.array([param.numpy() for param in params])
                for param, optimizer, gradient in zip(params, optimizers, self.gradients(index, x)):
                    param.grad = paddle.to_tensor(gradient)
                    optimizer.batch_index = index
                    optimizer.step()
            curves.append(self.excess(self.weights(np.array([param.numpy() for param in params]))))
            progress.update()
        # Runs that diverge end as inf or NaN.
        return np.nan_to_num(curves, nan=np.inf, posinf=np.inf)


def ends(curves: np.ndarray, passes: int) -> np.ndarray:
    """Where each learning rate and run is after so many passes: the mean of the last tenth, since floors are noisy."""
    return curves[passes - -(-passes // 10) : passes].mean(axis=0)


def best(curves: np.ndarray, passes: int) -> int:
    """The learning rate whose runs end lowest on average; the largest of those that end at rounding."""
    lowest = np.maximum(ends(curves, passes).mean(axis=-1), 10 * ROUNDING)
    return len(lowest) - 1 - int(np.argmin(lowest[::-1]))


def largest_ratio(narrow: np.ndarray, exact: np.ndarray) -> float:
    """Between two curves, as long as the exact one is above ``COMPARED_ABOVE``."""
    compared = exact > COMPARED_ABOVE
    return float((narrow[compared] / exact[compared]).max())


def draw(problems: list[Problem], found: list[list[np.ndarray]], output: Path) -> None:
    """The exact, int16 and int8 curves at the learning rate that is best for the exact one; theta=1 at its own best."""
    figure = Figure(figsize=(4 * len(problems), 4.2), layout="constrained")
    for axes, problem, curves in zip(figure.subplots(1, len(problems), sharey=True), problems, found):
        for history, values, style in zip(HISTORIES, curves, ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))):
            rate = best(curves[0] if history.theta is None else values, problem.passes)
            mean = np.maximum(values[:, rate].mean(axis=-1), ROUNDING)
            axes.semilogy(np.arange(1, len(mean) + 1), mean, linestyle=style, linewidth=1.6, label=history.label)
        axes.set_title(problem.name)
        axes.set_xlabel("pass")
        axes.set_xlim(0, problem.passes)
        axes.grid(True, which="major", alpha=0.4)
    figure.axes[0].set_ylabel("loss above the smallest, over that at the start")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(HISTORIES))
    figure.savefig(output, dpi=100)


def report(problems: list[Problem], found: list[list[np.ndarray]], passes: int) -> None:
    """A table of where each history is after so many passes."""
    print(f"Loss above the smallest, over that at the start, after {passes} passes, at the best of the learning rates:")
    width = max(len(history.label) for history in HISTORIES)
    print(f"  {'':{width}}" + "".join(f"  {problem.name:>25}" for problem in problems))
    for h, history in enumerate(HISTORIES):
        cells = []
        for curves in found:
            rate = best(curves[h], passes)
            cells.append(f"{ends(curves[h], passes)[rate].mean():.1e} at {2 ** POWERS[rate]}/L")
        print(f"  {history.label:{width}}" + "".join(f"  {cell:>25}" for cell in cells))


def compare(problems: list[Problem], found: list[list[np.ndarray]]) -> None:
    """How far int16 is from the exact history before its floor."""
    print(f"At the best learning rate of the exact history, as long as that is above {COMPARED_ABOVE:g}:")
    for problem, curves in zip(problems, found):
        rate = best(curves[0], problem.passes)
        exact, int16 = (curves[h][:, rate].mean(axis=-1) for h in range(2))
        print(f"  {problem.name}: int16 is at most {largest_ratio(int16, exact):.3f} times as high")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a history in 16 and in 8 bits costs in accuracy.")
    parser.add_argument("--full", action="store_true", help="four problems and 300 passes")
    parser.add_argument("--passes", type=int, help="for all problems")
    parser.add_argument("--output", type=Path, default=Path("narrow_history.png"), help="picture of the losses")
    arguments = parser.parse_args()
    if arguments.passes is not None and arguments.passes < 1:
        parser.error(f"--passes: received {arguments.passes}, expected at least 1")
    if not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")

    problems = make_problems(arguments.full)
    if arguments.passes is not None:
        problems = [problem._replace(passes=arguments.passes) for problem in problems]
    total = len(HISTORIES) * sum(problem.passes for problem in problems)
    with tqdm(total=total, desc=f"{len(HISTORIES)} histories", unit="pass") as progress, np.errstate(all="ignore"):
        found = [[runs.train(history, progress) for history in HISTORIES] for runs in map(Runs, problems)]
    report(problems, found, min(problem.passes for problem in problems))
    longer = [k for k, problem in enumerate(problems) if problem.passes > min(p.passes for p in problems)]
    if longer:
        report([problems[k] for k in longer], [found[k] for k in longer], problems[longer[0]].passes)
    compare(problems, found)
    draw(problems, found, arguments.output)
    print(f"Drawn to {arguments.output}")


if __name__ == "__main__":
    main()
