"""The judge: SAG in float64 NumPy, one line of code for one line of the formula. Must know nothing of the package, of
Paddle, or of how either computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

import numpy as np

Scalars = Union[float, Sequence[float]]


class Sag:
    """The method for a list of parameters; x, d, y and m are lists that run parallel to it.

    Args:
        x: where the parameters start.
        n: the number of batches.
        weight_decay: one number, or one for each parameter.
    """

    def __init__(self, x: Sequence[np.ndarray], n: int, weight_decay: Scalars = 0.0) -> None:
        self.n = n
        self.weight_decay = weight_decay
        self.x = [np.array(value, dtype=np.float64) for value in x]
        self.d = [np.zeros(value.shape) for value in self.x]
        self.y = [np.zeros((n, *value.shape)) for value in self.x]
        self.m = [0 for _ in self.x]

    def step(self, grads: Sequence[np.ndarray | None], learning_rate: Scalars) -> None:
        """One step. A parameter whose gradient is None is skipped, and its clock m stands still."""
        rates = np.broadcast_to(learning_rate, len(self.x))
        decays = np.broadcast_to(self.weight_decay, len(self.x))
        for p, (g, rate, decay) in enumerate(zip(grads, rates, decays)):
            if g is None:
                continue
            g = np.asarray(g, dtype=np.float64)
            i = self.m[p] % self.n
            self.d[p] = self.d[p] - self.y[p][i] + g
            self.y[p][i] = g
            self.m[p] = self.m[p] + 1
            self.x[p] = self.x[p] - rate * (self.d[p] / min(self.m[p], self.n) + decay * self.x[p])

    def check(self, p: int, state: Mapping[str, np.ndarray], tolerance: float) -> None:
        """Compare what was computed for parameter p, some or all of x, d, y and m, with what is right.

        The tolerance is relative to the largest number of each array. d carries the rounding of all gradients that
        were added to it and taken away again, so its scale is the sum of their magnitudes.
        """
        if "m" in state:
            assert state["m"].tolist() == [self.m[p]]
        scales = {"x": np.abs(self.x[p]), "d": np.abs(self.y[p]).sum(axis=0), "y": np.abs(self.y[p])}
        for name in scales.keys() & state.keys():
            expected, bound = getattr(self, name)[p], tolerance * scales[name].max(initial=1)
            assert state[name].shape == expected.shape, name
            np.testing.assert_allclose(state[name], expected, rtol=0, atol=bound, err_msg=f"{name} of parameter {p}")
