# SPDX-License-Identifier: Apache-2.0
"""What the step size search refuses: the promised exception, nothing written. The tables are the tests."""

from __future__ import annotations

import re
from typing import Any, Callable

import paddle
import pytest
from refusing import INF, NAN, assert_refused, table
from test_lipschitz import Run

from paddle_asgd import ASGD
from paddle_asgd.sag.lipschitz import LipschitzSearch


def of(**options: Any) -> Callable:
    def make(param: Any) -> Any:
        return ASGD(**{"learning_rate": 0.1, "batch_num": 3, "parameters": [param], **options})

    return make


CONSTRUCTOR: dict[str, tuple] = {
    "none": (lambda p: None, {}, TypeError, "optimizer", "None", "ASGD"),
    "of_paddle": (lambda p: paddle.optimizer.SGD(0.1, [p]), {}, TypeError, "optimizer", "SGD"),
    "scheduler": (of(learning_rate=paddle.optimizer.lr.StepDecay(0.1, 3)), {}, TypeError, "learning_rate", "StepDecay"),
    "rate_tensor": (
        lambda p: of(learning_rate=paddle.to_tensor(0.5))(p),
        {},
        TypeError,
        "learning_rate",
        "tensor of float32",
    ),
    **{
        f"{name}_{value}": (of(), {name: value}, error, name, repr(value))
        for name in ("initial", "factor")
        for value, error in [
            (0, ValueError),
            (0.0, ValueError),
            (-1.0, ValueError),
            (NAN, ValueError),
            (INF, ValueError),
            (True, TypeError),
            ("1", TypeError),
            (None, TypeError),
        ]
    },
}


@table(CONSTRUCTOR)
def test_constructor(row: tuple) -> None:
    make, options, error, *pieces = row
    optimizer = make(paddle.to_tensor([1.0], stop_gradient=False))
    assert_refused(lambda: LipschitzSearch(optimizer, **options), error, pieces)


def flat(run: Run) -> Callable:
    """Always 0, to the bit, with a gradient that is not."""
    return lambda: run.params[0].sum() - run.params[0].sum().detach()


def larger(run: Run) -> Callable:
    """At every call, as if it depended on chance."""
    losses = iter(range(1000))
    return lambda: (run.params[0] * run.params[0]).sum() * 0 + run.params[0].sum() + 1e6 * next(losses)


def cached(run: Run) -> Callable:
    loss = run.problem.tensor_loss(0, run.params)
    return lambda: loss


def second_time(value: Any) -> Callable:
    def make(run: Run) -> Callable:
        values = iter([run.problem.tensor_loss(0, run.params), value])
        return lambda: next(values)

    return make


def backward_inside(retain: bool) -> Callable:
    def make(run: Run) -> Callable:
        def closure() -> Any:
            loss = run.problem.tensor_loss(0, run.params)
            loss.backward(retain_graph=retain)
            return loss

        return closure

    return make


CLOSURE: dict[str, tuple] = {
    "tensor": (lambda r: r.problem.tensor_loss(0, r.params), TypeError, "closure", "tensor of float32"),
    "returns_none": (lambda r: lambda: None, TypeError, "closure", "None"),
    "returns_float": (lambda r: lambda: 0.5, TypeError, "closure", "0.5"),
    "returns_vector": (lambda r: lambda: r.params[0] * 2, TypeError, "closure", "[257]"),
    "returns_int": (lambda r: lambda: paddle.to_tensor(3), TypeError, "closure", "int64"),
    "returns_none_later": (second_time(None), TypeError, "closure", "None"),
    "returns_vector_later": (second_time(paddle.ones([2])), TypeError, "closure", "[2]"),
    "loss_nan": (lambda r: lambda: r.params[0].sum() * NAN, ValueError, "loss", "nan", "no step"),
    "loss_inf": (lambda r: lambda: r.params[0].sum() + INF, ValueError, "loss", "inf", "no step"),
    "gradient_inf": (lambda r: lambda: paddle.sqrt(r.params[0] * 0).sum(), ValueError, "gradient", "no step"),
    "constant": (lambda r: lambda: paddle.to_tensor(0.5), ValueError, "loss", "no gradient"),
    "cached": (cached, ValueError, "closure", "same tensor"),
    "never_decreases": (flat, RuntimeError, "closure", "does not decrease"),
    "other_loss_each_time": (larger, ValueError, "closure: gave ", " and then ", "model.eval()"),
    "backward_inside": (backward_inside(False), ValueError, "closure", "called backward()", "step() calls"),
    "backward_inside_retained": (backward_inside(True), ValueError, "closure", "called backward()", "step() calls"),
}


