# SPDX-License-Identifier: Apache-2.0
"""Passes of FixedBatchSampler through DataLoaders: which batch it is, however the loader runs ahead or is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable

import paddle
import pytest
from loading import (
    LENGTH,
    SIZE,
    Fake,
    Loader,
    N,
    Numbers,
    end_workers,
    expected,
    loader_of,
    make,
    samples_in,
    seen,
    take,
    workers_alive,
)

from paddle_asgd.sag.batches import ORDERS
from paddle_asgd.sag.sampler import FixedBatchSampler

WORKERS = [pytest.param(0, id="no_workers"), pytest.param(2, id="two_workers")]


@pytest.fixture(autouse=True)
def _no_workers_left() -> Iterator[None]:
    yield
    end_workers()


def test_is_a_batch_sampler_of_paddles() -> None:
    dataset = Numbers()
    sampler = FixedBatchSampler(dataset, SIZE, seed=9)
    assert isinstance(sampler, paddle.io.BatchSampler)
    # What Paddle's own tools read.
    assert sampler.sampler.data_source is dataset
    assert (sampler.batch_size, sampler.drop_last) == (SIZE, False)
    assert len(loader_of(sampler)) == len(sampler) == N


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_batch_comes_with_its_number(order: str, workers: int) -> None:
    sampler = make(order)
    loader = loader_of(sampler, workers)
    for epoch in range(3):
        assert seen(sampler.enumerate(loader)) == expected(sampler, epoch)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"prefetch_factor": 1}, id="one_ahead"),
        pytest.param({"prefetch_factor": 8}, id="all_ahead"),
        pytest.param({"use_buffer_reader": False}, id="no_buffer"),
        pytest.param({"use_shared_memory": False}, id="no_shared_memory"),
        pytest.param({"persistent_workers": True}, id="persistent"),
    ],
)
def test_loader_may_run_ahead(options: dict[str, Any]) -> None:
    sampler = make()
    loader = loader_of(sampler, 2, **options)
    for epoch in range(2):
        for consumed, (index, batch) in enumerate(sampler.enumerate(loader), start=1):
            assert (index, samples_in(batch)) == expected(sampler, epoch, consumed - 1)[0]
            if consumed < N:
                assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (epoch, consumed)
        assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (epoch + 1, 0)


def test_last_batch_ends_the_epoch() -> None:
    """Also for a state that is saved before the loop ends."""
    sampler = make("reshuffle")
    passing = sampler.enumerate(loader_of(sampler))
    for _ in range(N):
        next(passing)
    resumed = make("reshuffle")
    resumed.set_state_dict(sampler.state_dict())
    assert seen(resumed.enumerate(loader_of(resumed))) == expected(sampler, 1)
    assert next(passing, None) is None


@pytest.mark.parametrize("workers", WORKERS)
def test_plain_passes_are_epochs(workers: int) -> None:
    sampler = make("reshuffle")
    loader = loader_of(sampler, workers)
    for epoch in range(2):
        assert [samples_in(batch) for batch in loader] == [samples for _, samples in expected(sampler, epoch)]
    assert seen(sampler.enumerate(loader)) == expected(sampler, 2)
    assert list(sampler) == [samples for _, samples in expected(sampler, 3)]


def test_plain_pass_counts_as_a_whole_epoch_from_its_beginning() -> None:
    sampler = make()
    for _ in loader_of(sampler):
        assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)
        break
    assert seen(sampler.enumerate(loader_of(sampler))) == expected(sampler, 1)


def test_what_is_given_out_may_be_changed() -> None:
    sampler = make("sequential")
    before = sampler.batches
    for samples in [*sampler, *sampler.batches, sampler.batch_sizes, sampler.epoch_order(0)]:
        samples.clear()
    assert sampler.batches == before
    assert sampler.batch_sizes == [3, 3, 3, 2]


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        pytest.param(0, {}, id="no_workers"),
        pytest.param(2, {}, id="two_workers"),
        # Paddle's own pass after such a break fails or gives batches that were left over.
        pytest.param(2, {"persistent_workers": True}, id="persistent"),
    ],
)
@pytest.mark.parametrize("plainly", [False, True], ids=["enumerate", "plain"])
def test_break_ends_the_epoch(workers: int, options: dict[str, Any], plainly: bool) -> None:
    sampler = make("reshuffle")
    loader = loader_of(sampler, workers, **options)
    take(loader if plainly else sampler.enumerate(loader), 2)
    for epoch in (1, 2):
        assert seen(sampler.enumerate(loader)) == expected(sampler, epoch)


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}], ids=["passing", "persistent"])
def test_break_ends_the_workers(options: dict[str, Any]) -> None:
    sampler = make("reshuffle")
    loader = loader_of(sampler, 2, **options)
    take(sampler.enumerate(loader), 1)
    assert workers_alive() == 0
    for _ in range(2):
        seen(sampler.enumerate(loader))
    # Workers that are to stay do.
    assert workers_alive() == (2 if options else 0)
    assert len({id(passing) for passing in Loader.passes}) == (2 if options else 3)


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}], ids=["passing", "persistent"])
def test_overtaken_pass_leaves_the_workers_to_the_other(options: dict[str, Any]) -> None:
    sampler = make("reshuffle")
    loader = loader_of(sampler, 2, **options)
    passing = sampler.enumerate(loader)
    next(passing)
    other = sampler.enumerate(loader)
    first = next(other)
    with pytest.raises(RuntimeError, match="one pass at a time"):
        next(passing)
    assert workers_alive() == 2
    assert seen(iter([first, *other])) == expected(sampler, 1)


def test_overtaken_pass_leaves_shared_workers_alone() -> None:
    """Both passes then have them by the same iterator of Paddle's."""
    sampler = make("reshuffle")
    loader = loader_of(sampler, 2, persistent_workers=True)
    passing = sampler.enumerate(loader)
    for _ in range(N):
        next(passing)
    other = iter(loader)
    with pytest.raises(RuntimeError, match="one pass at a time"):
        next(passing)
    assert [samples_in(batch) for batch in other] == [samples for _, samples in expected(sampler, 1)]


