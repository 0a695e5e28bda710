# SPDX-License-Identifier: Apache-2.0
"""The optimizer in dygraph against the reference, all state after every step, by step() alone. Options are in
test_options.py, other ways to a step in test_doors.py."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from problems import FULL_SHAPES, SHAPES, Quadratic, bits, state_of
from reference import Sag
from trial import Trial

from paddle_asgd import ASGD


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_all_state_follows_the_formula(n: int, dtype: str) -> None:
    trial = Trial(n=n, dtype=dtype)
    for _ in range(3 * n + 2):
        trial.step()


def test_empty_parameters_among_others() -> None:
    """By gradients that are given, for Paddle 2.6 computes none of an empty tensor."""
    problem = Quadratic(batches=3, shapes=SHAPES)
    params = [paddle.to_tensor(value, stop_gradient=False) for value in problem.start]
    optimizer = ASGD(0.1, 3, params, weight_decay=0.1)
    sag = Sag(problem.start, 3, weight_decay=0.1)
    for step in range(11):
        grads = problem.gradients(step, sag.x)
        optimizer.apply_gradients([(p, paddle.to_tensor(g)) for p, g in zip(params, grads)])
        sag.step(grads, 0.1)
        for p, param in enumerate(params):
            sag.check(p, state_of(optimizer, param), 1e-13)


@pytest.mark.parametrize("offset", [1, 3])
def test_memory_at_an_odd_offset(offset: int) -> None:
    """A parameter that is a slice of a larger tensor: the bits of one of its own, and nothing written beside it."""
    problem = Quadratic(batches=3, shapes=[[8209]])
    (own,) = problem.parameters()
    memory = paddle.full([8209 + offset + 5], 77.0)
    memory[offset : offset + 8209] = own.detach()
    view = memory[offset : offset + 8209].detach()
    view.stop_gradient = False
    optimizers = {param: ASGD(0.1, 3, [param], weight_decay=0.1) for param in (own, view)}
    for step in range(8):
        for param, optimizer in optimizers.items():
            problem.backward(step, [param])
            optimizer.step()
            optimizer.clear_grad()
    assert bits(state_of(optimizers[own], own)) == bits(state_of(optimizers[view], view))
    np.testing.assert_array_equal(memory[offset : offset + 8209].numpy(), own.numpy())
    assert memory[:offset].tolist() + memory[offset + 8209 :].tolist() == [77.0] * (offset + 5)


@pytest.mark.parametrize("set_to_zero", [False, True], ids=["no_gradient_skips", "zeroed_gradient_counts"])
def test_parameters_that_some_batches_do_not_use(set_to_zero: bool) -> None:
    """Without a gradient a parameter's own clock stands still; a gradient zeroed by clear_grad() is one of zeros."""
    # Full, for clear_grad(set_to_zero=False) does not take the gradient of an empty parameter away.
    # And without the watch, which says that clocks that stand still no longer fit the batches.
    trial = Trial(shapes=FULL_SHAPES, watch=False)
    for step in range(11):
        used = [i for i in range(len(trial.params)) if step == 0 or (step + i) % 3]
        trial.problem.backward(step, trial.params, among=used)
        trial.optimizer.step()
        trial.optimizer.clear_grad(set_to_zero)
        grads = trial.gradients()
        trial.follow([g if i in used else g * 0 if set_to_zero else None for i, g in enumerate(grads)])
    assert (len(set(trial.sag.m)) == 1) == set_to_zero


def test_a_parameter_frozen_for_a_while() -> None:
    """Its gradient is there all the time: the flag alone must hold the parameter."""
    trial = Trial()
    for step in range(11):
        frozen = 4 <= step < 8
        trial.problem.backward(step, trial.params)
        trial.params[1].stop_gradient = frozen
        trial.optimizer.step()
        trial.params[1].stop_gradient = False
        trial.optimizer.clear_grad()
        trial.follow([None if frozen and i == 1 else g for i, g in enumerate(trial.gradients())])
    assert trial.sag.m[1:3] == [7, 11]


def test_main_grad_takes_the_place_of_grad() -> None:
    trial = Trial(dtype="float32")
    for _ in range(8):
        grads = [g * 3 + 1 for g in trial.gradients()]
        for param, grad in zip(trial.params, grads):
            param.main_grad = paddle.to_tensor(grad.astype("float32"))
        trial.step(grads=grads)


def test_sparse_gradients_are_exact() -> None:
    """Rows named twice are added up; rows not named have a gradient of zero, and leave the history in their turn."""
    draw = np.random.default_rng(2)
    start = draw.normal(size=(11, 5)).astype(np.float32)
    ids = [draw.integers(0, 11, size=6) for _ in range(3)]
    ids[1][3] = ids[1][0]
    targets = [draw.normal(size=(6, 5)).astype(np.float32) for _ in range(3)]
    tables = [paddle.nn.Embedding(11, 5, sparse=sparse) for sparse in (True, False)]
    for table in tables:
        table.weight.set_value(start)
    optimizers = [ASGD(0.1, 3, table.parameters(), weight_decay=0.1) for table in tables]
    sag = Sag([start], 3, weight_decay=0.1)
    for step in range(8):
        k = step % 3
        for table, optimizer in zip(tables, optimizers):
            (0.5 * (table(paddle.to_tensor(ids[k])) - paddle.to_tensor(targets[k])) ** 2).sum().backward()
            assert table.weight.grad.is_selected_rows() == (table is tables[0])
            optimizer.step()
            optimizer.clear_grad()
        grad = np.zeros((11, 5))
        np.add.at(grad, ids[k], sag.x[0][ids[k]] - targets[k])
        sag.step([grad], 0.1)
        states = [state_of(optimizer, table.weight) for table, optimizer in zip(tables, optimizers)]
        sag.check(0, states[0], 1e-6)
        assert bits(states[0]) == bits(states[1])
