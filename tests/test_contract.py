# SPDX-License-Identifier: Apache-2.0
"""The contract of Paddle's and torch's optimizers: whatever shapes a step there shapes it here in the same way.

With one batch, SAG is gradient descent, so Paddle's SGD is the other side of every comparison.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from paddle.optimizer import lr
from paddle.regularizer import L1Decay, L2Decay
from problems import Quadratic, StaticRun, bits, state_of

from paddle_asgd import ASGD

SHAPES = [[257], [3, 2], [5]]
STEPS = 12


def ours(rate: Any, parameters: Any = None, **options: Any) -> ASGD:
    return ASGD(rate, 1, parameters, **options)


def theirs(rate: Any, parameters: Any = None, **options: Any) -> Any:
    return paddle.optimizer.SGD(rate, parameters, **options)


def train(
    kind: Callable, rate: Any, before: Callable = lambda step, params: None, attributes: Any = ({},) * 3, **options: Any
) -> tuple[list, list]:
    """The parameters after all steps, and the learning rate of each."""
    problem = Quadratic(1, SHAPES)
    params = [
        paddle.create_parameter(
            shape,
            "float64",
            attr=paddle.ParamAttr(**attribute),
            default_initializer=paddle.nn.initializer.Assign(value),
        )
        for shape, value, attribute in zip(SHAPES, problem.start, attributes)
    ]
    optimizer, rates = kind(rate, params, **options), []
    for step in range(STEPS):
        before(step, params)
        rates.append(float(optimizer.get_lr()))
        loss = problem.backward(step, params, [i for i, p in enumerate(params) if not p.stop_gradient])
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        if isinstance(rate, lr.ReduceOnPlateau):
            rate.step(paddle.to_tensor(abs(loss)))
        elif isinstance(rate, lr.LRScheduler):
            rate.step()
    return [p.numpy() for p in params], rates


def assert_alike(make_rate: Callable[[], Any] = lambda: 0.1, **options: Any) -> None:
    (x, rates), (expected, expected_rates) = (train(kind, make_rate(), **options) for kind in (ours, theirs))
    assert rates == expected_rates
    for value, other in zip(x, expected):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-6 * np.abs(other).max())


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "NoamDecay": lambda: lr.NoamDecay(d_model=64, warmup_steps=5),
    "PiecewiseDecay": lambda: lr.PiecewiseDecay([3, 6], [0.2, 0.1, 0.05]),
    "NaturalExpDecay": lambda: lr.NaturalExpDecay(0.2, 0.1),
    "InverseTimeDecay": lambda: lr.InverseTimeDecay(0.2, 0.5),
    "PolynomialDecay": lambda: lr.PolynomialDecay(0.2, decay_steps=5, cycle=True),
    "LinearWarmup": lambda: lr.LinearWarmup(lr.ExponentialDecay(0.2, 0.9), 4, 0.0, 0.2),
    "ExponentialDecay": lambda: lr.ExponentialDecay(0.2, 0.9),
    "MultiStepDecay": lambda: lr.MultiStepDecay(0.2, [3, 6]),
    "StepDecay": lambda: lr.StepDecay(0.2, 3),
    "LambdaDecay": lambda: lr.LambdaDecay(0.2, lambda epoch: 0.9**epoch),
    "ReduceOnPlateau": lambda: lr.ReduceOnPlateau(0.2, patience=1),
    "CosineAnnealingDecay": lambda: lr.CosineAnnealingDecay(0.2, 5),
    "MultiplicativeDecay": lambda: lr.MultiplicativeDecay(0.2, lambda epoch: 0.9),
    "OneCycleLR": lambda: lr.OneCycleLR(0.2, STEPS + 1),
    "CyclicLR": lambda: lr.CyclicLR(0.1, 0.3, 3),
    "LinearLR": lambda: lr.LinearLR(0.2, 5),
    "CosineAnnealingWarmRestarts": lambda: lr.CosineAnnealingWarmRestarts(0.2, 4),
}


def test_all_of_paddles_schedulers_are_here() -> None:
    named = {name for name in lr.__all__ if name != "LRScheduler"}
    assert named <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    if not hasattr(lr, name):
        pytest.skip(f"Paddle {paddle.__version__} has no {name}")
    assert_alike(SCHEDULERS[name])


REGULARIZERS = {
    "l2": ({"weight_decay": L2Decay(0.25)}, ({},) * 3),
    "l1": ({"weight_decay": L1Decay(0.25)}, ({},) * 3),
    "of parameters": ({}, ({"regularizer": L1Decay(0.25)}, {}, {"regularizer": L2Decay(0.5)})),
    "both": ({"weight_decay": L2Decay(0.25)}, ({"regularizer": L1Decay(0.5)}, {}, {"regularizer": L2Decay(0.5)})),
    "multipliers": ({}, ({"learning_rate": 0.5}, {}, {"learning_rate": 0.0})),
    "frozen": ({}, ({"trainable": False}, {}, {})),
}


@pytest.mark.parametrize("kind", REGULARIZERS)
def test_regularizers_and_attributes(kind: str) -> None:
    options, attributes = REGULARIZERS[kind]
    assert_alike(attributes=attributes, **options)


def test_freezing_and_unfreezing() -> None:
    def switch(step: int, params: list) -> None:
        for i, param in enumerate(params):
            param.stop_gradient = step in ((4, 5), (7, 8, 9), ())[i]

    assert_alike(before=switch)


# ---- What minimize is told to leave out ------------------------------------------------------------------------------

PRUNED: dict[str, Callable[[list], dict]] = {
    "all": lambda params: {},
    "by variable": lambda params: {"parameters": params[1:]},
    "no_grad_set": lambda params: {"no_grad_set": {params[0]}},
    "both": lambda params: {"parameters": params[:2], "no_grad_set": {params[0]}},
}


@pytest.mark.usefixtures("static_mode")
@pytest.mark.parametrize("how", PRUNED)
def test_static_minimize_of_some_parameters(how: str) -> None:
    finals = []
    for kind in (ours, theirs):
        built = StaticRun(
            Quadratic(1, SHAPES),
            lambda loss, params, kind=kind: kind(0.1).minimize(loss, **PRUNED[how](params)),
        )
        start = [built.array(name) for name in built.names]
        for step in range(4):
            built.run(step)
        finals.append([built.array(name) for name in built.names])
    moved = [not np.array_equal(a, b) for a, b in zip(start, finals[0])]
    assert moved == {"all": [True] * 3, "both": [False, True, False]}.get(how, [False, True, True])
    for value, other in zip(*finals):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-6 * np.abs(other).max())


def test_minimize_of_some_parameters() -> None:
    finals = []
    for kind in (ours, theirs):
        problem = Quadratic(1, SHAPES)
        params = problem.parameters("float64")
        optimizer = kind(0.1, params)
        for _ in range(4):
            loss = paddle.add_n([p.square().sum() for p in params])
            loss.backward()
            optimizer.minimize(loss, parameters=params[1:])
            for param in params:
                param.clear_gradient(False)
        finals.append([p.numpy() for p in params])
    for value, other in zip(*finals):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-6 * np.abs(other).max())


# ---- State -----------------------------------------------------------------------------------------------------------


def test_state_goes_round() -> None:
    """Into an optimizer that has groups, and back into one with a list: each goes on as the first does."""
    problem, runs = Quadratic(3, SHAPES), []
    for moves in (False, True):
        params = problem.parameters()
        optimizer = ASGD(0.1, 3, params, weight_decay=0.25)
        for step in range(9):
            if moves and step in (4, 7):
                state = {k: v.clone() if hasattr(v, "clone") else v for k, v in optimizer.state_dict().items()}
                given = [{"params": [p]} for p in params] if step == 4 else params
                optimizer = ASGD(0.1, 3, given, weight_decay=0.25)
                optimizer.set_state_dict(state)
            problem.backward(step, params)
            optimizer.step()
            optimizer.clear_grad()
        runs.append([bits(state_of(optimizer, p)) for p in params])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("source", "target"), [("float32", "float64"), ("float64", "float32"), ("float64", "float16")])
def test_state_of_another_dtype(source: str, target: str) -> None:
    """The history would lose digits or keep too many: refused, and nothing is written."""
    problem, optimizers = Quadratic(3, SHAPES), []
    for dtype in (source, target):
        params = problem.parameters(dtype)
        optimizers.append(ASGD(0.1, 3, params, multi_precision=True))
        for param in params:
            param.name = f"{len(param.shape)}_{param.shape[0]}"
            param.grad = paddle.ones(param.shape, dtype)
        optimizers[-1].step()
    before = [bits(state_of(optimizers[1], p)) for p in params]
    with pytest.raises(ValueError, match="Nothing has been loaded"):
        optimizers[1].set_state_dict(optimizers[0].state_dict())
    assert [bits(state_of(optimizers[1], p)) for p in params] == before
