# SPDX-License-Identifier: Apache-2.0
"""The judge: SAG, averaged SGD and averages of weights in float64 NumPy, one line of code for one line of the formula.
Must know nothing of the package, of Paddle, or of how either computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

import numpy as np

Scalars = Union[float, Sequence[float]]

#: So many elements of a narrow slot share a scale. Tensors with fewer than SMALLEST elements keep exact gradients.
BLOCK, SMALLEST = 128, 4096


def encode(g: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What a narrow history keeps of a gradient: integers of the gradient's shape, and a scale for each block.

    The arithmetic is float32 here too, because the integers and scales have to be the same to the bit.
    """
    largest = np.float32(np.iinfo(dtype).max)
    bound = np.finfo(np.float32).max
    g = np.asarray(g)
    single = np.where(np.isfinite(g), np.clip(g, -bound, bound), g).astype(np.float32)
    blocks = np.pad(single.ravel(), (0, -single.size % BLOCK)).reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1)  # NaN where there is one
    finite = np.isfinite(absmax)
    kept = finite & (absmax >= np.float32(1e-30))
    inverse = largest / np.where(kept, absmax, np.float32(1))
    quotients = np.where(kept[:, np.newaxis], blocks, np.float32(0)) * inverse[:, np.newaxis]
    q = np.clip(np.rint(quotients), -largest, largest).astype(dtype)
    scale = np.where(kept, np.minimum(absmax, np.float32(3.4e38)) / largest, np.where(finite, 0, np.nan))
    return q.ravel()[: single.size].reshape(single.shape), scale.astype(np.float32)


