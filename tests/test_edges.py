# SPDX-License-Identifier: Apache-2.0
"""Where two rules meet: groups edited between two steps, clips with groups and with sparse gradients.

Single rules are tested beside their names; must not repeat them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest
from problems import constant, step_with
from refusing import assert_refused

from paddle_asgd import ASGD


def test_a_clip_shared_by_two_groups_acts_on_each_alone() -> None:
    """Gradients 3 and 4, clipped to norm 1, are 1 each, and not 3/5 and 4/5."""
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    groups = [{"params": [constant(0.0)], "grad_clip": clip} for _ in range(2)]
    assert step_with(ASGD(1.0, 3, groups, grad_clip=clip), 3.0, 4.0) == pytest.approx([-1.0, -1.0], rel=1e-6)


def test_groups_edited_between_two_steps_count() -> None:
    optimizer = ASGD(0.5, 3, [{"params": [constant(0.0)], "learning_rate": 1.0}])
    before = [step_with(optimizer, 1.0) for _ in range(3)][-1]
    optimizer._param_groups[0]["learning_rate"] = 0.0
    assert step_with(optimizer, 1.0) == before


@pytest.mark.parametrize("kind", [np.array, np.float32, paddle.to_tensor], ids=lambda kind: kind.__name__)
def test_a_scheduler_of_the_users_own(kind: Callable) -> None:
    """May give what a number can be kept in."""

    class Own(paddle.optimizer.lr.LRScheduler):
        def get_lr(self) -> Any:
            return kind(0.125)

    assert step_with(ASGD(Own(), 3, [constant(1.0)]), 1.0) == [0.875]


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