def test_break_leaves_the_state_at_the_next_batch() -> None:
    sampler = make("reshuffle")
    loader = loader_of(sampler)
    take(sampler.enumerate(loader), 3)
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (0, 3)
    sampler.set_state_dict(sampler.state_dict())
    assert seen(sampler.enumerate(loader)) == expected(sampler, 0, 3)
    assert seen(sampler.enumerate(loader)) == expected(sampler, 1)


def test_pass_begins_with_its_first_batch() -> None:
    sampler = make("reshuffle")
    loader = loader_of(sampler)
    unused = sampler.enumerate(loader)
    assert seen(sampler.enumerate(loader)) == expected(sampler, 0)
    assert seen(unused) == expected(sampler, 1)


@pytest.mark.parametrize(
    "interfere",
    [
        pytest.param(lambda sampler, loader: next(sampler.enumerate(loader)), id="enumerate"),
        pytest.param(lambda sampler, loader: iter(sampler), id="plain"),
        pytest.param(lambda sampler, loader: sampler.set_epoch(0), id="set_epoch"),
        pytest.param(lambda sampler, loader: sampler.set_state_dict(sampler.state_dict()), id="set_state_dict"),
    ],
)
@pytest.mark.parametrize("taken", [1, N])
def test_overtaken_pass_is_refused(interfere: Callable[[Any, Any], Any], taken: int) -> None:
    sampler = make()
    loader = loader_of(sampler)
    passing = sampler.enumerate(loader)
    for _ in range(taken):
        next(passing)
    kept = interfere(sampler, loader)
    state = sampler.state_dict()
    with pytest.raises(RuntimeError, match="one pass at a time"):
        next(passing)
    assert sampler.state_dict() == state
    del kept


