# SPDX-License-Identifier: Apache-2.0
"""Every way to a step, from step() with a closure to hapi, and the shortcut between the steps: all give the same."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import FULL_SHAPES, Network, Quadratic, bits, state_of
from trial import Trial

from paddle_asgd import ASGD


def test_step_with_a_closure() -> None:
    trial = Trial()
    for step in range(8):
        losses = []

        def closure(step: int = step, losses: list = losses) -> float:
            losses.append(trial.problem.backward(step, trial.params))
            return losses[-1]

        loss = trial.problem.loss(step, trial.sag.x)
        with paddle.no_grad():
            returned = trial.optimizer.step(closure)
        trial.optimizer.clear_grad()
        assert [returned] == losses == [pytest.approx(loss, rel=1e-12)]
        trial.follow(trial.gradients())
    assert trial.optimizer.step() is None


def by_step(network: Network, optimizer: Any) -> Callable:
    def train(numbers: np.ndarray) -> None:
        network(paddle.to_tensor(numbers)).backward()
        optimizer.step()
        optimizer.clear_grad()

    return train


def by_minimize(network: Network, optimizer: Any) -> Callable:
    def train(numbers: np.ndarray) -> None:
        loss = network(paddle.to_tensor(numbers))
        loss.backward()
        optimizer.minimize(loss)
        optimizer.clear_grad()

    return train


def by_apply_gradients(network: Network, optimizer: Any) -> Callable:
    def train(numbers: np.ndarray) -> None:
        loss = network(paddle.to_tensor(numbers))
        loss.backward()
        optimizer.apply_gradients(optimizer.backward(loss))
        optimizer.clear_grad()

    return train


def by_to_static(network: Network, optimizer: Any) -> Callable:
    return by_step(paddle.jit.to_static(network, full_graph=True), optimizer)


def by_model(network: Network, optimizer: Any) -> Callable:
    model = paddle.Model(network)
    model.prepare(optimizer, loss=lambda output: output)
    return lambda numbers: model.train_batch([numbers])


@pytest.mark.parametrize("door", [by_minimize, by_apply_gradients, by_to_static, by_model])
def test_every_door_takes_the_same_step(door: Callable) -> None:
    problem = Quadratic(batches=3, shapes=FULL_SHAPES)
    runs = []
    for kind in (by_step, door):
        network = Network(problem)
        optimizer = ASGD(0.1, 3, network.parameters(), weight_decay=0.1)
        train = kind(network, optimizer)
        for step in range(8):
            train(Network.numbers(problem, step))
        runs.append([state_of(optimizer, param) for param in network.parameters()])
    assert [state["m"] for state in runs[0]] == [8] * len(FULL_SHAPES)
    assert [bits(state) for state in runs[0]] == [bits(state) for state in runs[1]]


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
