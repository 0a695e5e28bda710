# SPDX-License-Identifier: Apache-2.0
"""The optimizer and the reference side by side, which most tests of dygraph are made of. Must not hold tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from problems import TRAINABLE, Quadratic, state_of
from reference import Sag

from paddle_asgd import ASGD

#: Rounding of the arithmetic itself over the few dozen steps of a test, relative to the largest number of a tensor.
TOLERANCE = {"float64": 1e-13, "float32": 1e-6}


class Trial:
    """The optimizer and the reference, side by side on one problem."""

    def __init__(
        self, learning_rate: Any = 0.1, n: int = 3, dtype: str = "float64", shapes: Any = TRAINABLE, **options: Any
    ) -> None:
        self.problem = Quadratic(batches=n, shapes=shapes)
        self.tolerance = TOLERANCE[dtype]
        self.params = options.pop("params", None) or self.problem.parameters(dtype)
        options.setdefault("weight_decay", 0.1)
        self.optimizer = ASGD(learning_rate, n, options.pop("parameters", self.params), **options)
        method = {
            name: options.get(f"batch_{name}", options.get(name)) for name in ("weights", "theta", "history_dtype")
        }
        self.sag = Sag(self.problem.start, n, weight_decay=0.1, **method)
        self.steps = 0

    def gradients(self) -> list[np.ndarray]:
        """Where the reference stands."""
        return self.problem.gradients(self.steps, self.sag.x)

    def step(self, rate: Any = 0.1, grads: Sequence | None = None, index: int | None = None) -> None:
        """One step of both, and the comparison; ``grads`` is what the reference takes if not its own gradients.

        Args:
            index: which batch it is, and that both are told.
        """
        if index is not None:
            self.steps = index
            self.optimizer.batch_index = index
        self.problem.backward(self.steps, self.params)
        if self.sag.history_dtype is not None:
            # A last bit of a gradient may decide to which side it is rounded, so both must have the same one.
            grads = [param.grad.numpy() for param in self.params]
        self.optimizer.step()
        self.optimizer.clear_grad()
        self.follow(self.gradients() if grads is None else grads, rate, index)

    def follow(self, grads: Sequence, rate: Any = 0.1, index: int | None = None) -> None:
        """The reference's half of a step, and the comparison."""
        self.sag.step(grads, rate, index)
        self.steps += 1
        for p, param in enumerate(self.params):
            state = state_of(self.optimizer, param, ("d", "y", "y_scale", "m"))
            assert len(state) == 4 + (self.sag.stored[p] is not None) or not self.sag.m[p]
            self.sag.check(p, state, self.tolerance)
