# SPDX-License-Identifier: Apache-2.0
"""A whole step under ``paddle.jit.to_static`` in its default mode computes what Python alone computes.

That mode follows Python where it can. With full_graph=True only Paddle 2.6 traces a step (test_fused.py)."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import FULL_SHAPES, PIR, Network, Quadratic, bits, state_of

from paddle_asgd import ASGD

SHAPES = [shape for shape in FULL_SHAPES if shape]
STEPS = 7


def step(network: Network, optimizer: ASGD, numbers: Any) -> Any:
    loss = network(numbers)
    loss.backward()
    optimizer.step()
    optimizer.clear_grad()
    return loss


def minimize(network: Network, optimizer: ASGD, numbers: Any) -> Any:
    loss = network(numbers)
    loss.backward()
    optimizer.minimize(loss)
    optimizer.clear_grad()
    return loss


def with_batch_index(network: Network, optimizer: ASGD, numbers: Any) -> Any:
    loss = network(numbers)
    loss.backward()
    optimizer.batch_index = 1
    optimizer.step()
    optimizer.clear_grad()
    return loss


def with_get_lr(network: Network, optimizer: ASGD, numbers: Any) -> Any:
    return step(network, optimizer, numbers) * optimizer.get_lr()


def with_state_dict(network: Network, optimizer: ASGD, numbers: Any) -> Any:
    loss = step(network, optimizer, numbers)
    return loss + sum(value.astype("float32").sum() for key, value in optimizer.state_dict().items() if "_d_" in key)


def with_a_load(network: Network, optimizer: ASGD, numbers: Any) -> Any:
    loss = step(network, optimizer, numbers)
    optimizer.set_state_dict(optimizer.state_dict())
    return loss


def with_a_closure(network: Network, optimizer: ASGD, numbers: Any) -> Any:
    def closure() -> Any:
        loss = network(numbers)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    optimizer.clear_grad()
    return loss


BODIES = [step, minimize, with_batch_index, with_get_lr, with_state_dict, with_a_load, with_a_closure]


def train(body: Callable, traced: bool) -> tuple[list, list]:
    """The losses, and all state after the last step."""
    problem = Quadratic(3, SHAPES)
    network = Network(problem)
    scheduler = paddle.optimizer.lr.ExponentialDecay(0.1, gamma=0.9)
    optimizer = ASGD(scheduler, 3, network.parameters(), weight_decay=0.25)

    def whole(numbers: Any) -> Any:
        return body(network, optimizer, numbers)

    run = paddle.jit.to_static(whole) if traced else whole
    losses = []
    for k in range(STEPS):
        losses.append(run(paddle.to_tensor(Network.numbers(problem, k))).numpy())
        scheduler.step()
    return losses, [bits(state_of(optimizer, p)) for p in network.parameters()]


@pytest.mark.skipif(not PIR, reason="the tracer of Paddle 2.6 takes no backward()")
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_a_whole_step(body: Callable) -> None:
    expected, state = train(body, traced=False)
    losses, traced_state = train(body, traced=True)
    np.testing.assert_array_equal(losses, expected)
    assert traced_state == state


def set_index(optimizer: ASGD) -> Any:
    optimizer.batch_index = 2
    return optimizer.batch_index


#: What a traced function may ask of an optimizer where nothing else stops the tracer from following it.
QUESTIONS = {
    "get_lr": lambda optimizer: optimizer.get_lr(),
    "set_lr": lambda optimizer: optimizer.set_lr(0.05),
    "state_dict": lambda optimizer: len(optimizer.state_dict()),
    "set_state_dict": lambda optimizer: optimizer.set_state_dict(optimizer.state_dict()),
    "batch_index": set_index,
    "gradient_norm": lambda optimizer: optimizer.gradient_norm(),
    "variance_ratio": lambda optimizer: optimizer.variance_ratio,
    "step": lambda optimizer: optimizer.step(),
    "repr": repr,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_call_by_itself(question: str) -> None:
    answers = []
    for traced in (False, True):
        param = paddle.ones([3])
        param.stop_gradient, param.name = False, "first"
        optimizer = ASGD(0.1, 3, [param])
        ask = QUESTIONS[question]
        ask = paddle.jit.to_static(lambda optimizer, ask=ask: ask(optimizer)) if traced else ask
        for _ in range(3):
            param.grad = paddle.full([3], 0.5)
            if not optimizer._inputs.index.in_use:
                optimizer.step()
            answer = ask(optimizer)
        answers.append((answer, optimizer.get_lr(), bits(state_of(optimizer, param))))
    assert answers[0] == answers[1]