def decode(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The gradient that ``encode`` has kept, in float64."""
    return q * np.repeat(scale.astype(np.float64), BLOCK)[: q.size].reshape(q.shape)


class Sag:
    """The method for a list of parameters; x, d, y, m and the slots seen are lists that run parallel to it.

    Args:
        x: where the parameters start.
        n: the number of batches.
        weight_decay: one number, or one for each parameter.
        weights: what each batch weighs; all the same if None.
        theta: how much of a gradient's change enters the direction; None is SAG.
        history_dtype: "int16" or "int8" for a narrow history; y then holds what is decoded from it.
        smallest: the elements from which on a parameter's history is narrow.
    """

    def __init__(
        self,
        x: Sequence[np.ndarray],
        n: int,
        weight_decay: Scalars = 0.0,
        weights: Sequence[float] | None = None,
        theta: float | None = None,
        history_dtype: str | None = None,
        smallest: int = SMALLEST,
    ) -> None:
        self.n = n
        self.weight_decay = weight_decay
        self.w = np.ones(n) if weights is None else np.array(weights) / np.mean(weights)
        self.theta = theta
        self.x = [np.array(value, dtype=np.float64) for value in x]
        self.d = [np.zeros(value.shape) for value in self.x]
        self.y = [np.zeros((n, *value.shape)) for value in self.x]
        self.history_dtype = history_dtype
        #: the integers and the scales of each narrow history; None of the others
        self.stored: list[tuple[np.ndarray, np.ndarray] | None] = [
            (np.zeros(y.shape, history_dtype), np.zeros((n, -(-value.size // BLOCK)), np.float32))
            if history_dtype and value.size >= smallest
            else None
            for value, y in zip(self.x, self.y)
        ]
        self.m = [0 for _ in self.x]
        self.seen = [np.zeros(n, dtype=bool) for _ in self.x]

    def step(self, grads: Sequence[np.ndarray | None], learning_rate: Scalars, index: int | None = None) -> None:
        """One step of batch ``index``. A parameter whose gradient is None is skipped, and its clock m stands still."""
        rates = np.broadcast_to(learning_rate, len(self.x))
        decays = np.broadcast_to(self.weight_decay, len(self.x))
        for p, (g, rate, decay) in enumerate(zip(grads, rates, decays)):
            if g is None:
                continue
            g = np.asarray(g, dtype=np.float64)
            i = self.m[p] % self.n if index is None else index
            d, y_i = self.d[p], self.y[p][i].copy()
            self.y[p][i] = self.keep(p, i, g)
            self.d[p] = d - self.w[i] * y_i + self.w[i] * self.y[p][i]
            self.m[p] = self.m[p] + 1
            self.seen[p][i] = True
            direction = self.d[p] / self.weight_seen(p)
            if self.theta is not None:
                direction = self.theta * self.w[i] * (g - y_i) + d / self.weight_seen(p)
            self.x[p] = self.x[p] - rate * (direction + decay * self.x[p])

    def keep(self, p: int, i: int, g: np.ndarray) -> np.ndarray:
        """Put a gradient into the slot; returns what can be read from there."""
        if self.stored[p] is None:
            return g
        q, scale = self.stored[p]
        q[i], scale[i] = encode(g, self.history_dtype)
        return decode(q[i], scale[i])

    def weight_seen(self, p: int) -> float:
        """The divisor of d: what the batches seen so far weigh together, for weights of mean 1."""
        return self.w[self.seen[p]].sum()

    def gradient_norm(self) -> float:
        """Of the whole gradient as far as the history knows it."""
        decays = np.broadcast_to(self.weight_decay, len(self.x))
        known = [self.d[p] / self.weight_seen(p) + decay * self.x[p] for p, decay in enumerate(decays) if self.m[p]]
        return np.sqrt(sum(np.square(value).sum() for value in known))

    def check(self, p: int, state: Mapping[str, np.ndarray], tolerance: float) -> None:
        """Compare what was computed for parameter p, some or all of x, d, y and m, with what is right.

        A narrow y, and its y_scale, must have the same bits. For the others the tolerance is relative to the largest
        number of each array. d carries the rounding of all gradients that
        were added to it and taken away again, so its scale is the sum of their magnitudes.
        """
        if "m" in state:
            assert state["m"][0] == self.m[p]
            # One number while the slots take turns; else the slots seen, how many and which.
            if len(state["m"]) > 1:
                marks = np.unpackbits(state["m"][2:].view(np.uint8), bitorder="little")
                assert state["m"][1] == self.seen[p].sum()
                np.testing.assert_array_equal(marks, np.pad(self.seen[p], (0, -self.n % 64)))
        assert ("y_scale" in state) == ("y" in state and self.stored[p] is not None)
        if "y_scale" in state:
            for name, expected in zip(("y", "y_scale"), self.stored[p]):
                assert state[name].dtype == expected.dtype
                np.testing.assert_array_equal(state[name], expected, err_msg=f"{name} of parameter {p}")
            state = {name: value for name, value in state.items() if name not in ("y", "y_scale")}
        summands = self.w.reshape(-1, *[1] * self.x[p].ndim) * np.abs(self.y[p])
        scales = {"x": np.abs(self.x[p]), "d": summands.sum(axis=0), "y": np.abs(self.y[p])}
        for name in scales.keys() & state.keys():
            expected, bound = getattr(self, name)[p], tolerance * scales[name].max(initial=1)
            assert state[name].shape == expected.shape, name
            np.testing.assert_allclose(state[name], expected, rtol=0, atol=bound, err_msg=f"{name} of parameter {p}")


class AveragedSgd:
    """Averaged SGD for a list of parameters; x, ax, steps, t0 and eta are lists that run parallel to it.

    Args:
        x: where the parameters start.
        lambd, alpha, t0, weight_decay, maximize: as torch.optim.ASGD takes them; weight_decay also one a parameter.
        lags: whether a step takes the eta that the one before has left, as torch's does, or that of its own rate.
    """

    def __init__(
        self,
        x: Sequence[np.ndarray],
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: Scalars = 0.0,
        maximize: bool = False,
        lags: bool = False,
    ) -> None:
        self.lambd, self.alpha, self.weight_decay = lambd, alpha, weight_decay
        self.sign = -1.0 if maximize else 1.0
        self.lags = lags
        self.x = [np.array(value, dtype=np.float64) for value in x]
        self.ax = [np.zeros(value.shape) for value in self.x]
        self.steps = [0 for _ in self.x]
        self.t0 = [t0 for _ in self.x]
        self.eta = [0.0 for _ in self.x]

    def step(self, grads: Sequence[np.ndarray | None], learning_rate: Scalars) -> None:
        """One step. A parameter whose gradient is None is skipped, and its clock stands still."""
        rates = np.broadcast_to(learning_rate, len(self.x))
        decays = np.broadcast_to(self.weight_decay, len(self.x))
        for p, (g, rate, decay) in enumerate(zip(grads, rates, decays)):
            if g is None:
                continue
            k = self.steps[p]
            eta = self.eta[p] if self.lags and k else self.eta_after(rate, k)
            mu = 1 / max(1, k - self.t0[p])
            g = self.sign * np.asarray(g, dtype=np.float64) + decay * self.x[p]
            self.x[p] = (1 - self.lambd * eta) * self.x[p] - eta * g
            self.ax[p] = self.ax[p] + mu * (self.x[p] - self.ax[p]) if mu < 1 else self.x[p]
            self.eta[p] = self.eta_after(rate, k + 1)
            self.steps[p] = k + 1

    def eta_after(self, rate: float, steps: int) -> float:
        """eta of the step that comes after so many."""
        return float(rate / (1 + self.lambd * rate * steps) ** self.alpha)

    def start_averaging(self) -> None:
        """From now on, by each parameter's own clock."""
        self.t0 = list(self.steps)

    def check(self, p: int, state: Mapping[str, np.ndarray], tolerance: float) -> None:
        """Compare what was computed for parameter p, some or all of x, ax, step and eta, with what is right.

        The tolerance is relative to the largest number of each array.
        """
        expected = {"x": self.x[p], "ax": self.ax[p], "step": np.array([self.steps[p]]), "eta": np.array([self.eta[p]])}
        for name in expected.keys() & state.keys():
            bound = tolerance * np.abs(expected[name]).max(initial=1)
            assert state[name].shape == expected[name].shape, name
            np.testing.assert_allclose(state[name], expected[name], 0, bound, err_msg=f"{name} of parameter {p}")


def average(a: np.ndarray, x: np.ndarray, weight: float) -> np.ndarray:
    """One update of an average of weights, in the precision of ``a``."""
    return a + a.dtype.type(weight) * (x.astype(a.dtype) - a)
