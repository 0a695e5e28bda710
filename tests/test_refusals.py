# SPDX-License-Identifier: Apache-2.0
"""Bad input at a step: the promised exception, its text with the culprit and the value, and nothing written.

What the constructor refuses is in test_arguments.py and test_checks.py, what the native call refuses in test_native.py.
Must not test what is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import Quadratic
from refusing import INF, NAN, Row, assert_refused, content, named, table

from paddle_asgd import ASGD


class Training:
    """Two parameters that have taken some steps, in one bucket or, as groups, in two."""

    def __init__(self, steps: int, as_groups: bool, options: dict | None = None) -> None:
        self.problem = Quadratic(batches=3, shapes=[[3, 2], [257]])
        self.params = [named("first", [3, 2]), named("second", [257])]
        groups = [{"params": [p], "learning_rate": r} for p, r in zip(self.params, (0.5, 1.0))]
        arguments = {"learning_rate": 0.1, "batch_num": 3, "weight_decay": 0.25, **(options or {})}
        self.optimizer = ASGD(parameters=groups if as_groups else self.params, **arguments)
        self.train(range(steps))

    def train(self, steps: Sequence[int]) -> None:
        for step in steps:
            self.problem.backward(step, self.params)
            self.optimizer.step()
            self.optimizer.clear_grad()

    def content(self) -> list:
        state = {k: v for k, v in self.optimizer.state_dict().items() if isinstance(v, paddle.Tensor)}
        return [content(self.params), content([state[key] for key in sorted(state)])]


def assert_step_refused(make: Callable, error: type, pieces: Sequence[str], steps: int, as_groups: bool) -> None:
    """Refused, nothing written, and what follows is as if the call had never been."""
    runs = []
    for spoilt in (True, False):
        options, spoil, mend, call = make()
        training = Training(steps, as_groups, options)
        if spoilt:
            before = training.content()
            spoil()
            assert_refused(lambda call=call, training=training: call(training), error, pieces)
            mend()
            if steps:
                assert training.content() == before
            assert content(training.params) == before[0]
        training.train(range(steps, steps + 5))
        runs.append(training.content())
    assert runs[0] == runs[1]


def gradient(make: Callable[[], paddle.Tensor]) -> Callable:
    """The second parameter's gradient is bad, the first one's is good."""

    def call(training: Training) -> None:
        good = paddle.full([3, 2], 0.5)
        training.optimizer.apply_gradients(list(zip(training.params, (good, make()))))

    return lambda: ({}, lambda: None, lambda: None, call)


def one_step(training: Training) -> None:
    try:
        training.train([7])
    finally:
        training.optimizer.clear_grad()


def scheduled(value: Any) -> Callable:
    """A scheduler that gives a bad rate."""

    def make() -> tuple:
        scheduler = paddle.optimizer.lr.LambdaDecay(0.1, lr_lambda=lambda epoch: 1.0)

        def give(rate: Any) -> Callable:
            return lambda: setattr(scheduler, "last_lr", rate)

        return {"learning_rate": scheduler}, give(value), give(0.1), one_step

    return make


def in_tensor(argument: str, value: float) -> Callable:
    """A tensor that the user overwrites with a bad number."""

    def make() -> tuple:
        tensor = paddle.full([1], 0.25)

        def put(number: float) -> Callable:
            return lambda: tensor.set_value(np.array([number], "float32"))

        return {argument: tensor}, put(value), put(0.25), one_step

    return make


STEP = {
    "gradient_shape": (gradient(lambda: paddle.ones([7])), ValueError, "gradient", "'second'", "[7]", "[257]"),
    "gradient_float64": (gradient(lambda: paddle.ones([257], "float64")), ValueError, "'second'", "float64", "float32"),
    "gradient_int": (gradient(lambda: paddle.ones([257], "int32")), ValueError, "'second'", "int32", "float32"),
    "gradient_uninitialised": (gradient(paddle.Tensor), ValueError, "gradient", "'second'"),
    "gradient_coo": (
        gradient(lambda: paddle.sparse.sparse_coo_tensor([[0]], [1.0], [257])),
        ValueError,
        "gradient",
        "'second'",
    ),
    **{
        f"scheduler_{value!r}": (scheduled(value), error, "learning_rate", repr(value))
        for value, error in ((NAN, ValueError), (-0.5, ValueError), (INF, ValueError), ("x", TypeError))
    },
    **{
        f"{argument}_tensor_{value!r}": (in_tensor(argument, value), ValueError, argument, repr(value))
        for argument in ("learning_rate", "weight_decay")
        for value in (NAN, -0.5, INF)
    },
}


@table(STEP)
@pytest.mark.parametrize("as_groups", [False, True], ids=["one_bucket", "two_buckets"])
@pytest.mark.parametrize("steps", [0, 4], ids=["first_step", "fifth_step"])
def test_step(row: Row, as_groups: bool, steps: int) -> None:
    make, error, *pieces = row
    assert_step_refused(make, error, pieces, steps, as_groups)


def test_strided_parameter() -> None:
    """What a kernel writes to Paddle's contiguous copy of it would be lost."""
    strided = paddle.ones([2, 3]).transpose([1, 0]).detach()
    strided.stop_gradient, strided.name = False, "second"
    params = [named("first", [3, 2]), strided]
    optimizer = ASGD(0.1, 3, params)
    before = content(params)
    pairs = [(p, paddle.ones(p.shape)) for p in params]
    assert_refused(lambda: optimizer.apply_gradients(pairs), ValueError, ["'second'", "strided", ".contiguous()"])
    assert content(params) == before
