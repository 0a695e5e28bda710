# SPDX-License-Identifier: Apache-2.0
"""Single entries of a checkpoint: the forms that numbers and tensors come in, and a scheduler's state.

Entries that are refused stand in the table of test_checkpoint_refusals.py.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from resuming import STOP, Run, one_warning

from paddle_asgd import ASGD
from paddle_asgd.entries import as_tensor, entry_value, number_entry


def test_scheduler_entry_without_a_scheduler() -> None:
    with paddle.utils.unique_name.guard():
        straight = Run(schedule=True)
        straight.train(range(STOP))
    with paddle.utils.unique_name.guard():
        resumed = Run()
    with one_warning("'LR_Scheduler' is not used"):
        resumed.optimizer.set_state_dict(straight.optimizer.state_dict())
    resumed.take_parameters(straight)
    assert resumed.content()[:2] == straight.content()[:2]
    assert resumed.optimizer.get_lr() == 0.1


def test_entries_of_another_scheduler_are_told_of_before_any_write() -> None:
    run = Run(schedule=True)
    run.train(range(STOP))
    state = run.copied_state()
    state["LR_Scheduler"]["best"] = 1.0
    run.train(range(STOP, STOP + 2))
    before = run.content()
    with pytest.raises(UserWarning, match="'best' are not used by ExponentialDecay"):
        run.optimizer.set_state_dict(state)
    assert run.content() == before


def test_a_scheduler_within_another_is_loaded_without_a_warning() -> None:
    """Paddle's LinearWarmup always gives one."""

    def optimizer() -> ASGD:
        inner = paddle.optimizer.lr.ExponentialDecay(0.1, 0.9)
        return ASGD(paddle.optimizer.lr.LinearWarmup(inner, 2, 0.01, 0.1), 3, params)

    params = [paddle.create_parameter([3], "float32")]
    first, second = optimizer(), optimizer()
    for _ in range(4):
        first._learning_rate.step()
    state = first.state_dict()
    second.set_state_dict(state)
    assert second._learning_rate.state_dict() == state["LR_Scheduler"]
    state["LR_Scheduler"]["LinearWarmup_LR"]["last_lr"] = None
    with pytest.raises(ValueError, match="'last_lr' of 'LinearWarmup_LR' is None"):
        second.set_state_dict(state)


def test_a_scheduler_that_refuses_its_entry_is_left_as_it_was() -> None:
    """One of the user's own may raise when it has taken half of it."""

    class Refusing(paddle.optimizer.lr.ExponentialDecay):
        def set_state_dict(self, state_dict: dict) -> None:
            super().set_state_dict(state_dict)
            raise ValueError("refused after it was taken")

    scheduler = Refusing(0.1, 0.9)
    optimizer = ASGD(scheduler, 3, [paddle.create_parameter([3], "float32")])
    state = optimizer.state_dict()
    scheduler.step()
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match="refused after it was taken"):
        optimizer.set_state_dict(state)
    assert scheduler.state_dict() == before != state["LR_Scheduler"]


@pytest.mark.parametrize("shape", [[], [1], [2]], ids=str)
@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.numpy(), lambda t: ("its name", t.numpy())])
def test_forms_of_an_entry(form: Callable[[Any], Any], shape: list[int]) -> None:
    """A tensor, an array, and what ``paddle.load(return_numpy=True)`` makes of a tensor."""
    held = paddle.full(shape, 2.5, "float64")
    tensor = as_tensor("p", "d", form(held))
    assert isinstance(tensor, paddle.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), held.numpy())
    value = entry_value(form(held))
    assert value == 2.5 if shape != [2] else list(value) == [2.5, 2.5]


def test_numbers_go_round() -> None:
    """On the host, whatever device is current: a checkpoint of a GPU is read elsewhere."""
    entry = number_entry([2**62 + 1], "int64")
    assert entry.place.is_cpu_place()
    assert entry_value(entry) == 2**62 + 1
