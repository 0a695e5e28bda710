# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, and who wins where an option is given twice. Against the reference, which gets the gradient that
the options make. Single options are in test_options.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from paddle.regularizer import L2Decay
from problems import Network, Quadratic, bits, state_of
from trial import Trial

from paddle_asgd import ASGD

SHAPES = [[257], [], [3, 5]]
STEPS = 8
Grads = list[np.ndarray]
Change = Callable[[Grads, Grads], Grads]


def leaves(problem: Quadratic, dtype: str = "float64", attributes: Sequence[dict] = ({},) * 3) -> list[paddle.Tensor]:
    """Parameters with attributes of their own."""
    return [
        paddle.create_parameter(
            list(value.shape),
            dtype,
            attr=paddle.ParamAttr(**attribute),
            default_initializer=paddle.nn.initializer.Assign(value.astype(dtype)),
        )
        for value, attribute in zip(problem.start, attributes)
    ]


def assert_follows(
    given: Callable[[list], list],
    change: Change = lambda grads, x: grads,
    rates: Sequence[float] = (0.1, 0.1, 0.1),
    decays: Sequence[float] = (0.0, 0.0, 0.0),
    dtype: str = "float64",
    attributes: Sequence[dict] = ({},) * 3,
    **arguments: Any,
) -> None:
    """What the optimizer does with the parameters as they are given to it is what the reference does with these rates
    and decays, and with gradients changed in this way before they enter the history."""
    params = leaves(Quadratic(3, SHAPES), dtype, attributes)
    arguments.setdefault("weight_decay", None)
    trial = Trial(dtype=dtype, shapes=SHAPES, params=params, parameters=given(params), **arguments)
    trial.sag.weight_decay = decays
    for _ in range(STEPS):
        trial.step(rates, change(trial.gradients(), trial.sag.x))


def grouped(*options: dict) -> Callable[[list], list]:
    """One group for each parameter."""
    return lambda params: [{"params": [p], **o} for p, o in zip(params, options)]


def l2(*coefficients: float) -> Change:
    return lambda grads, x: [g + c * v for g, v, c in zip(grads, x, coefficients)]


def by_norm(limit: float, among: Sequence[int] = (0, 1, 2)) -> Change:
    return lambda grads, x: [
        g * limit / max(np.linalg.norm(g), limit) if i in among else g for i, g in enumerate(grads)
    ]


def by_value(limit: float) -> Change:
    return lambda grads, x: [np.clip(g, -limit, limit) for g in grads]


def by_global_norm(limit: float, among: Sequence[int] = (0, 1, 2)) -> Change:
    def change(grads: Grads, x: Grads) -> Grads:
        norm = np.sqrt(sum(np.sum(grads[i] ** 2) for i in among))
        return [g * limit / max(norm, limit) if i in among else g for i, g in enumerate(grads)]

    return change


# ---- Learning rate and decay -----------------------------------------------------------------------------------------


def test_learning_rate_multiplies() -> None:
    given = grouped({"learning_rate": 0.5}, {}, {"learning_rate": 2})
    assert_follows(given, rates=(0.05, 0.1, 0.2), decays=(0.25,) * 3, weight_decay=0.25)


def test_learning_rate_multiplies_what_a_scheduler_gives() -> None:
    params = leaves(Quadratic(3, SHAPES))
    scheduler = paddle.optimizer.lr.ExponentialDecay(0.1, gamma=0.75)
    groups = [{"params": params[:2]}, {"params": params[2:], "learning_rate": 0.5}]
    trial = Trial(scheduler, shapes=SHAPES, params=params, parameters=groups)
    for step in range(STEPS):
        trial.step(np.array([1, 1, 0.5]) * 0.1 * 0.75**step)
        scheduler.step()


@pytest.mark.parametrize("default", [0.25, L2Decay(0.25), None], ids=["number", "L2Decay", "none"])
def test_weight_decay(default: Any) -> None:
    """None inherits, 0 disables, and a number or an L2Decay is the group's own, whatever the optimizer's is."""
    inside = 0.25 if isinstance(default, L2Decay) else 0.0
    outside = 0.25 if default == 0.25 else 0.0
    given = grouped({"weight_decay": None}, {"weight_decay": 0.0}, {"weight_decay": 0.5})
    assert_follows(given, l2(inside, 0.0, 0.0), decays=(outside, 0.0, 0.5), weight_decay=default)
    given = grouped({}, {"weight_decay": 0}, {"weight_decay": L2Decay(0.5)})
    assert_follows(given, l2(inside, 0.0, 0.5), decays=(outside, 0.0, 0.0), weight_decay=default)


def test_weight_decay_in_a_tensor() -> None:
    decay = paddle.to_tensor([0.375])
    given = grouped({"weight_decay": decay}, {}, {"weight_decay": decay})
    assert_follows(given, decays=(0.375, 0.125, 0.375), weight_decay=paddle.to_tensor([0.125]))


@pytest.mark.parametrize("as_group", [False, True], ids=["optimizer", "group"])
@pytest.mark.parametrize("decay", [0.25, L2Decay(0.25)], ids=["number", "L2Decay"])
def test_regularizer_of_a_parameter_wins(decay: Any, as_group: bool) -> None:
    """Over the weight_decay of its group and of the optimizer, both of which hold for the others."""
    inside = isinstance(decay, L2Decay)
    assert_follows(
        lambda params: [{"params": params, "weight_decay": decay}] if as_group else params,
        l2(0.25, 0.125, 0.25) if inside else l2(0.0, 0.125, 0.0),
        decays=(0.0,) * 3 if inside else (0.25, 0.0, 0.25),
        attributes=({}, {"regularizer": L2Decay(0.125)}, {}),
        weight_decay=0.5 if as_group else decay,
    )


