# SPDX-License-Identifier: Apache-2.0
"""The running sum d against the sum of the history y, over many steps and after what is not finite. What x becomes is
not looked at; that is test_asgd.py's."""

from __future__ import annotations

from typing import Callable

import numpy as np
import paddle
import pytest
from reference import BLOCK, decode

from paddle_asgd import native

N = 100
#: Within so many steps every sum is computed anew (csrc/asgd_refresh.h, kRefreshPasses).
REFRESH = 8 * N
#: A part of one refresh unit, and three spans of units, the last of which has two, one of them not full.
SIZE, LARGE = 5 * 64 + 13, 2 * 4096 + 1025
BAR = 1e-6


class History:
    """Some parameters that only take steps, by the native call alone: a million of them must not take long.

    Args:
        kinds: the dtype of each parameter's history.
        size: the number of elements of each.
    """

    def __init__(self, kinds: list[str], size: int = SIZE) -> None:
        self.params = [paddle.zeros([size]) for _ in kinds]
        self.d = [paddle.zeros([size]) for _ in kinds]
        self.y = [paddle.zeros([N, size], kind) for kind in kinds]
        self.y_scale = [paddle.zeros([N, -(-size // BLOCK)]) for kind in kinds if kind != "float32"]
        self.m = [paddle.zeros([1], dtype="int64") for _ in kinds]

    def step(self, grads: list[paddle.Tensor]) -> None:
        native.asgd_update(self.params, grads, self.d, self.y, self.m, None, 0.001, 0.1, y_scale=self.y_scale)

    def stored(self) -> list[np.ndarray]:
        """What each history holds, in float64."""
        scales = iter(self.y_scale)
        return [
            y.numpy().astype(np.float64)
            if y.dtype == paddle.float32
            else np.array([decode(*slot) for slot in zip(y.numpy(), next(scales).numpy())])
            for y in self.y
        ]

    def drift(self) -> list[float]:
        """For each parameter the largest |d - sum(y)| / sum(|y|) of its elements."""
        result = []
        for d, y in zip(self.d, self.stored()):
            with np.errstate(invalid="ignore"):
                error = np.abs(d.numpy() - y.sum(axis=0)) / np.abs(y).sum(axis=0)
            result.append(np.nan_to_num(error, nan=np.inf).max())
        return result


def pool(draw: Callable[[], np.ndarray], count: int = 1009) -> list[paddle.Tensor]:
    """Gradients to take turns. A prime number of them: a slot of the history sees them all."""
    return [paddle.to_tensor(draw().astype(np.float32)) for _ in range(count)]


def test_a_million_steps() -> None:
    """With gradients around 0, and with gradients that all have one sign, whose sum is as large as it can be.

    Each of the latter is rounded to the sum's last place when it enters and again when it leaves. The two cancel, so
    the error does not grow: that of N numbers rounded to 2^-23 of the sum; 5 standard deviations of it are allowed.
    """
    random = np.random.default_rng(1)
    around_zero = pool(lambda: random.normal(0, 1, SIZE))
    one_sign = pool(lambda: random.normal(1, 0.1, SIZE))
    fours = [[zero, one, zero, zero] for zero, one in zip(around_zero, one_sign)]
    history = History(["float32", "float32", "int16", "int8"])
    worst = np.zeros(4)
    for step in range(1_000_000):
        history.step(fours[step % 1009])
        if step % 9973 == 9972:
            worst = np.maximum(worst, history.drift())
    assert [m.item() for m in history.m] == [1_000_000] * 4
    worst = np.maximum(worst, history.drift())
    assert worst[[0, 2, 3]].max() <= BAR
    assert worst[1] <= 5 * np.sqrt(N / 12) * 2.0**-23


def test_shrinking_gradients() -> None:
    """From 1e3 to 1e-3: what rounding of the large ones left behind must not outweigh the small ones."""
    random = np.random.default_rng(3)
    grads = [
        paddle.to_tensor((random.normal(0, 1, SIZE) * s).astype("float32")) for s in np.geomspace(1e3, 1e-3, 20_000)
    ]
    history = History(["float32", "int16", "int8"])
    for step, grad in enumerate(grads):
        history.step([grad] * 3)
        if step >= N and step % 97 == 0:
            assert max(history.drift()) <= BAR
    assert max(history.drift()) <= BAR


@pytest.mark.parametrize("bad", [1e30, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("start", [0, 350, 437])
@pytest.mark.parametrize("size", [SIZE, LARGE])
@pytest.mark.parametrize("kind", ["float32", "int16", "int8"])
def test_what_entered_once_leaves_no_trace(bad: float, start: int, size: int, kind: str) -> None:
    """Its slot is overwritten n steps later, and after one refresh more the sum knows nothing of it.

    The large tensor's gradients are multiples of 1/4, whose sums are exact: nothing but a trace can be left. A narrow
    history stores them as they are where the largest of a block is 1/4 of the largest integer.
    """
    random = np.random.default_rng(3)
    exact = size == LARGE

    def exact_sums() -> np.ndarray:
        values = random.integers(-8, 8, size) / 4
        if kind != "float32":
            values[::BLOCK] = np.iinfo(kind).max / 4
        return values

    grads = pool(exact_sums if exact else lambda: random.normal(0, 1, size), 101)
    history = History([kind], size)
    for step in range(start):
        history.step([grads[step % 101]])
    history.step([paddle.full([size], bad)])
    for step in range(start + 1, start + 1 + N):
        history.step([grads[step % 101]])
    assert max(history.drift()) > BAR, "the slot is overwritten, and already nothing is left"
    for step in range(start + 1 + N, start + N + REFRESH):
        history.step([grads[step % 101]])
    assert max(history.drift()) <= (0 if exact else BAR)
