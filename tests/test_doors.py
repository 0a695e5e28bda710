# SPDX-License-Identifier: Apache-2.0
"""Every way to a step, from step() with a closure to hapi: all give the same. The shortcut is in test_shortcut.py."""

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
