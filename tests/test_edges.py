# SPDX-License-Identifier: Apache-2.0
"""Where two rules meet: refused first steps, things changed between two steps, clips with groups and sparse gradients.

Single rules are tested beside their names; must not repeat them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest
from test_refusals import assert_refused

from paddle_asgd import ASGD


def parameter(value: float, dtype: str = "float32", shape: tuple = (1,)) -> Any:
    return paddle.create_parameter(list(shape), dtype, default_initializer=paddle.nn.initializer.Constant(value))


def step(optimizer: ASGD, *grads: float) -> list[float]:
    """One step with a constant gradient for each parameter; returns the parameters' first elements."""
    for param, grad in zip(optimizer._parameter_list, grads):
        param.grad = paddle.full_like(param, grad).detach()
    optimizer.step()
    optimizer.clear_grad(False)
    return [param.astype("float32").flatten()[0].item() for param in optimizer._parameter_list]


def test_a_clip_shared_by_two_groups_acts_on_each_alone() -> None:
    """Gradients 3 and 4, clipped to norm 1, are 1 each, and not 3/5 and 4/5."""
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    groups = [{"params": [parameter(0.0)], "grad_clip": clip} for _ in range(2)]
    assert step(ASGD(1.0, 3, groups, grad_clip=clip), 3.0, 4.0) == pytest.approx([-1.0, -1.0], rel=1e-6)


def test_groups_edited_between_two_steps_count() -> None:
    optimizer = ASGD(0.5, 3, [{"params": [parameter(0.0)], "learning_rate": 1.0}])
    before = [step(optimizer, 1.0) for _ in range(3)][-1]
    optimizer._param_groups[0]["learning_rate"] = 0.0
    assert step(optimizer, 1.0) == before


@pytest.mark.parametrize(
    ("attributes", "moved"),
    [({}, 0.125), ({"learning_rate": 0.5}, 0.0625)],
    ids=["none", "half"],
)
def test_own_options_changed_between_two_steps_count(attributes: dict, moved: float) -> None:
    param = parameter(1.0)
    optimizer = ASGD(0.125, 3, [param])
    before = [step(optimizer, 1.0) for _ in range(3)][-1]
    param.optimize_attr = attributes
    assert step(optimizer, 1.0)[0] == pytest.approx(before[0] - moved, rel=1e-6)


def test_a_tensor_as_own_learning_rate_stands_for_the_whole() -> None:
    """Equal to the multiplier that it replaces, it still means another thing."""
    param = parameter(1.0)
    optimizer = ASGD(0.125, 3, [param])
    before = [step(optimizer, 1.0) for _ in range(2)][-1]
    param.optimize_attr["learning_rate"] = paddle.to_tensor(1.0)
    assert step(optimizer, 1.0)[0] == pytest.approx(before[0] - 1.0, rel=1e-6)


WRONG = {
    "main_grad_shape": lambda o: setattr(o._parameter_list[0], "main_grad", paddle.ones([3])),
    "learning_rate": lambda o: o._learning_rate.set_value(paddle.to_tensor(-0.5)),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_refused_first_step_leaves_nothing(spoil: Callable) -> None:
    optimizer = ASGD(paddle.to_tensor(0.125), 3, [parameter(1.0, "bfloat16")], multi_precision=True)
    spoil(optimizer)
    assert_refused(lambda: step(optimizer, 1.0), ValueError, ["received"])
    assert optimizer.state_dict() == {"batch_num": 3}
    optimizer._parameter_list[0].main_grad = None
    optimizer._learning_rate.set_value(paddle.to_tensor(0.125))
    assert step(optimizer, 1.0) == [0.875]


def test_a_checkpoint_without_steps_forgets_the_master_weights() -> None:
    param = parameter(1.0, "bfloat16")
    optimizer = ASGD(0.01, 3, [param], multi_precision=True)
    empty = optimizer.state_dict()
    straight = [step(optimizer, 1.0) for _ in range(5)]
    param.set_value(paddle.full_like(param, 1.0))
    optimizer.set_state_dict(empty)
    assert [step(optimizer, 1.0) for _ in range(5)] == straight


@pytest.mark.parametrize("kind", [np.array, np.float32, paddle.to_tensor], ids=lambda kind: kind.__name__)
def test_a_scheduler_of_the_users_own(kind: Callable) -> None:
    """May give what a number can be kept in."""

    class Own(paddle.optimizer.lr.LRScheduler):
        def get_lr(self) -> Any:
            return kind(0.125)

    assert step(ASGD(Own(), 3, [parameter(1.0)]), 1.0) == [0.875]


def test_a_parameter_that_became_16_bit_keeps_its_float32_history() -> None:
    linear = paddle.nn.Linear(2, 1, bias_attr=False)
    linear.weight.set_value(paddle.ones([2, 1]))
    optimizer = ASGD(0.125, 3, linear.parameters(), multi_precision=True)
    step(optimizer, 1.0)
    linear.to(dtype="bfloat16")
    assert [step(optimizer, 1.0)[0] for _ in range(2)] == [0.75, 0.625]
    assert {str(t.dtype) for k, t in optimizer.state_dict().items() if "_y_" in k} == {str(paddle.ones([1]).dtype)}


def test_sparse_gradients_clipped_by_value() -> None:
    """Paddle's clip would take the rows that are there for the whole."""
    embedding = paddle.nn.Embedding(7, 3, sparse=True)
    embedding.weight.set_value(paddle.zeros([7, 3]))
    optimizer = ASGD(1.0, 3, embedding.parameters(), grad_clip=paddle.nn.ClipGradByValue(1.5))
    embedding(paddle.to_tensor([5, 1, 5])).sum().backward()
    optimizer.step()
    expected = np.zeros([7, 3], "float32")
    expected[1], expected[5] = -1.0, -1.5
    np.testing.assert_array_equal(embedding.weight.numpy(), expected)


@pytest.mark.parametrize("call", ["step", "state_dict"])
def test_made_for_a_program_and_used_in_dygraph(call: str) -> None:
    paddle.enable_static()
    optimizer = ASGD(0.1, 3)
    paddle.disable_static()
    assert_refused(getattr(optimizer, call), ValueError, ["parameters", "None"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_that_runs_out_within_a_state_leaves_none_of_it(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """d fits, y does not: what is left of the state must not be taken for a whole one."""
    optimizer = ASGD(0.125, 3, [parameter(1.0, dtype)], multi_precision=True)
    add = optimizer._add_accumulator

    def out_of_memory(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "y":
            raise MemoryError("no room for y")
        return add(name, *arguments, **options)

    monkeypatch.setattr(optimizer, "_add_accumulator", out_of_memory)
    with pytest.raises(MemoryError, match="no room for y"):
        step(optimizer, 1.0)
    assert optimizer.state_dict() == {"batch_num": 3}
    monkeypatch.undo()
    assert step(optimizer, 1.0) == [0.875]
