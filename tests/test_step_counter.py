# SPDX-License-Identifier: Apache-2.0
"""StepCounter: which calls of an optimizer count as a step, in the updates of an AveragedModel; what is refused.

Must not test what an update does (test_averaged_model.py).
"""

from __future__ import annotations

import gc
import math
import weakref
from types import SimpleNamespace
from typing import Any

import paddle
import pytest
from averaging import Judge, Network, arrays, batches, train
from problems import PIR, Quadratic
from problems import Network as TrainedNetwork
from test_fused import WholeStep

from paddle_asgd import ASGD, AveragedModel, ema, swa

ADAM = paddle.optimizer.Adam
OPTIMIZERS: dict[str, Any] = {
    "Adam": ADAM,
    "AdamW": paddle.optimizer.AdamW,
    "Momentum": paddle.optimizer.Momentum,
    "ASGD": lambda rate, parameters: ASGD(rate, 3, parameters),
}


def momentum(model: Any, rate: float = 0.05, **options: Any) -> Any:
    return paddle.optimizer.Momentum(rate, parameters=model.parameters(), **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_counted_and_not_calls(name: str) -> None:
    """Four batches accumulate for a step, and ``update`` is called after every one, and twice."""
    model = Network()
    optimizer = OPTIMIZERS[name](0.01, parameters=model.parameters())
    averaged, judge = AveragedModel(model, ema(0.6), optimizer=optimizer), Judge(arrays(model), ema(0.6))
    for number, batch in enumerate(batches(12), start=1):
        model(batch).square().mean().backward()
        if number % 4 == 0:
            optimizer.step()
            optimizer.clear_grad()
            judge.update(arrays(model))
        averaged.update()
        averaged.update()
    assert averaged.num_updates == 3
    judge.check(arrays(averaged.averaged_state_dict()))


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GradScaler that works on the CPU, where Paddle switches its own off."""
    module = paddle.amp.grad_scaler
    place = SimpleNamespace(is_gpu_place=lambda: True)
    monkeypatch.setattr(module, "_dygraph_tracer", lambda: SimpleNamespace(_expected_place=place))
    return paddle.amp.GradScaler(init_loss_scaling=2.0, use_dynamic_loss_scaling=False)


@pytest.mark.parametrize("way", ["step", "minimize"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_steps_do_not_count(name: str, way: str, scaler: Any) -> None:
    model = paddle.nn.Linear(2, 1)
    optimizer = OPTIMIZERS[name](0.01, parameters=model.parameters())
    averaged = AveragedModel(model, ema(0.6), optimizer=optimizer)
    for factor in (1.0, math.inf, 2.0, math.nan, math.inf, 3.0):
        loss = scaler.scale((model(paddle.ones([1, 2])) * factor).mean())
        loss.backward()
        if way == "step":
            scaler.step(optimizer)
            scaler.update()
        else:
            scaler.minimize(optimizer, loss)
        optimizer.clear_grad()
        averaged.update()
    assert averaged.num_updates == 3


def test_one_step_of_groups_is_one() -> None:
    model = Network()
    groups = [{"params": [model.first.weight]}, {"params": [model.last.weight]}]
    for optimizer in (ADAM(0.01, parameters=groups), ASGD(0.01, 1, groups)):
        averaged = AveragedModel(model, ema(0.5), optimizer=optimizer)
        train(model, optimizer, batches(1)[0])
        averaged.update()
        averaged.update()
        assert averaged.num_updates == 1


def test_a_step_that_ends_with_an_error_does_not_count() -> None:
    model = Network()
    optimizer = ASGD(0.1, 2, model.parameters())
    averaged = AveragedModel(model, ema(0.5), optimizer=optimizer)
    model.last.bias.grad = paddle.ones([2])
    model.last.bias.regularizer = "none that Paddle knows"
    with pytest.raises(Exception, match="str"):
        optimizer.step()
    averaged.update()
    assert averaged.num_updates == 0


def test_two_averages_of_one_optimizer_and_one_that_is_gone() -> None:
    model = Network()
    optimizer = momentum(model)
    first = AveragedModel(model, ema(0.5), optimizer=optimizer)
    second = AveragedModel(model, swa(), optimizer=optimizer, update_every=2)
    gone = AveragedModel(model, swa(), optimizer=optimizer)
    gone.update()
    # At once, with the memory of its averages, and not when the garbage collector comes.
    gc.disable()
    there = weakref.ref(gone)
    del gone
    assert there() is None
    gc.enable()
    for batch in batches(4):
        train(model, optimizer, batch)
        first.update()
        second.update()
    assert (first.num_updates, second.num_updates) == (4, 2)


def test_a_counted_optimizer_cannot_be_copied() -> None:
    """A copy would step the original."""
    import copy

    model = Network()
    optimizer = momentum(model)
    averaged = AveragedModel(model, optimizer=optimizer)
    with pytest.raises(TypeError, match="optimizer: received a request to copy or pickle"):
        copy.copy(optimizer.step)
    assert averaged.num_updates == 0


@pytest.mark.skipif(PIR, reason="only Paddle 2.6 traces a step")
def test_a_step_within_a_static_graph_is_refused() -> None:
    problem = Quadratic(3, [[2]])
    whole = WholeStep(problem)
    averaged = AveragedModel(whole.network, optimizer=whole.optimizer)
    numbers = paddle.to_tensor(TrainedNetwork.numbers(problem, 0))
    with pytest.raises(Exception, match="step: received a call within a function that to_static traces whole"):
        paddle.jit.to_static(whole, full_graph=True)(numbers)
    assert averaged.num_updates == 0
