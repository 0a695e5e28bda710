# SPDX-License-Identifier: Apache-2.0
"""Where a run of FixedBatchSampler stands: saved, carried, refused, and gone on with."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from loading import N, end_workers, expected, loader_of, make, samples_in, seen, take

from paddle_asgd.sag.batches import ORDERS
from paddle_asgd.sag.sampler import FixedBatchSampler

WORKERS = [pytest.param(0, id="no_workers"), pytest.param(2, id="two_workers")]


@pytest.fixture(autouse=True)
def _no_workers_left() -> Iterator[None]:
    yield
    end_workers()


def through_paddle(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    paddle.save({"sampler": state}, str(folder / "state.pdopt"))
    return paddle.load(str(folder / "state.pdopt"))["sampler"]


@pytest.mark.parametrize(
    "carry",
    [
        pytest.param(lambda state, folder: json.loads(json.dumps(state)), id="json"),
        pytest.param(lambda state, folder: pickle.loads(pickle.dumps(state)), id="pickle"),
        pytest.param(through_paddle, id="paddle"),
        pytest.param(lambda state, folder: {k: np.array(v)[()] for k, v in state.items()}, id="numpy_scalars"),
    ],
)
def test_state_travels(carry: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    sampler = make("reshuffle", seed=None)
    take(sampler.enumerate(loader_of(sampler)), 2)
    resumed = make("reshuffle", seed=None)
    assert resumed.batches != sampler.batches
    resumed.load_state_dict(carry(sampler.state_dict(), tmp_path))
    assert resumed.state_dict() == sampler.state_dict()
    assert resumed.batches == sampler.batches
    assert seen(resumed.enumerate(loader_of(resumed))) == expected(sampler, 0, 2)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", range(N + 1))
def test_resume_goes_on_with_the_rest(order: str, position: int, workers: int) -> None:
    sampler = make(order)
    loader = loader_of(sampler, workers)
    seen(sampler.enumerate(loader))
    passing = sampler.enumerate(loader)
    for _ in range(position):
        next(passing)
    resumed = make(order)
    resumed.set_state_dict(sampler.state_dict())
    passing.close()
    loader = loader_of(resumed, workers)
    if position < N:
        assert seen(resumed.enumerate(loader)) == expected(sampler, 1, position)
    assert seen(resumed.enumerate(loader)) == expected(sampler, 2)


def test_resume_of_a_plain_pass_goes_on_with_the_rest() -> None:
    sampler = make("reshuffle")
    sampler.set_state_dict({**sampler.state_dict(), "epoch": 3, "position": 1})
    assert [samples_in(batch) for batch in loader_of(sampler)] == [b for _, b in expected(sampler, 3, 1)]
    assert sampler.state_dict()["epoch"] == 4


def test_state_holds_for_another_number_of_ranks() -> None:
    """As long as the batches of all ranks together stay the same."""
    four = FixedBatchSampler(range(48), 3, seed=1, num_replicas=4, rank=0)
    two = FixedBatchSampler(range(48), 6, seed=1, num_replicas=2, rank=1)
    four.set_state_dict({**four.state_dict(), "epoch": 5, "position": 2})
    two.set_state_dict(four.state_dict())
    assert two.state_dict() == four.state_dict()


@pytest.mark.parametrize(
    ("before", "epoch", "goes_on"),
    [
        pytest.param("fresh", 3, (3, 0), id="fresh"),
        pytest.param("broken_off", 0, (0, 0), id="same_again"),
        pytest.param("broken_off", 1, (1, 0), id="next"),
        pytest.param("loaded", 2, (2, 1), id="loaded"),
        pytest.param("loaded", 5, (5, 0), id="loaded_other"),
    ],
)
def test_set_epoch(before: str, epoch: int, goes_on: tuple[int, int]) -> None:
    sampler = make("reshuffle")
    if before == "broken_off":
        take(sampler.enumerate(loader_of(sampler)), 2)
    if before == "loaded":
        sampler.set_state_dict({**sampler.state_dict(), "epoch": 2, "position": 1})
    sampler.set_epoch(epoch)
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == goes_on
    assert seen(sampler.enumerate(loader_of(sampler))) == expected(sampler, *goes_on)
    assert seen(sampler.enumerate(loader_of(sampler))) == expected(sampler, epoch + 1)


@pytest.mark.parametrize("method", ["set_epoch", "epoch_order"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_refused_epoch(method: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="epoch: received"):
        getattr(make(), method)(value)


REFUSED: list[Any] = [
    pytest.param({"dataset_length": 12}, r"dataset_length is 12 .*expected 11", id="dataset_length"),
    pytest.param({"batch_size": 4}, r"batch_size is 4 .*expected 3", id="batch_size"),
    pytest.param({"order": "reshuffle"}, r"order is 'reshuffle' .*expected 'replacement'", id="order"),
    pytest.param({"shuffle_once": False}, r"shuffle_once is False .*expected True", id="shuffle_once"),
    pytest.param({"drop_last": True}, r"drop_last is True .*expected False", id="drop_last"),
    pytest.param({"drop_last": 0}, r"drop_last is 0 ", id="drop_last_int"),
    pytest.param({"batch_size": 3.0}, r"batch_size is 3.0 ", id="batch_size_float"),
    pytest.param({"batch_size": np.array([3, 3])}, r"batch_size is array", id="batch_size_array"),
    pytest.param({"seed": 10}, r"seed is 10 .*expected 9", id="seed"),
    pytest.param({"epoch": -1}, r"epoch is -1 .*at least 0", id="epoch_negative"),
    pytest.param({"epoch": 1.0}, r"epoch is 1.0 ", id="epoch_float"),
    pytest.param({"epoch": True}, r"epoch is True ", id="epoch_bool"),
    pytest.param({"position": -1}, r"position is -1 .*at least 0", id="position_negative"),
    pytest.param({"position": N}, r"position is 4, expected less than 4", id="position_beyond"),
    pytest.param({"position": None}, r"position is None ", id="position_none"),
    pytest.param({"rank": 0}, r"entry 'rank' is unknown", id="unknown"),
    pytest.param({1: 0}, r"entry 1 is unknown", id="unknown_number"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_state(changes: dict[Any, Any], message: str) -> None:
    sampler = make()
    take(sampler.enumerate(loader_of(sampler)), 2)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=rf"set_state_dict: {message}.*Nothing has been loaded"):
        sampler.set_state_dict({**before, "epoch": 3, "position": 1, **changes})
    assert sampler.state_dict() == before


@pytest.mark.parametrize("name", make().state_dict())
def test_incomplete_state_is_refused(name: str) -> None:
    sampler = make()
    state = sampler.state_dict()
    del state[name]
    with pytest.raises(ValueError, match=f"entry '{name}' is missing"):
        sampler.set_state_dict(state)


@pytest.mark.parametrize("seed", [-1, 1.5, None, True])
def test_seed_that_is_none_is_refused(seed: Any) -> None:
    """A sampler that drew its own takes that of the state, if it is one."""
    sampler = make(seed=None)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match="seed is"):
        sampler.set_state_dict({**before, "seed": seed})
    assert sampler.state_dict() == before


@pytest.mark.parametrize("state", [None, [], "state"])
def test_state_of_another_type_is_refused(state: Any) -> None:
    with pytest.raises(TypeError, match=r"set_state_dict: received .*expected a dict"):
        make().set_state_dict(state)
