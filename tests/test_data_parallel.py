# SPDX-License-Identifier: Apache-2.0
"""Two ranks of paddle.DataParallel do together what one process does: the search for a learning rate, unequal parts.

One job of two processes over gloo, which all tests read.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.distributed import fleet
from paddle.nn.functional import mse_loss
from ranks import caught, needs_fleet, run_on_ranks
from test_sharding import network

from paddle_asgd import ASGD, FixedBatchSampler, LipschitzSearch

pytestmark = needs_fleet

SAMPLES = 21


def dataset() -> Any:
    draw = np.random.default_rng(6)
    return paddle.io.TensorDataset([paddle.to_tensor(draw.normal(size=[SAMPLES, k]).astype("float32")) for k in (4, 1)])


def sampler_of(ranks: int, rank: int) -> FixedBatchSampler:
    """Batches of 8, 8 and 5 samples, the last of which cannot be divided evenly."""
    return FixedBatchSampler(dataset(), 8 // ranks, "reshuffle", seed=1, num_replicas=ranks, rank=rank)


def search_of(ranks: int, rank: int, wrap: Any) -> tuple[Any, LipschitzSearch, list[float]]:
    """Train by the search; returns the model, the search, and the learning rate of every step."""
    layers, data, sampler = network(), dataset(), sampler_of(ranks, rank)
    model = wrap(layers)
    optimizer = ASGD(0.1, sampler.batch_num, layers.parameters(), batch_weights=sampler.batch_weights, theta=0.3)
    search, rates = LipschitzSearch(optimizer, 1e-3), []
    loader = paddle.io.DataLoader(data, batch_sampler=sampler)
    for _ in range(4):
        for optimizer.batch_index, (x, y) in sampler.enumerate(loader):
            search.step(lambda x=x, y=y, i=optimizer.batch_index: sampler.part_loss(i, mse_loss(model(x), y)))
            rates.append(optimizer.get_lr())
    return layers, search, rates


def plain(ranks: int, rank: int, wrap: Any, weighs: bool) -> tuple[list[np.ndarray], list[str]]:
    """Train without a search; returns the parameters and what was warned of."""
    layers, sampler = network(), sampler_of(ranks, rank)
    model = wrap(layers)
    optimizer = ASGD(0.05, sampler.batch_num, layers.parameters(), batch_weights=sampler.batch_weights, theta=0.3)
    loader = paddle.io.DataLoader(dataset(), batch_sampler=sampler)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            for index, (x, y) in sampler.enumerate(loader):
                optimizer.batch_index = index
                loss = mse_loss(model(x), y)
                (sampler.part_loss(index, loss) if weighs else loss).backward()
                optimizer.step()
                optimizer.clear_grad()
    texts = [str(warning.message) for warning in said if "FixedBatchSampler" in str(warning.message)]
    return [param.numpy() for param in layers.parameters()], texts


def job(found: dict[str, Any], folder: Path) -> None:
    paddle.distributed.init_parallel_env()
    rank = paddle.distributed.get_rank()
    layers, _, found["rates"] = search_of(2, rank, paddle.DataParallel)
    np.savez(folder / f"{rank}.npz", *[p.numpy() for p in layers.parameters()])
    for weighs in (True, False):
        params, said = plain(2, rank, paddle.DataParallel, weighs)
        found[f"weighs_{weighs}"] = ([param.tolist() for param in params], said)
    fleet.init(is_collective=True)
    _, _, found["rates_under_fleet"] = search_of(2, rank, fleet.distributed_model)
    found["not_wrapped"] = caught(lambda: search_of(2, rank, lambda layers: layers))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data_parallel")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks("test_data_parallel.job", folder)


def test_search_takes_the_same_branch_on_all_ranks(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert ranks[0]["rates"] == ranks[1]["rates"]
    assert all(found["rates_under_fleet"] == found["rates"] for found in ranks)
    parts = [np.load(folder / f"{rank}.npz") for rank in range(2)]
    assert all(np.array_equal(parts[0][name], parts[1][name]) for name in parts[0])
    layers, _, rates = search_of(1, 0, lambda layers: layers)
    np.testing.assert_allclose(ranks[0]["rates"], rates, rtol=1e-5)
    for name, param in zip(parts[0], layers.parameters()):
        np.testing.assert_allclose(parts[0][name], param.numpy(), rtol=0, atol=1e-5 * np.abs(param.numpy()).max())


def test_search_refuses_gradients_that_are_not_averaged(ranks: list[dict[str, Any]]) -> None:
    """The model is not wrapped, so each rank would train by itself."""
    for found in ranks:
        assert found["not_wrapped"].startswith("ValueError: gradient: received ")
        assert "paddle.DataParallel" in found["not_wrapped"]


def largest_deviation(found: dict[str, Any], weighs: bool) -> float:
    alone, _ = plain(1, 0, lambda layers: layers, weighs)
    parts = [np.array(part, "float32") for part in found[f"weighs_{weighs}"][0]]
    return max(np.abs(part - one).max() / np.abs(one).max() for part, one in zip(parts, alone))


def test_unequal_parts_are_weighed(ranks: list[dict[str, Any]]) -> None:
    assert all(found["weighs_True"] == ranks[0]["weighs_True"] for found in ranks)
    assert ranks[0]["weighs_True"][1] == []
    assert largest_deviation(ranks[0], True) < 1e-6


def test_unequal_parts_that_nobody_weighs(ranks: list[dict[str, Any]]) -> None:
    """It is wrong, and said once, on every rank."""
    assert largest_deviation(ranks[0], False) > 1e-3
    for found in ranks:
        (text,) = found["weighs_False"][1]
        assert text.startswith("FixedBatchSampler: the 5 samples of batch 2 are divided unequally among 2 ranks")
