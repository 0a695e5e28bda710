# SPDX-License-Identifier: Apache-2.0
"""What the optimizer, its groups and the parameters themselves say about a step, against the reference in dygraph."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import FULL_SHAPES, Quadratic
from refusing import INF, NAN, assert_refused, content
from trial import Trial

from paddle_asgd import ASGD


def changed_in_place(tensor: paddle.Tensor) -> Callable[[int], float]:
    def rate_of(step: int) -> float:
        tensor.set_value(np.full(tensor.shape, 0.1 / (1 + step), dtype=tensor.numpy().dtype))
        return tensor.item()

    return rate_of


def of_scheduler(scheduler: Any) -> Callable[[int], float]:
    def rate_of(step: int) -> float:
        if step:
            scheduler.step()
        return scheduler.last_lr

    return rate_of


#: What the user passes, and what makes of it a function that prepares a step and tells the rate it has.
LEARNING_RATES = {
    "int": (lambda: 1, lambda given: lambda step: 1.0),
    "float": (lambda: 0.1, lambda given: lambda step: 0.1),
    "numpy_float32": (lambda: np.float32(0.1), lambda given: lambda step: float(np.float32(0.1))),
    "exponential": (lambda: paddle.optimizer.lr.ExponentialDecay(0.1, gamma=0.75), of_scheduler),
    "lambda": (lambda: paddle.optimizer.lr.LambdaDecay(0.1, lr_lambda=lambda epoch: 0.9**epoch), of_scheduler),
    "tensor_0d_float32": (lambda: paddle.full([], 0.1, dtype="float32"), changed_in_place),
    "tensor_1_float32": (lambda: paddle.full([1], 0.1, dtype="float32"), changed_in_place),
    "tensor_1_float64": (lambda: paddle.full([1], 0.1, dtype="float64"), changed_in_place),
}


@pytest.mark.parametrize("kind", list(LEARNING_RATES))
def test_learning_rate(kind: str) -> None:
    make, follow = LEARNING_RATES[kind]
    given = make()
    rate_of = follow(given)
    trial = Trial(given)
    for step in range(8):
        rate = rate_of(step)
        assert trial.optimizer.get_lr() == rate
        trial.step(rate)


def test_set_lr_and_set_lr_scheduler() -> None:
    trial = Trial()
    trial.step(0.1)
    trial.step(0.1)
    trial.optimizer.set_lr(0.05)
    trial.step(0.05)
    scheduler = paddle.optimizer.lr.ExponentialDecay(0.2, gamma=0.5)
    trial.optimizer.set_lr_scheduler(scheduler)
    with pytest.raises(RuntimeError, match="LRScheduler"):
        trial.optimizer.set_lr(0.3)
    for rate in (0.2, 0.1, 0.05, 0.025, 0.0125):
        trial.step(rate)
        scheduler.step()


def test_weight_decay_tensor_is_read_at_every_step() -> None:
    decay = paddle.full([1], 0.1, dtype="float32")
    trial = Trial(weight_decay=decay)
    for step in range(8):
        decay.set_value(np.array([0.1 + step / 8], dtype=np.float32))
        trial.sag.weight_decay = decay.item()
        trial.step()


def test_param_attr_learning_rate_multiplies() -> None:
    multipliers = [0.5, 1.0, 2.5, 1.5]
    params = [
        paddle.create_parameter(shape, "float64", attr=paddle.ParamAttr(learning_rate=multiplier))
        for shape, multiplier in zip(FULL_SHAPES, multipliers)
    ]
    for param, value in zip(params, Quadratic(3, FULL_SHAPES).start):
        param.set_value(value)
    trial = Trial(shapes=FULL_SHAPES, params=params)
    for _ in range(8):
        trial.step([0.1 * multiplier for multiplier in multipliers])


L1Decay, L2Decay = paddle.regularizer.L1Decay, paddle.regularizer.L2Decay


def with_l2(grads: list, x: list) -> list:
    return [g + 0.125 * v for g, v in zip(grads, x)]


def with_l1(grads: list, x: list) -> list:
    return [g + 0.125 * np.sign(v) for g, v in zip(grads, x)]


def clipped_by_value(grads: list, x: list) -> list:
    return [np.clip(g, -0.5, 0.75) for g in grads]


def clipped_by_norm(grads: list, x: list) -> list:
    return [g * 2 / max(2, np.linalg.norm(g)) for g in grads]


def clipped_by_global_norm(grads: list, x: list) -> list:
    norm = np.sqrt(sum(np.sum(g**2) for g in grads))
    assert norm > 5
    return [g * 5 / norm for g in grads]


#: The option, what it makes of the gradients before they enter the history, and the decay outside of the history.
IN_THE_HISTORY = {
    "l2": (lambda: {"weight_decay": L2Decay(0.125)}, with_l2, 0.0),
    "l1": (lambda: {"weight_decay": L1Decay(0.125)}, with_l1, 0.0),
    "value": (lambda: {"grad_clip": paddle.nn.ClipGradByValue(0.75, -0.5)}, clipped_by_value, 0.1),
    "norm": (lambda: {"grad_clip": paddle.nn.ClipGradByNorm(2.0)}, clipped_by_norm, 0.1),
    "global_norm": (lambda: {"grad_clip": paddle.nn.ClipGradByGlobalNorm(5.0)}, clipped_by_global_norm, 0.1),
}


@pytest.mark.parametrize("option", list(IN_THE_HISTORY))
def test_clips_and_regularizers_enter_the_history(option: str) -> None:
    make, changed, decay = IN_THE_HISTORY[option]
    # float32, for Paddle has no ClipGradByNorm in float64 on the CPU.
    trial = Trial(dtype="float32", shapes=FULL_SHAPES, **make())
    trial.sag.weight_decay = decay
    for _ in range(11):
        trial.step(grads=changed(trial.gradients(), trial.sag.x))


def test_groups() -> None:
    """A group's decay, learning rate and clip win over the optimizer's, and a parameter's regularizer over all."""
    params = Quadratic(3, FULL_SHAPES).parameters()
    params[1].regularizer = L2Decay(0.125)
    groups = [
        {"params": params[0], "weight_decay": 0.3, "grad_clip": None},
        {"params": params[1:2], "weight_decay": 0.2, "learning_rate": 0.5},
        {"params": params[2:3], "weight_decay": L1Decay(0.125), "grad_clip": paddle.nn.ClipGradByValue(0.75, -0.5)},
        {"params": params[3:]},
    ]
    clip = paddle.nn.ClipGradByGlobalNorm(5.0)
    trial = Trial(dtype="float32", shapes=FULL_SHAPES, params=params, parameters=groups, grad_clip=clip)
    trial.sag.weight_decay = [0.3, 0.0, 0.0, 0.1]
    for _ in range(11):
        grads, x = trial.gradients(), trial.sag.x
        grads[1], grads[3] = clipped_by_global_norm([grads[1], grads[3]], [])
        grads[1:2] = with_l2(grads[1:2], x[1:2])
        grads[2:3] = with_l1(clipped_by_value(grads[2:3], []), x[2:3])
        trial.step([0.1, 0.05, 0.1, 0.1], grads)


