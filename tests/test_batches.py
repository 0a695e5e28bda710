# SPDX-License-Identifier: Apache-2.0
"""What FixedBatchSampler makes of its arguments: batches, orders, weights, parts for ranks, refusals."""

from __future__ import annotations

import doctest
from collections import Counter
from typing import Any

import numpy as np
import paddle
import pytest

from paddle_asgd.sag import batches as batches_module
from paddle_asgd.sag import sampler as sampler_module
from paddle_asgd.sag.sampler import FixedBatchSampler

#: samples, batch_size, drop_last -> sizes of the batches
COMPOSITIONS = [
    pytest.param(10, 4, False, [4, 4, 2], id="short_last"),
    pytest.param(10, 4, True, [4, 4], id="drop_last"),
    pytest.param(12, 4, False, [4, 4, 4], id="even"),
    pytest.param(12, 4, True, [4, 4, 4], id="even_drop_last"),
    pytest.param(3, 4, False, [3], id="one_short_batch"),
    pytest.param(5, 1, False, [1] * 5, id="single_samples"),
]


def chi_square(counts: list[int], cells: int) -> float:
    """Against equal frequencies."""
    expected = sum(counts) / cells
    return sum((count - expected) ** 2 for count in counts) / expected + (cells - len(counts)) * expected


@pytest.mark.parametrize(("length", "size", "drop_last", "sizes"), COMPOSITIONS)
@pytest.mark.parametrize("shuffle_once", [False, True], ids=["in_order", "shuffled"])
def test_every_sample_is_in_one_batch(
    length: int, size: int, drop_last: bool, sizes: list[int], shuffle_once: bool
) -> None:
    sampler = FixedBatchSampler(range(length), size, shuffle_once=shuffle_once, drop_last=drop_last, seed=2)
    assert [len(batch) for batch in sampler.batches] == sampler.batch_sizes == sizes
    assert sampler.batch_num == len(sampler) == len(sizes)
    samples = [sample for batch in sampler.batches for sample in batch]
    assert len(set(samples)) == len(samples) == sum(sizes)
    assert set(samples) <= set(range(length))
    assert all(type(sample) is int for sample in samples)
    assert shuffle_once or samples == list(range(sum(sizes)))


def test_draws_stay_the_same_in_every_version() -> None:
    """A run that is resumed with another NumPy must meet the same batches."""
    sampler = FixedBatchSampler(range(10), 3, seed=1)
    assert sampler.batches == [[4, 1, 6], [7, 0, 5], [9, 2, 3], [8]]
    assert [sampler.epoch_order(epoch) for epoch in (0, 7)] == [[1, 3, 2, 1], [2, 3, 0, 3]]
    reshuffled = FixedBatchSampler(range(10), 3, order="reshuffle", seed=1)
    assert [reshuffled.epoch_order(epoch) for epoch in (0, 7)] == [[0, 3, 2, 1], [3, 1, 0, 2]]


@pytest.mark.parametrize("order", batches_module.ORDERS)
def test_composition_does_not_depend_on_the_order(order: str) -> None:
    sampler = FixedBatchSampler(range(11), 3, order=order, seed=4)
    assert sampler.batches == FixedBatchSampler(range(11), 3, seed=4).batches


def test_shuffling_deals_every_sample_anywhere() -> None:
    places = Counter(
        next(b for b, batch in enumerate(FixedBatchSampler(range(9), 3, seed=seed).batches) if 4 in batch)
        for seed in range(300)
    )
    assert chi_square(list(places.values()), 3) < 13.8  # 2 degrees of freedom, one case in 1,000


def test_sequential_order() -> None:
    sampler = FixedBatchSampler(range(11), 3, order="sequential", seed=4)
    assert [sampler.epoch_order(epoch) for epoch in (0, 1, 5)] == [[0, 1, 2, 3]] * 3


def test_reshuffled_orders_are_all_permutations_alike() -> None:
    sampler = FixedBatchSampler(range(9), 3, order="reshuffle", seed=4)
    orders = Counter(tuple(sampler.epoch_order(epoch)) for epoch in range(600))
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert chi_square(list(orders.values()), 6) < 20.5  # 5 degrees of freedom


