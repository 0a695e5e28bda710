# SPDX-License-Identifier: Apache-2.0
"""The shortcut between two steps of dygraph: it has the bits of the full way, and notices whatever changes in between.

Random sequences of such changes are drawn in test_events.py.
"""

from __future__ import annotations

from typing import Callable

import numpy as np
import paddle
import pytest
from problems import FULL_SHAPES, Quadratic, bits, constant, state_of, step_with
from trial import Trial

from paddle_asgd import ASGD

SHAPES = [[257], [], [3, 5]]
STEPS = 8


def own_regularizer(trial: Trial, grads: list) -> list:
    trial.params[1].regularizer = paddle.regularizer.L2Decay(0.125)
    trial.sag.weight_decay = [0.1, 0.0, 0.1, 0.1]
    return [g + 0.125 * trial.sag.x[1] if i == 1 else g for i, g in enumerate(grads)]


def main_grad(trial: Trial, grads: list) -> list:
    grads[1] = grads[1] + 3
    trial.params[1].main_grad = paddle.to_tensor(grads[1])
    return grads


def no_gradient(trial: Trial, grads: list) -> list:
    trial.params[1].clear_gradient(False)
    return [None if i == 1 else g for i, g in enumerate(grads)]


def strided_gradient(trial: Trial, grads: list) -> list:
    trial.params[3].main_grad = paddle.to_tensor(np.ascontiguousarray(grads[3].T)).t()
    assert not trial.params[3].main_grad.is_contiguous()
    return grads


def found_inf(trial: Trial, grads: list) -> list:
    trial.optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([True]))
    return [None] * len(grads)


def frozen(trial: Trial, grads: list) -> list:
    trial.params[1].stop_gradient = True  # and its gradient stays
    return [None if i == 1 else g for i, g in enumerate(grads)]


def last_frozen(trial: Trial, grads: list) -> list:
    trial.params[-1].stop_gradient = True
    return [*grads[:-1], None]


def clip(trial: Trial, grads: list) -> list:
    trial.optimizer._grad_clip = paddle.nn.ClipGradByValue(0.125)
    return [np.clip(g, -0.125, 0.125) for g in grads]


EVENTS = [own_regularizer, main_grad, no_gradient, strided_gradient, found_inf, frozen, last_frozen, clip]


@pytest.mark.parametrize("event", EVENTS)
def test_a_step_unlike_the_ones_before(event: Callable) -> None:
    """Plain steps go by what the first of them found. Whatever comes up later must be noticed, and its end too."""
    trial = Trial(shapes=FULL_SHAPES)
    for step in range(11):
        trial.problem.backward(step, trial.params)
        happens = step in (4, 5, 8)
        grads = trial.gradients()
        grads = event(trial, grads) if happens else grads
        trial.optimizer.step()
        trial.optimizer.clear_grad()
        trial.follow(grads)
        trial.optimizer._set_auxiliary_var("found_inf", None)
        trial.optimizer._grad_clip = None
        trial.sag.weight_decay = 0.1
        for param in trial.params:
            param.regularizer = param.main_grad = None
            param.stop_gradient = False
            param.clear_gradient(False)


def test_a_rate_changed_on_the_parameter() -> None:
    trial = Trial(shapes=FULL_SHAPES)
    for step in range(8):
        factor = 0.5 if step in (3, 4) else 1.0
        trial.params[1].optimize_attr["learning_rate"] = factor
        trial.step([0.1, 0.1 * factor, 0.1, 0.1])


@pytest.mark.parametrize("frozen_then", [[], [0], [1]])
def test_a_parameter_thawed_later(frozen_then: list) -> None:
    """Alone, or while another one is frozen, which leaves as many as before and of the same shape."""
    trial = Trial(shapes=[[5], [5], [5]])
    last = len(trial.params) - 1
    for step in range(8):
        still = [last] if step < 4 else frozen_then
        for i, param in enumerate(trial.params):
            param.stop_gradient = i in still
            param.clear_gradient(False)
        trial.step(grads=[None if i in still else g for i, g in enumerate(trial.gradients())])


@pytest.mark.shortcut
def test_plain_steps_go_the_full_way_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above compare; this one makes sure that it is the shortcut that they compare."""
    trial = Trial(shapes=FULL_SHAPES)
    trial.step()
    monkeypatch.setattr(trial.optimizer, "_apply_optimize", lambda *_, **__: pytest.fail("the full way"))
    for _ in range(7):
        trial.step()


def set_clip(optimizer: ASGD, params: list) -> None:
    optimizer._grad_clip = paddle.nn.ClipGradByValue(0.5)


def set_subset(optimizer: ASGD, params: list) -> None:
    optimizer._parameter_list = params[:2]


def freeze(optimizer: ASGD, params: list) -> None:
    params[1].stop_gradient = True


@pytest.mark.parametrize("change", [set_clip, set_subset, freeze])
def test_what_changes_between_two_steps_counts(change: Callable) -> None:
    """However many steps were alike before: the same as an optimizer that takes every step anew."""
    problem = Quadratic(3, SHAPES)
    contents = []
    for anew in (False, True):
        params = problem.parameters("float64")
        optimizer = ASGD(0.1, 3, params, weight_decay=0.25)
        for step in range(STEPS):
            problem.backward(step, params)
            if step == 5:
                before = [p.numpy().copy() for p in params]
                change(optimizer, params)
            if anew:
                pairs = [(p, p.grad) for p in optimizer._parameter_list]
                optimizer._apply_optimize(loss=None, startup_program=None, params_grads=pairs)
            else:
                optimizer.step()
            for param in params:
                param.clear_gradient()
        contents.append([bits(state_of(optimizer, p)) for p in params])
        stood = [np.array_equal(p.numpy(), b) for p, b in zip(params, before)]
        assert any(stood) == (change is not set_clip)
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("attributes", "moved"),
    [({}, 0.125), ({"learning_rate": 0.5}, 0.0625)],
    ids=["none", "half"],
)
def test_own_options_changed_between_two_steps_count(attributes: dict, moved: float) -> None:
    param = constant(1.0)
    optimizer = ASGD(0.125, 3, [param])
    before = [step_with(optimizer, 1.0) for _ in range(3)][-1]
    param.optimize_attr = attributes
    assert step_with(optimizer, 1.0)[0] == pytest.approx(before[0] - moved, rel=1e-6)


def test_a_tensor_as_own_learning_rate_stands_for_the_whole() -> None:
    """Equal to the multiplier that it replaces, it still means another thing."""
    param = constant(1.0)
    optimizer = ASGD(0.125, 3, [param])
    before = [step_with(optimizer, 1.0) for _ in range(2)][-1]
    param.optimize_attr["learning_rate"] = paddle.to_tensor(1.0)
    assert step_with(optimizer, 1.0)[0] == pytest.approx(before[0] - 1.0, rel=1e-6)
