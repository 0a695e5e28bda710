# SPDX-License-Identifier: Apache-2.0
"""NonMonotonicTrigger: the rule of AWD-LSTM, and a state to resume from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest

from paddle_asgd import NonMonotonicTrigger


def fired(n: int, losses: list[Any]) -> list[int]:
    """At which losses, counted from 1, a trigger fires."""
    trigger = NonMonotonicTrigger(n)
    return [i for i, loss in enumerate(losses, 1) if trigger(loss)]


def by_definition(n: int, losses: list[float]) -> list[int]:
    """As its authors wrote it: ``len(losses) > n and loss > min(losses[:-n])`` with the losses before."""
    for i, loss in enumerate(losses):
        if i > n and loss > min(losses[:i][:-n]):
            return [i + 1]
    return []


@pytest.mark.parametrize(
    ("n", "losses", "expected"),
    [
        (3, [10, 9, 8, 7, 11], [5]),
        (3, [10, 9, 8, 7, 6, 5, 4], []),
        (3, [0, 0.1, 0.2], []),
        (5, [10, 9, 8, 7, 6, 5, 9.5], []),
        (5, [10, 9, 8, 7, 6, 5, 10.1], [7]),
        (5, [10, 9, 8, 7, 6, 5, 10.0], []),
        (1, [2, 1, 2], []),
        (1, [2, 1, 1, 1.5, 3, 4], [4]),
        (1, [math.inf, math.inf, 5, 6, math.inf], [5]),
        (1, [-1, -2, -2, -1.5], [4]),
    ],
)
def test_fires_once_by_the_rule(n: int, losses: list[float], expected: list[int]) -> None:
    assert fired(n, losses) == expected == by_definition(n, losses)


def test_random_losses() -> None:
    draw = np.random.RandomState(1)
    seen = set()
    for _ in range(300):
        n = draw.randint(1, 6)
        losses = (10 / np.arange(1, 30) + draw.standard_normal(29)).tolist()
        assert fired(n, losses) == by_definition(n, losses)
        seen.update(fired(n, losses))
    assert len(seen) > 10


def test_kinds_of_losses() -> None:
    assert fired(1, [np.float32(3), paddle.to_tensor(2.0), paddle.to_tensor([2], dtype="int64"), 2.5]) == [4]
    for wrong in (None, "3", True, [3.0]):
        with pytest.raises(TypeError, match=r"^loss: received .*, expected a number, or a tensor of one"):
            NonMonotonicTrigger()(wrong)
    with pytest.raises(ValueError, match=r"^loss: received a tensor of float32 and shape \[2\].*pass its mean"):
        NonMonotonicTrigger()(paddle.zeros([2]))


def test_nan_is_refused_and_changes_nothing() -> None:
    trigger = NonMonotonicTrigger(1)
    trigger(3.0)
    before = trigger.state_dict()
    for nan in (math.nan, paddle.to_tensor(math.nan)):
        with pytest.raises(ValueError, match=r"^loss: received nan"):
            trigger(nan)
    assert trigger.state_dict() == before


@pytest.mark.parametrize("at", range(9))
def test_resumed_anywhere(at: int) -> None:
    losses = [10, 9, 9.5, 8, 7, 9.2, 9.6, 3, 12]
    trigger = NonMonotonicTrigger(3)
    whole = [trigger(loss) for loss in losses]
    assert any(whole)
    first, second = NonMonotonicTrigger(3), NonMonotonicTrigger(3)
    parts = [first(loss) for loss in losses[:at]]
    second.set_state_dict(first.state_dict())
    assert second.triggered == first.triggered
    assert parts + [second(loss) for loss in losses[at:]] == whole


def test_state_is_a_copy_of_limited_size() -> None:
    trigger = NonMonotonicTrigger(2)
    for loss in range(100, 0, -1):
        trigger(loss)
    state = trigger.state_dict()
    assert state == {"n": 2, "best": 3.0, "recent": [2.0, 1.0], "triggered": False}
    trigger(0.5)
    assert state["recent"] == [2.0, 1.0]
    other = NonMonotonicTrigger(2)
    other.load_state_dict(state)
    other(0.5)
    assert state["recent"] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 4}, "n is 4 of type int, expected 3, as in this trigger"),
        ({"best": math.nan}, "best: received nan"),
        ({"best": None}, "best: received None"),
        ({"recent": 3}, "'recent' is 3 of type int, expected a list of at most 3 losses"),
        ({"recent": [1.0] * 4}, "'recent' is .*, expected a list of at most 3"),
        ({"recent": ["1"]}, "recent: received '1'"),
        ({"triggered": 1}, "'triggered' is 1 of type int, expected True or False"),
        ({"more": 1}, "received the keys .*'more'.*, expected"),
    ],
)
def test_states_refused(change: dict[str, Any], words: str) -> None:
    trigger = NonMonotonicTrigger(3)
    trigger(2.0)
    before = trigger.state_dict()
    with pytest.raises(ValueError, match=rf"^set_state_dict: {words}.*Nothing has been loaded\.$"):
        trigger.set_state_dict({**before, **change})
    with pytest.raises(TypeError, match=r"^set_state_dict: received None"):
        trigger.set_state_dict(None)
    assert trigger.state_dict() == before


def test_arguments() -> None:
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"^n: received {wrong}, expected an int of at least 1"):
            NonMonotonicTrigger(wrong)
    for wrong in (2.0, True, None):
        with pytest.raises(TypeError, match=r"^n: received"):
            NonMonotonicTrigger(wrong)
    assert repr(NonMonotonicTrigger(4)) == "NonMonotonicTrigger(n=4, triggered=False)"