def test_regularizers_of_groups_alone() -> None:
    """Nothing but the regularizer stands between the gradients and the native call."""
    params = Quadratic(3, FULL_SHAPES).parameters("float64")
    groups = [{"params": params[:2], "weight_decay": L2Decay(0.125)}, {"params": params[2:]}]
    trial = Trial(shapes=FULL_SHAPES, params=params, parameters=groups, weight_decay=None)
    trial.sag.weight_decay = 0.0
    for _ in range(11):
        grads = trial.gradients()
        trial.step(grads=with_l2(grads[:2], trial.sag.x[:2]) + grads[2:])


def test_a_frozen_parameter_is_not_in_the_global_norm() -> None:
    trial = Trial(dtype="float32", shapes=FULL_SHAPES, grad_clip=paddle.nn.ClipGradByGlobalNorm(5.0))
    for _ in range(8):
        trial.problem.backward(trial.steps, trial.params)
        trial.params[3].stop_gradient = True
        trial.optimizer.step()
        trial.params[3].stop_gradient = False
        trial.optimizer.clear_grad()
        trial.follow([*clipped_by_global_norm(trial.gradients()[:3], []), None])


@pytest.mark.parametrize("multiplier", [-1.0, NAN, INF, "x", None], ids=repr)
def test_learning_rate_of_a_parameter(multiplier: Any) -> None:
    """ParamAttr takes anything; the optimizer must not."""
    param = paddle.create_parameter([5], "float32", name="first")
    param.optimize_attr = {"learning_rate": multiplier}
    before = content([param])

    def train() -> None:
        optimizer = ASGD(0.1, 3, [param])
        optimizer.apply_gradients([(param, paddle.ones([5]))])

    assert_refused(train, (TypeError, ValueError), ["learning_rate", "'first'", repr(multiplier)])
    assert content([param]) == before
