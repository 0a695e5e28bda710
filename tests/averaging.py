# SPDX-License-Identifier: Apache-2.0
"""A network with every kind of tensor, and the float64 averages that an AveragedModel of it must have.

Must not hold tests, nor use the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
import paddle
from reference import average

#: Copied, not averaged: BatchNorm's statistics, the buffers, and what is frozen.
COPIED = ("norm._mean", "norm._variance", "seen", "scale", "mask", "frozen")


class Network(paddle.nn.Layer):
    """Trainable, shared and frozen parameters, BatchNorm, and buffers of four kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = paddle.nn.Linear(4, 5), paddle.nn.BatchNorm1D(5), paddle.nn.Linear(5, 2)
        self.tied = paddle.nn.Linear(5, 2)
        self.tied.weight = self.last.weight
        self.frozen = self.create_parameter([3], default_initializer=paddle.nn.initializer.Constant(0.75))
        self.frozen.stop_gradient = True
        self.register_buffer("seen", paddle.zeros([1], "int64"))
        self.register_buffer("scale", paddle.ones([2]))
        self.register_buffer("mask", paddle.to_tensor([True, False]))
        self.register_buffer("passing", paddle.zeros([2]), persistable=False)

    def forward(self, x: Any) -> Any:
        hidden = paddle.tanh(self.norm(self.first(x)))
        return (self.last(hidden) + self.tied(hidden)) * self.scale


def batches(count: int, seed: int = 3) -> list[paddle.Tensor]:
    draw = np.random.default_rng(seed)
    return [paddle.to_tensor(draw.normal(size=[6, 4]).astype("float32")) for _ in range(count)]


def train(model: Any, optimizer: Any, batch: Any) -> None:
    """One step, after which the buffers differ, too."""
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.clear_grad()
    with paddle.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("seen"):
                buffer.add_(paddle.ones_like(buffer))
            elif name.endswith("scale"):
                buffer.scale_(1.01)
            elif name.endswith("mask"):
                buffer.set_value(paddle.logical_not(buffer))


def arrays(model: Any) -> dict[str, np.ndarray]:
    """Copies of all that ``state_dict()`` names; of bfloat16 as float32."""
    return values(model.state_dict() if isinstance(model, paddle.nn.Layer) else model)


def values(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        name: (t.astype("float32") if "bfloat16" in str(t.dtype) else t).numpy().copy() for name, t in tensors.items()
    }


def bits(model: Any) -> dict[str, bytes]:
    """Of all that ``state_dict()`` names."""
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


class Judge:
    """The averages by the formula, in float64.

    Args:
        start: the model's arrays at the beginning.
        decay: of update t.
        copied: the names of what is copied.
    """

    def __init__(
        self, start: dict[str, np.ndarray], decay: Callable[[int], float], copied: Sequence[str] = COPIED
    ) -> None:
        self.decay, self.copied, self.updates = decay, copied, 0
        self.averages = {name: self._kept(name, value) for name, value in start.items()}

    def _kept(self, name: str, value: np.ndarray) -> np.ndarray:
        return value if name in self.copied else value.astype("float64")

    def update(self, model: dict[str, np.ndarray]) -> None:
        self.updates += 1
        weight = 1 - self.decay(self.updates)
        for name, value in model.items():
            old = self.averages[name]
            self.averages[name] = value if name in self.copied else average(old, value, weight)

    def check(self, received: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
        assert received.keys() == self.averages.keys()
        for name, expected in self.averages.items():
            if name in self.copied:
                assert received[name].dtype == expected.dtype, name
                assert received[name].tobytes() == expected.tobytes(), name
            else:
                np.testing.assert_allclose(received[name], expected, rtol=tolerance, atol=tolerance, err_msg=name)
