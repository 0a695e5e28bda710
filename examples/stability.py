# SPDX-License-Identifier: Apache-2.0
"""Finds the largest learning rate at which ASGD is stable, for several orders, thetas and numbers of batches.

    python examples/stability.py               # n from 2 to 2,000: under three minutes on two cores
    python examples/stability.py --quick       # n from 2 to 20: seconds

Least squares on patches of a photograph, in batches of 16. Stability does not depend on the targets, so they are 0 and
so is the minimum: what matters is whether the distance from it grows. The method is written here in NumPy, for many
learning rates at once, which is quicker than one run of the optimizer for each; tests/test_recipe.py compares the two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from sklearn.preprocessing import StandardScaler

ORDERS = ("reshuffle", "replacement", "sequential")
THETAS = (None, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0)
BATCH_SIZE = 16
PASSES = 30
PATCH = 6  # pixels, in height and in width
#: Learning rates times the largest curvature. The first grid finds the limit within a factor of 1.7, the second divides
#: that interval into steps of 7 %.
COARSE = 1.7 ** np.arange(-12.0, 5.0)
FINE = 1.7 ** (np.arange(1.0, 8.0) / 8)


class Columns:
    """SAG for many learning rates and thetas at once: one column of x, or one part along another axis, for each.

    Args:
        x: where they start.
        n: the number of batches.
        rates: the learning rates, of a shape that is broadcast to that of x.
        thetas: the thetas, likewise; NaN is SAG.
        weight_decay: a number of at least 0.
        weights: what each batch weighs, 1 on average; all weigh the same if None.
    """

    def __init__(
        self,
        x: np.ndarray,
        n: int,
        rates: np.ndarray,
        thetas: np.ndarray,
        weight_decay: float = 0.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.x, self.rates, self.weight_decay = x.copy(), rates, weight_decay
        self._theta, self._is_sag = thetas.copy(), np.isnan(thetas)
        self._weights = [1.0] * n if weights is None else weights
        self._d, self._y = np.zeros_like(x), np.zeros((n, *x.shape), x.dtype)
        self._seen: set[int] = set()
        self._weight_seen = 0.0

    def step(self, i: int, g: np.ndarray) -> None:
        """Take one step with the gradients of batch i."""
        weight = self._weights[i]
        if i not in self._seen:
            self._seen.add(i)
            self._weight_seen += weight
            # The formula of SAG is that of theta with theta = 1 / seen.
            self._theta[self._is_sag] = 1 / self._weight_seen
        change = g - self._y[i]
        change *= weight
        direction = self._theta * change
        direction += self._d / self._weight_seen
        if self.weight_decay:
            direction += self.weight_decay * self.x
        direction *= self.rates
        self.x -= direction
        self._d += change
        self._y[i] = g


def batch_order(order: str, n: int, draw: np.random.Generator) -> np.ndarray:
    """The numbers of the batches of one pass."""
    if order == "sequential":
        return np.arange(n)
    return draw.permutation(n) if order == "reshuffle" else draw.integers(n, size=n)


def load_patches(count: int) -> np.ndarray:
    """Standardised patches of a grey photograph, one a row, with the constant 1 as the last feature."""
    image = load_sample_image("china.jpg").mean(axis=2)
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH)).reshape(-1, PATCH * PATCH)
    rows = StandardScaler().fit_transform(windows[np.random.default_rng(0).permutation(len(windows))[:count]])
    return np.hstack([rows, np.ones((count, 1))])


def is_stable(
    batches: np.ndarray, order: str, rates: np.ndarray, thetas: np.ndarray, seed: int, method: type = Columns
) -> np.ndarray:
    """Whether the whole loss of every column falls: from the second third of the passes to the last, or to nearly 0."""
    n, size, features = batches.shape
    draw = np.random.default_rng(seed)
    columns = method(np.repeat(draw.normal(size=(features, 1)), len(rates), axis=1), n, rates, thetas)
    rows, losses = batches.reshape(-1, features), []
    # Where it has come so far, rounding decides what happens next.
    nearly_zero = np.log(1e-20 * len(columns.x))
    # Without targets the loss is a square, and its gradient is linear in x.
    hessian = rows.T @ rows / len(rows)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for _ in range(PASSES):
            for i in batch_order(order, n, draw):
                columns.step(i, batches[i].T @ (batches[i] @ columns.x) / size)
            losses.append(np.einsum("fc,fg,gc->c", columns.x, hessian, columns.x, optimize=True))
        second, last = (np.log(losses[k * PASSES // 3 : (k + 1) * PASSES // 3]).mean(axis=0) for k in (1, 2))
    # What has overflowed is NaN or Inf, and compares false.
    return (last < second) | (last < nearly_zero)


def largest_stable(
    batches: np.ndarray, order: str, thetas: Sequence[float | None], seed: int = 0, method: type = Columns
) -> np.ndarray:
    """For every theta, the largest learning rate below which all are stable, times the largest curvature."""
    rows = batches.reshape(-1, batches.shape[-1])
    curvature = np.linalg.norm(rows, 2) ** 2 / len(rows)
    numbers = np.array([np.nan if theta is None else theta for theta in thetas])
    found = np.zeros(len(numbers))
    grids = np.tile(COARSE, (len(numbers), 1))
    for _ in range(2):
        rates, columns = grids.ravel() / curvature, np.repeat(numbers, grids.shape[1])
        stable = is_stable(batches, order, rates, columns, seed, method).reshape(grids.shape)
        # Not the largest that is stable: with a small theta there may be stable rates above unstable ones.
        count = np.where(stable.all(axis=1), stable.shape[1], stable.argmin(axis=1))
        below = np.take_along_axis(grids, np.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        found = np.where(count > 0, below, found)
        grids = found[:, None] * FINE
    return found


def draw_picture(limits: dict[str, dict[int, np.ndarray]], output: Path) -> None:
    """One panel for each order, one line for each theta, over the number of batches."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(limits), sharey=True)
    for axes, (order, rows) in zip(panels, limits.items()):
        for theta, values in zip(THETAS, np.array(list(rows.values())).T):
            style = {"color": "black", "linestyle": "--"} if theta is None else {}
            axes.loglog(list(rows), values, marker="o", label=f"theta={theta}", **style)
        axes.axhline(2, color="grey", linewidth=0.8)
        axes.set_title(f'order="{order}"')
        axes.set_xlabel("number of batches n")
        axes.grid(True, which="major", alpha=0.4)
    panels[0].set_ylabel("largest stable learning rate\ntimes the largest curvature")
    panels[0].legend(fontsize="small")
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the largest stable learning rate of ASGD.")
    parser.add_argument("--quick", action="store_true", help="few batches: seconds")
    parser.add_argument("--output", type=Path, default=Path("stability.png"), help="picture of the limits")
    arguments = parser.parse_args()
    if not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")
    numbers = (2, 5, 20) if arguments.quick else (2, 5, 10, 35, 100, 300, 1000, 2000)
    patches = load_patches(BATCH_SIZE * max(numbers)).reshape(-1, BATCH_SIZE, PATCH * PATCH + 1)

    print("Largest stable learning rate times the largest curvature of the whole loss (full gradient descent: 2)")
    limits: dict[str, dict[int, np.ndarray]] = {}
    for order in ORDERS:
        print(f"\n{order:>11}  " + "  ".join(f"{'SAG' if theta is None else theta:>5}" for theta in THETAS))
        limits[order] = {}
        for n in numbers:
            limits[order][n] = largest_stable(patches[:n], order, THETAS)
            print(f"  n = {n:5}  " + "  ".join(f"{value:5.3f}" for value in limits[order][n]), flush=True)
    draw_picture(limits, arguments.output)
    print(f"\nDrawn to {arguments.output}")


if __name__ == "__main__":
    main()
