# SPDX-License-Identifier: Apache-2.0
"""The tensors kept for each parameter: when they are made, what they are called, and when none of them may be left."""

from __future__ import annotations

import warnings
from typing import Any, Callable

import paddle
import pytest
from problems import Quadratic, bits, constant, state_of, step_with
from refusing import assert_refused, content
from trial import Trial

from paddle_asgd import ASGD

WRONG = {
    "main_grad_shape": lambda o: setattr(o._parameter_list[0], "main_grad", paddle.ones([3])),
    "learning_rate": lambda o: o._learning_rate.set_value(paddle.to_tensor(-0.5)),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_refused_first_step_leaves_nothing(spoil: Callable) -> None:
    optimizer = ASGD(paddle.to_tensor(0.125), 3, [constant(1.0, "bfloat16")], multi_precision=True)
    spoil(optimizer)
    assert_refused(lambda: step_with(optimizer, 1.0), ValueError, ["received"])
    assert optimizer.state_dict() == {"batch_num": 3}
    optimizer._parameter_list[0].main_grad = None
    optimizer._learning_rate.set_value(paddle.to_tensor(0.125))
    assert step_with(optimizer, 1.0) == [0.875]


def test_a_checkpoint_without_steps_forgets_the_master_weights() -> None:
    param = constant(1.0, "bfloat16")
    optimizer = ASGD(0.01, 3, [param], multi_precision=True)
    empty = optimizer.state_dict()
    straight = [step_with(optimizer, 1.0) for _ in range(5)]
    param.set_value(paddle.full_like(param, 1.0))
    optimizer.set_state_dict(empty)
    assert [step_with(optimizer, 1.0) for _ in range(5)] == straight


def test_a_parameter_that_became_16_bit_keeps_its_float32_history() -> None:
    linear = paddle.nn.Linear(2, 1, bias_attr=False)
    linear.weight.set_value(paddle.ones([2, 1]))
    optimizer = ASGD(0.125, 3, linear.parameters(), multi_precision=True)
    step_with(optimizer, 1.0)
    linear.to(dtype="bfloat16")
    assert [step_with(optimizer, 1.0)[0] for _ in range(2)] == [0.75, 0.625]
    assert {str(t.dtype) for k, t in optimizer.state_dict().items() if "_y_" in k} == {str(paddle.ones([1]).dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_that_runs_out_within_a_state_leaves_none_of_it(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """d fits, y does not: what is left of the state must not be taken for a whole one."""
    optimizer = ASGD(0.125, 3, [constant(1.0, dtype)], multi_precision=True)
    add = optimizer._add_accumulator

    def out_of_memory(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "y":
            raise MemoryError("no room for y")
        return add(name, *arguments, **options)

    monkeypatch.setattr(optimizer, "_add_accumulator", out_of_memory)
    with pytest.raises(MemoryError, match="no room for y"):
        step_with(optimizer, 1.0)
    assert optimizer.state_dict() == {"batch_num": 3}
    monkeypatch.undo()
    assert step_with(optimizer, 1.0) == [0.875]


def test_state_made_before_the_first_step() -> None:
    """A template for those who load into it; it changes no number."""
    problem, states = Quadratic(3, [[257], [3, 2], [5]]), []
    for early in (False, True):
        params = problem.parameters()
        optimizer = ASGD(0.1, 3, params)
        if early:
            optimizer._create_accumulators(None, params)
            assert sum(value.size > 0 for value in optimizer.state_dict().values() if hasattr(value, "size")) >= 9
            names = set(optimizer.state_dict())
        for step in range(5):
            problem.backward(step, params)
            optimizer.step()
            optimizer.clear_grad()
        states.append([bits(state_of(optimizer, p)) for p in params])
    assert states[0] == states[1]
    assert set(optimizer.state_dict()) == names


@pytest.mark.parametrize("indexed", [True, False])
def test_master_weights_switched_off_after_steps(indexed: bool) -> None:
    """The history is found under the name of the master weight, and a first batch index finds the clock there."""
    param = paddle.create_parameter([4], "float16")
    optimizer = ASGD(0.1, 3, [param], multi_precision=True)
    for step in range(6):
        if step == 3:
            optimizer._multi_precision = False
        if step >= 3 and indexed:
            optimizer.batch_index = step % 3
        param.grad = paddle.full([4], 1.0 + step, "float16")
        optimizer.step()
    state = state_of(optimizer, param)
    assert (state["m"][0], state["d"].tolist()) == (6, [15.0] * 4)
    assert optimizer.gradient_norm() == pytest.approx(10.0)


def test_names_of_state_stay() -> None:
    """An index that begins in the middle puts other tensors in the clocks' place."""
    trial = Trial(n=5, theta=0.3)
    trial.step()
    before = list(trial.optimizer.state_dict())
    trial.step(index=3)
    assert list(trial.optimizer.state_dict()) == before
    assert "theta_step" not in before


def test_parameter_of_another_dtype_since_its_first_step() -> None:
    linear = paddle.nn.Linear(3, 2)
    optimizer = ASGD(0.1, 3, linear.parameters())

    def step() -> None:
        optimizer.apply_gradients([(p, paddle.ones(p.shape, p.dtype)) for p in linear.parameters()])

    step()
    linear.to(dtype="float64")
    before = content([*linear.parameters(), *list(optimizer.state_dict().values())[:6]])
    assert_refused(step, ValueError, [linear.bias.name, "float32", "float64"])
    assert content([*linear.parameters(), *list(optimizer.state_dict().values())[:6]]) == before


def test_warning_of_16_bits_comes_once_and_points_to_the_caller() -> None:
    param = paddle.create_parameter([5], "float16", default_initializer=paddle.nn.initializer.Constant(1.0))
    optimizer = ASGD(0.1, 3, [param])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            param.grad = paddle.ones([5], "float16")
            optimizer.step()
    (warning,) = caught
    assert all(piece in str(warning.message) for piece in (param.name, "float16", "multi_precision=True"))
    assert warning.filename == __file__