def test_replacement_draws_batches_alike_and_independently() -> None:
    sampler = FixedBatchSampler(range(20), 3, seed=4)
    orders = [sampler.epoch_order(epoch) for epoch in range(400)]
    assert all(len(order) == 7 and all(type(b) is int for b in order) for order in orders)
    singles = Counter(b for order in orders for b in order)
    assert chi_square(list(singles.values()), 7) < 22.5  # 6 degrees of freedom
    pairs = Counter(pair for order in orders for pair in zip(order, order[1:]))
    assert chi_square(list(pairs.values()), 49) < 84.0  # 48 degrees of freedom
    # 7! / 7^7 of them, 0.6 %
    assert sum(len(set(order)) == 7 for order in orders) < 10


@pytest.mark.parametrize("order", ["replacement", "reshuffle"])
def test_seed_and_epoch_decide_alone(order: str) -> None:
    def made(seed: int) -> FixedBatchSampler:
        return FixedBatchSampler(range(90), 3, order=order, seed=seed)

    late = made(3).epoch_order(9)
    np.random.seed(0)
    paddle.seed(0)
    again = made(3)
    list(again)
    assert again.epoch_order(9) == late
    orders = [tuple(made(seed).epoch_order(epoch)) for seed in (0, 1, 2**70) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 9
    assert made(0).batches != made(1).batches


def test_drawn_seed_is_numpys() -> None:
    def drawn() -> int:
        return FixedBatchSampler(range(9), 3).seed

    np.random.seed(8)
    paddle.seed(8)
    first, second = drawn(), drawn()
    paddle.seed(8)
    third = drawn()
    assert len({first, second, third}) == 3
    np.random.seed(8)
    assert drawn() == first
    np.random.seed(8)
    before = np.random.get_state()[1].tolist(), np.random.get_state()[2]
    FixedBatchSampler(range(9), 3, order="sequential", shuffle_once=False)
    FixedBatchSampler(range(9), 3, seed=1)
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before


@pytest.mark.parametrize(("length", "size", "drop_last", "sizes"), COMPOSITIONS)
def test_batch_weights(length: int, size: int, drop_last: bool, sizes: list[int]) -> None:
    sampler = FixedBatchSampler(range(length), size, drop_last=drop_last, seed=2)
    n = len(sizes)
    assert sampler.batch_weights == [n * s / sum(sizes) for s in sizes]
    means = [np.mean(np.square(batch)) for batch in sampler.batches]
    kept = [sample for batch in sampler.batches for sample in batch]
    np.testing.assert_allclose(np.mean(np.multiply(sampler.batch_weights, means)), np.mean(np.square(kept)), rtol=1e-14)
    if drop_last:
        assert sampler.batch_weights == [1.0] * n
    assert sampler.part_weights == [1.0] * n


#: samples, batch_size per rank, ranks, drop_last -> sizes of the parts of the last batch, rank by rank
PARTS = [
    pytest.param(24, 4, 2, False, [4, 4], id="even"),
    pytest.param(21, 4, 2, False, [2, 3], id="uneven"),
    pytest.param(29, 4, 3, False, [1, 2, 2], id="uneven_3"),
    pytest.param(27, 4, 3, False, [1, 1, 1], id="one_each"),
    pytest.param(25, 4, 3, True, [4, 4, 4], id="drop_last"),
]


@pytest.mark.parametrize(("length", "size", "ranks", "drop_last", "last"), PARTS)
def test_ranks_share_every_batch(length: int, size: int, ranks: int, drop_last: bool, last: list[int]) -> None:
    of_rank = [
        FixedBatchSampler(range(length), size, drop_last=drop_last, seed=6, num_replicas=ranks, rank=rank)
        for rank in range(ranks)
    ]
    whole = FixedBatchSampler(range(length), size * ranks, drop_last=drop_last, seed=6)
    for b, batch in enumerate(whole.batches):
        assert [sample for sampler in of_rank for sample in sampler.batches[b]] == batch
    assert [len(sampler.batches[-1]) for sampler in of_rank] == last
    for sampler in of_rank:
        assert (sampler.batch_size, sampler.batch_num) == (size, whole.batch_num)
        assert (sampler.batch_sizes, sampler.batch_weights) == (whole.batch_sizes, whole.batch_weights)
        assert [sampler.epoch_order(epoch) for epoch in range(3)] == [whole.epoch_order(epoch) for epoch in range(3)]
        assert list(sampler) == [sampler.batches[b] for b in whole.epoch_order(0)]


@pytest.mark.parametrize(("length", "size", "ranks", "drop_last", "last"), PARTS)
def test_part_weights_make_up_the_mean_of_a_batch(
    length: int, size: int, ranks: int, drop_last: bool, last: list[int]
) -> None:
    of_rank = [
        FixedBatchSampler(range(length), size, drop_last=drop_last, seed=6, num_replicas=ranks, rank=rank)
        for rank in range(ranks)
    ]
    whole = FixedBatchSampler(range(length), size * ranks, drop_last=drop_last, seed=6)
    for b, batch in enumerate(whole.batches):
        of_ranks = [s.part_weights[b] * np.mean(np.square(s.batches[b])) for s in of_rank]
        np.testing.assert_allclose(np.mean(of_ranks), np.mean(np.square(batch)), rtol=1e-14)
    assert [sampler.part_weights[-1] for sampler in of_rank] == [ranks * part / sum(last) for part in last]
    assert all(sampler.part_weights[:-1] == [1.0] * (whole.batch_num - 1) for sampler in of_rank)


def test_ranks_are_asked_of_paddle(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = FixedBatchSampler(range(24), 3, seed=6)
    assert (alone.num_replicas, alone.rank) == (1, 0)
    monkeypatch.setattr(batches_module, "get_world_size", lambda: 3)
    monkeypatch.setattr(batches_module, "get_rank", lambda: 2)
    among = FixedBatchSampler(range(24), 3, seed=6)
    assert (among.num_replicas, among.rank) == (3, 2)
    assert (FixedBatchSampler(range(24), 3, seed=6, num_replicas=4).rank) == 2
    told = FixedBatchSampler(range(24), 3, seed=6, num_replicas=1, rank=0)
    assert (told.num_replicas, told.rank) == (1, 0)


def test_several_ranks_need_no_seed_where_nothing_is_drawn() -> None:
    sampler = FixedBatchSampler(range(8), 2, order="sequential", shuffle_once=False, num_replicas=2, rank=1)
    assert sampler.batches == [[2, 3], [6, 7]]


class Unsized(paddle.io.Dataset):
    def __getitem__(self, index: int) -> int:
        return index


class Stream(paddle.io.IterableDataset):
    def __len__(self) -> int:
        return 4


def loader_over(dataset: Any, **options: Any) -> paddle.io.DataLoader:
    return paddle.io.DataLoader(dataset, **options)


class Loader(paddle.io.DataLoader):
    """Of a user's own."""


REFUSED: list[Any] = [
    pytest.param(
        {"dataset": loader_over(list(range(20)), batch_size=3)},
        TypeError,
        r"dataset: received a DataLoader, whose length is its number of batches \(7\), expected the dataset itself, "
        r"such as loader\.dataset",
        id="loader",
    ),
    pytest.param({"dataset": Loader([1, 2], batch_size=1)}, TypeError, r"received a Loader, .*\(2\)", id="own_loader"),
    pytest.param(
        {"dataset": loader_over(Stream(), batch_size=3)},
        TypeError,
        r"dataset: received a DataLoader, expected the dataset itself",
        id="iterable_loader",
    ),
    pytest.param(
        {"dataset": paddle.io.BatchSampler(list(range(20)), batch_size=3)},
        TypeError,
        r"dataset: received a BatchSampler, whose .*\(7\)",
        id="batch_sampler",
    ),
    pytest.param(
        {"dataset": FixedBatchSampler(range(20), 3)},
        TypeError,
        r"dataset: received a FixedBatchSampler, whose .*\(7\)",
        id="fixed_batch_sampler",
    ),
    pytest.param({"dataset": Stream()}, TypeError, r"dataset: received .*Stream.*with a length", id="iterable"),
    pytest.param({"dataset": iter([1])}, TypeError, r"dataset: received .*iterator", id="iterator"),
    pytest.param({"dataset": Unsized()}, TypeError, r"dataset: received .*Unsized", id="no_length"),
    pytest.param({"dataset": None}, TypeError, r"dataset: received None", id="none"),
    pytest.param({"dataset": []}, ValueError, r"dataset: .*at least one sample", id="empty"),
    pytest.param({"batch_size": True}, TypeError, r"batch_size: received True of type bool", id="bool"),
    pytest.param({"batch_size": 2.0}, TypeError, r"batch_size: received 2.0 of type float", id="float"),
    pytest.param({"batch_size": paddle.to_tensor(2)}, TypeError, r"batch_size: received a tensor", id="tensor"),
    pytest.param({"batch_size": "2"}, TypeError, r"batch_size: received '2'", id="string"),
    pytest.param({"batch_size": 0}, ValueError, r"batch_size: received 0, .*at least 1", id="zero"),
    pytest.param({"batch_size": -2}, ValueError, r"batch_size: received -2, .*at least 1", id="negative"),
    pytest.param(
        {"batch_size": 11, "drop_last": True}, ValueError, r"batch_size: received 11.*smaller batch_size", id="no_batch"
    ),
    pytest.param({"order": "shuffle"}, ValueError, r"order: received 'shuffle', .*'replacement', ", id="order"),
    pytest.param({"order": 1}, TypeError, r"order: received 1 of type int, .*'sequential'", id="order_type"),
    pytest.param({"shuffle_once": 1}, TypeError, r"shuffle_once: received 1 ", id="shuffle_once"),
    pytest.param({"drop_last": None}, TypeError, r"drop_last: received None", id="drop_last"),
    pytest.param({"seed": 1.0}, TypeError, r"seed: received 1.0 of type float", id="seed_float"),
    pytest.param({"seed": False}, TypeError, r"seed: received False of type bool", id="seed_bool"),
    pytest.param({"seed": -1}, ValueError, r"seed: received -1, .*at least 0", id="seed_negative"),
    pytest.param({"num_replicas": 0}, ValueError, r"num_replicas: received 0", id="no_ranks"),
    pytest.param({"num_replicas": 2.0}, TypeError, r"num_replicas: received 2.0", id="ranks_float"),
    pytest.param({"num_replicas": 2, "rank": 2}, ValueError, r"rank: received 2, .*less than .* 2", id="rank_high"),
    pytest.param({"num_replicas": 2, "rank": -1}, ValueError, r"rank: received -1", id="rank_negative"),
    pytest.param({"rank": 1}, ValueError, r"rank: received 1, .*num_replicas, which is 1", id="rank_alone"),
    pytest.param({"num_replicas": 2, "rank": 0, "seed": None}, ValueError, r"seed: received None.*same on", id="seeds"),
    pytest.param(
        {"num_replicas": 2, "rank": 0, "seed": None, "order": "sequential"}, ValueError, r"seed: ", id="seeds_dealing"
    ),
    pytest.param(
        {"num_replicas": 2, "rank": 0, "seed": None, "shuffle_once": False}, ValueError, r"seed: ", id="seeds_order"
    ),
    pytest.param(
        {"num_replicas": 3, "rank": 0, "batch_size": 1}, ValueError, r"num_replicas: .* 1 of .*drop_last=True", id="few"
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refused_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FixedBatchSampler(**{"dataset": range(10), "batch_size": 3, "seed": 1, **changes})


def test_numpy_ints_are_ints() -> None:
    sampler = FixedBatchSampler(np.zeros((10, 2)), np.int32(3), seed=np.int64(1), num_replicas=np.int8(1), rank=0)
    assert [type(value) for value in (sampler.batch_size, sampler.seed, sampler.num_replicas)] == [int] * 3
    assert sampler.batch_sizes == [3, 3, 3, 1]


def test_example() -> None:
    tests = doctest.DocTestFinder(recurse=False).find(sampler_module.FixedBatchSampler, "FixedBatchSampler")
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert [(result.failed, result.attempted > 0) for result in results] == [(0, True)]


def test_description() -> None:
    sampler = FixedBatchSampler(range(10), 2, "reshuffle", False, seed=1, num_replicas=2, rank=1)
    assert repr(sampler) == (
        "FixedBatchSampler(10 samples, batch_num=3, batch_size=2, order='reshuffle', shuffle_once=False, "
        "drop_last=False, seed=1, num_replicas=2, rank=1)"
    )
