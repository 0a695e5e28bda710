# SPDX-License-Identifier: Apache-2.0
"""AveragedSGD and the reference side by side, which most of its tests are made of. Must not hold tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from problems import TRAINABLE, Quadratic, state_of
from reference import AveragedSgd
from trial import TOLERANCE

from paddle_asgd import AveragedSGD

KEPT = ("ax", "step", "t0", "eta")
#: The numbers of the method, none of them at its default, so that each shows.
METHOD = {"lambd": 0.3, "alpha": 0.6, "t0": 3}


def averaged_state_of(optimizer: Any, param: paddle.Tensor) -> dict[str, np.ndarray]:
    """Copies of x and of all that is kept of a parameter."""
    return state_of(optimizer, param, KEPT)


def reference(start: Sequence[np.ndarray], weight_decay: Any = 0.1, **options: Any) -> AveragedSgd:
    """The reference for an optimizer of METHOD and these options."""
    lags = options.get("torch_compatible", False)
    return AveragedSgd(start, **METHOD, weight_decay=weight_decay, maximize=options.get("maximize", False), lags=lags)


class AveragedTrial:
    """The optimizer and the reference, side by side on one problem."""

    def __init__(
        self, learning_rate: Any = 0.1, dtype: str = "float64", shapes: Any = TRAINABLE, **options: Any
    ) -> None:
        self.problem = Quadratic(batches=3, shapes=shapes)
        self.tolerance = TOLERANCE[dtype]
        self.params = self.problem.parameters(dtype)
        self.reference = reference(self.problem.start, **options)
        options = {**METHOD, "weight_decay": 0.1, **options}
        groups = options.pop("groups", lambda params: params)
        # eta and mu are not rounded to float32: the reference's are not.
        paddle.set_default_dtype("float64")
        try:
            self.optimizer = AveragedSGD(learning_rate, parameters=groups(self.params), **options)
        finally:
            paddle.set_default_dtype("float32")
        self.steps = 0

    def gradients(self) -> list[np.ndarray]:
        """Where the reference stands."""
        return self.problem.gradients(self.steps, self.reference.x)

    def step(self, rate: Any = 0.1, grads: Sequence | None = None, among: Sequence[int] | None = None) -> None:
        """One step of both, and the comparison.

        Args:
            grads: what the reference takes if not its own gradients.
            among: which parameters have a gradient; all if None.
        """
        self.problem.backward(self.steps, self.params, among)
        self.optimizer.step()
        self.optimizer.zero_grad()
        grads = self.gradients() if grads is None else grads
        given = range(len(self.params)) if among is None else among
        self.reference.step([g if i in given else None for i, g in enumerate(grads)], rate)
        self.steps += 1
        self.check()

    def check(self) -> None:
        for p, param in enumerate(self.params):
            state = averaged_state_of(self.optimizer, param)
            assert "step" in state or not self.reference.steps[p]
            self.reference.check(p, state, self.tolerance)

    def averages(self) -> list[bool]:
        """Which parameters have an average."""
        return ["ax" in averaged_state_of(self.optimizer, param) for param in self.params]