def test_several_parameters_in_a_group() -> None:
    assert_follows(
        lambda params: [{"params": params[1:], "learning_rate": 0.5, "weight_decay": 0.5}, {"params": params[0]}],
        rates=(0.1, 0.05, 0.05),
        decays=(0.25, 0.5, 0.5),
        weight_decay=0.25,
    )


# ---- Clips -----------------------------------------------------------------------------------------------------------

CLIPS = {
    # Paddle clips by norm in float32 only.
    "norm": (paddle.nn.ClipGradByNorm(4.0), by_norm(4.0), "float32"),
    "value": (paddle.nn.ClipGradByValue(0.75), by_value(0.75), "float64"),
    "global_norm": (paddle.nn.ClipGradByGlobalNorm(15.0), by_global_norm(15.0), "float32"),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("decay", [0.25, L2Decay(0.25)], ids=["number", "L2Decay"])
def test_clip_acts_before_any_decay(clip: str, decay: Any) -> None:
    """What is added to the gradient is not clipped, and what is not added does not count for the norm."""
    given, clipped, dtype = CLIPS[clip]
    inside = isinstance(decay, L2Decay)
    acted = []

    def change(grads: Grads, x: Grads) -> Grads:
        result = clipped(grads, x)
        acted.append(any(not np.array_equal(g, r) for g, r in zip(grads, result)))
        return l2(0.25, 0.25, 0.25)(result, x) if inside else result

    decays = (0.0 if inside else 0.25,) * 3
    assert_follows(lambda params: params, change, decays=decays, dtype=dtype, weight_decay=decay, grad_clip=given)
    assert True in acted


def test_one_global_norm_over_all_groups() -> None:
    assert_follows(
        grouped({"learning_rate": 0.5}, {}, {"weight_decay": 0.5}),
        by_global_norm(15.0),
        rates=(0.05, 0.1, 0.1),
        decays=(0.25, 0.25, 0.5),
        dtype="float32",
        weight_decay=0.25,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(15.0),
    )


def both(first: Change, then: Change) -> Change:
    return lambda grads, x: then(first(grads, x), x)


def test_clip_of_a_group() -> None:
    """A group's own clip is that group's alone, None is none, and the rest share the optimizer's one norm."""
    own, clip = paddle.nn.ClipGradByNorm(0.5), paddle.nn.ClipGradByGlobalNorm(1.5)
    changed = both(by_norm(0.5, among=[0]), by_global_norm(1.5, among=(1, 2)))
    assert_follows(grouped({"grad_clip": own}, {}, {}), changed, dtype="float32", grad_clip=clip)
    changed = by_global_norm(1.5, among=(0, 2))
    assert_follows(grouped({}, {"grad_clip": None}, {}), changed, dtype="float32", grad_clip=clip)
    assert_follows(grouped({}, {"grad_clip": own}, {}), by_norm(0.5, among=[1]), dtype="float32")


# ---- The dicts themselves --------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    """Neither on the parameters, where the next optimizer would find it, nor in the caller's dicts."""
    problem = Quadratic(3, SHAPES)
    params = leaves(problem)
    before = [(dict(p.optimize_attr), p.regularizer, p.need_clip, sorted(vars(p))) for p in params]
    groups = [{"params": [p], "learning_rate": 0.5, "weight_decay": 0.5, "grad_clip": None} for p in params]
    optimizer = ASGD(0.1, 3, groups, weight_decay=L2Decay(0.25), grad_clip=paddle.nn.ClipGradByValue(0.5))
    problem.backward(0, params)
    optimizer.step()
    assert [(dict(p.optimize_attr), p.regularizer, p.need_clip, sorted(vars(p))) for p in params] == before
    for param, group in zip(params, groups):
        assert group.pop("params")[0] is param
        assert group == {"learning_rate": 0.5, "weight_decay": 0.5, "grad_clip": None}


@pytest.mark.parametrize("as_groups", [False, True], ids=["list", "groups"])
@pytest.mark.parametrize("name", ["clear_grad", "clear_gradients", "zero_grad"])
def test_gradients_are_cleared(name: str, as_groups: bool) -> None:
    problem = Quadratic(3, SHAPES)
    params = leaves(problem)
    optimizer = ASGD(0.1, 3, [{"params": [p]} for p in params] if as_groups else params)
    clear = getattr(optimizer, name, None)
    if clear is None:
        pytest.skip(f"Paddle {paddle.__version__} has no {name}")
    problem.backward(0, params)
    assert all(np.abs(p.grad.numpy()).max() > 0 for p in params)
    clear()
    assert all(p.grad is None or not p.grad.numpy().any() for p in params)
    problem.backward(0, params)
    optimizer.clear_grad(set_to_zero=False)
    assert all(p.grad is None for p in params)


def test_minimize() -> None:
    problem = Quadratic(3, SHAPES)
    runs = []
    for by_minimize in (False, True):
        network = Network(problem)
        groups = [{"params": [p], "learning_rate": r} for p, r in zip(network.parameters(), (0.5, 1.0, 2.0))]
        optimizer = ASGD(0.1, 3, groups, weight_decay=0.25, grad_clip=paddle.nn.ClipGradByGlobalNorm(15.0))
        for step in range(STEPS):
            loss = network(paddle.to_tensor(Network.numbers(problem, step)))
            loss.backward()
            optimizer.minimize(loss) if by_minimize else optimizer.step()
            optimizer.clear_grad()
        runs.append([bits(state_of(optimizer, p)) for p in network.parameters()])
    assert runs[0] == runs[1]