@pytest.mark.parametrize(
    ("deliver", "message"),
    [
        pytest.param(lambda sampler: list(sampler)[:-1], "ended after 3 of the epoch's 4", id="fewer"),
        pytest.param(lambda sampler: [*sampler, [1]], "more than the epoch's 4", id="more"),
        pytest.param(lambda sampler: [[1]] * N, "did not begin a pass", id="own"),
        pytest.param(lambda sampler: (batch for _ in range(1) for batch in sampler), "did not begin a pass", id="late"),
    ],
)
def test_loader_that_keeps_another_count_is_refused(deliver: Callable[[Any], Any], message: str) -> None:
    sampler = make()
    with pytest.raises(RuntimeError, match=message):
        list(sampler.enumerate(Fake(sampler, deliver)))


def test_epoch_that_failed_to_begin_is_not_lost() -> None:
    def fail(sampler: Any) -> Any:
        raise OSError("no workers")

    sampler = make("reshuffle")
    sampler.set_state_dict({**sampler.state_dict(), "epoch": 2, "position": 1})
    with pytest.raises(OSError, match="no workers"):
        next(sampler.enumerate(Fake(sampler, fail)))
    # The plan of the pass that failed must not be left for this one.
    assert list(sampler) == [samples for _, samples in expected(sampler, 2, 1)]
    assert seen(sampler.enumerate(loader_of(sampler))) == expected(sampler, 3)


def loader_over(sampler: FixedBatchSampler, length: int) -> paddle.io.DataLoader:
    """Samples that the sampler does not know of would never be seen."""
    return paddle.io.DataLoader(list(range(length)), batch_sampler=sampler)


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(lambda sampler: loader_of(make()), id="other_sampler"),
        pytest.param(lambda sampler: paddle.io.DataLoader(Numbers(), batch_size=SIZE), id="paddles"),
        pytest.param(lambda sampler: paddle.io.DataLoader(Numbers(), batch_size=None), id="without"),
        pytest.param(lambda sampler: loader_over(sampler, LENGTH + 1), id="longer_dataset"),
        pytest.param(lambda sampler: loader_over(sampler, LENGTH - 1), id="shorter_dataset"),
        pytest.param(lambda sampler: Fake(sampler, list, places=2), id="two_places"),
    ],
)
def test_refused_loader(loader: Callable[[Any], Any]) -> None:
    """When it is passed, not when the pass begins."""
    sampler = make()
    with pytest.raises(ValueError, match=r"loader: received .*expected"):
        sampler.enumerate(loader(sampler))
    assert seen(sampler.enumerate(loader_of(sampler))) == expected(sampler, 0)


def test_refused_length_is_told() -> None:
    sampler = make()
    with pytest.raises(
        ValueError, match=r"over a dataset of 200 samples, expected the 11 samples that the sampler was"
    ):
        sampler.enumerate(loader_over(sampler, 200))


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        pytest.param(
            lambda sampler: paddle.io.TensorDataset([paddle.ones([LENGTH, 1])]), "TensorDataset", id="dataset"
        ),
        pytest.param(lambda sampler: [[1]], "list", id="list"),
        pytest.param(lambda sampler: sampler, "FixedBatchSampler", id="sampler"),
        pytest.param(lambda sampler: None, "NoneType", id="none"),
    ],
)
def test_refused_type_of_loader(loader: Callable[[Any], Any], name: str) -> None:
    sampler = make()
    with pytest.raises(TypeError, match=f"loader: received a {name}, expected a paddle.io.DataLoader"):
        sampler.enumerate(loader(sampler))


class Lengthless(paddle.io.Dataset):
    """Paddle's loaders never ask for a length where there is a batch sampler."""

    def __getitem__(self, index: int) -> Any:
        return Numbers()[index]


def test_loader_over_a_dataset_without_length() -> None:
    sampler = make()
    assert seen(sampler.enumerate(Loader(Lengthless(), batch_sampler=sampler))) == expected(sampler, 0)