@table(CLOSURE)
@pytest.mark.parametrize("steps", [0, 4])
def test_step(row: tuple, steps: int) -> None:
    make, error, *pieces = row
    run = Run(steps)
    before = run.content()
    closure = make(run)
    with pytest.raises(error) as caught:
        run.search.step(closure)
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
    assert run.content() == before
    assert [p.grad is None or not p.grad.any().item() for p in run.params] == [True, True]


@pytest.mark.parametrize("steps", [0, 4])
def test_loss_of_other_parameters(steps: int) -> None:
    """At later steps, too, when Paddle's clear_grad() has left zeros in the place of gradients."""
    run, other = Run(steps), paddle.to_tensor([0.5], stop_gradient=False)
    assert_refused(lambda: run.search.step(lambda: other * 2), ValueError, ["loss", "no parameter"])


def test_dropout() -> None:
    """Refused before it ends the training; once it is off the training goes on."""
    paddle.seed(7)
    model = paddle.nn.Sequential(paddle.nn.Linear(6, 8), paddle.nn.Dropout(0.5), paddle.nn.Linear(8, 1))
    x, y = paddle.randn([12, 6]), paddle.randn([12, 1])
    # The watch would notice, too: the gradients in the slots are those of other draws.
    search, before = LipschitzSearch(ASGD(0.1, 3, model.parameters(), watch=False)), []

    def closure() -> Any:
        return paddle.nn.functional.mse_loss(model(x), y)

    def train() -> None:
        for _ in range(200):
            before[:] = [search.lipschitz, *(p.numpy().tolist() for p in model.parameters())]
            search.step(closure)

    with pytest.raises(ValueError, match=r"gave \d\.\d+ and then \d\.\d+ at the same parameters") as caught:
        train()
    first, second = re.findall(r"\d\.\d+", str(caught.value))
    assert first != second
    assert [search.lipschitz, *(p.numpy().tolist() for p in model.parameters())] == before
    # 2^10 from the first doubling on, and those for the curvature of the loss.
    assert search.lipschitz < 2**12
    model.eval()
    losses = [search.step(closure).item() for _ in range(60)]
    assert losses[-1] < losses[0]


def test_static_mode() -> None:
    run, optimizer = Run(2), Run().optimizer
    paddle.enable_static()
    for call in (lambda: run.search.step(lambda: None), lambda: LipschitzSearch(optimizer)):
        assert_refused(call, RuntimeError, ["static graph mode", "expected dygraph"])


def test_optimizer_without_parameters(static_mode: None) -> None:
    """In static mode it may stand for all of a program's; dygraph has none such."""
    optimizer = ASGD(0.1, 3)
    paddle.disable_static()
    assert_refused(lambda: LipschitzSearch(optimizer), ValueError, ["parameters", "None"])


def test_optimizer_changed_since() -> None:
    run = Run(2)
    run.optimizer.set_lr_scheduler(paddle.optimizer.lr.StepDecay(0.1, 3))
    assert_refused(lambda: run.train([2]), TypeError, ["learning_rate", "StepDecay"])


STATES: dict[str, tuple] = {
    "none": (None, TypeError, "None"),
    "empty": ({}, ValueError, "lipschitz"),
    "more": ({"lipschitz": 1.0, "y": 2.0}, ValueError, "'y'"),
    "zero": ({"lipschitz": 0.0}, ValueError, "lipschitz", "0.0"),
    "nan": ({"lipschitz": NAN}, ValueError, "lipschitz", "nan"),
    "string": ({"lipschitz": "1"}, TypeError, "lipschitz", "'1'"),
}


@table(STATES)
def test_set_state_dict(row: tuple) -> None:
    state, error, *pieces = row
    run = Run(2)
    before = run.content()
    assert_refused(lambda: run.search.set_state_dict(state), error, pieces)
    assert run.content() == before
