# SPDX-License-Identifier: Apache-2.0
"""Ranks of paddle.DataParallel do together what one process does: steps, the search for a learning rate, averages.

One job of two processes over gloo, and one of four, which all tests read.
"""

from __future__ import annotations

import contextlib
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

from paddle_asgd import (
    ASGD,
    AveragedModel,
    AveragedSGD,
    BatchIndexCallback,
    FixedBatchSampler,
    LipschitzSearch,
    WeightAveraging,
    ema,
    swa,
)

pytestmark = needs_fleet

SAMPLES = 21


def dataset() -> Any:
    draw = np.random.default_rng(6)
    return paddle.io.TensorDataset([paddle.to_tensor(draw.normal(size=[SAMPLES, k]).astype("float32")) for k in (4, 1)])


def sampler_of(ranks: int, rank: int, order: str = "reshuffle", **options: Any) -> FixedBatchSampler:
    """Batches of 8, 8 and 5 samples, the last of which cannot be divided evenly."""
    options = {"seed": 1, "num_replicas": ranks, "rank": rank, **options}
    return FixedBatchSampler(dataset(), 8 // ranks, order, **options)


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


#: dtype, order, and whether a part is halved: one gradient without a sum over the ranks, and one with it.
CASES = {
    "replacement": ("float32", "replacement", False),
    "replacement_float64": ("float64", "replacement", False),
    "no_sync": ("float32", "reshuffle", True),
    "no_sync_float64": ("float64", "reshuffle", True),
}


def train(
    case: str, ranks: int, rank: int, wrap: Any, optimizer_of: Any = ASGD, notes: Any = None, divide: Any = None
) -> tuple[Any, Any]:
    """Four passes; returns the model and the optimizer.

    Args:
        divide: what wraps the optimizer; None: nothing.
        notes: made of the model and the optimizer; what it returns is called after each step.
    """
    dtype, order, in_two = CASES[case]
    layers, sampler = network().to(dtype=dtype), sampler_of(ranks, rank, order)
    model = wrap(layers)
    options = {"batch_num": sampler.batch_num, "batch_weights": sampler.batch_weights} if optimizer_of is ASGD else {}
    optimizer = optimizer_of(0.05, parameters=layers.parameters(), weight_decay=0.1, **options)
    note = (lambda: None) if notes is None else notes(layers, optimizer)
    optimizer = optimizer if divide is None else divide(optimizer)
    loader = paddle.io.DataLoader(dataset(), batch_sampler=sampler)
    for _ in range(4):
        for index, (x, y) in sampler.enumerate(loader):
            x, y, half = x.astype(dtype), y.astype(dtype), len(x) // 2 if in_two else 0
            with model.no_sync() if half and model is not layers else contextlib.nullcontext():
                if half:
                    sampler.part_loss(index, mse_loss(model(x[:half]), y[:half]) * (half / len(x))).backward()
            rest = mse_loss(model(x[half:]), y[half:]) * ((len(x) - half) / len(x))
            sampler.part_loss(index, rest).backward()
            if optimizer_of is ASGD:
                optimizer.set_batch_index(index)
            optimizer.step()
            optimizer.clear_grad()
            note()
    return layers, optimizer


def result(layers: Any, optimizer: Any) -> dict[str, Any]:
    return {"params": [param.tolist() for param in layers.parameters()], "norm": optimizer.gradient_norm()}


def cases(ranks: int, rank: int, wrap: Any) -> dict[str, Any]:
    return {case: result(*train(case, ranks, rank, wrap)) for case in CASES}


def under_fleet(rank: int, degrees: dict[str, int]) -> dict[str, Any]:
    """The first case where fleet has been told of the ranks."""
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 1, **degrees}
    fleet.init(is_collective=True, strategy=strategy)
    wraps = fleet.distributed_model, ASGD, None, fleet.distributed_optimizer
    return result(*train("replacement", 2, rank, *wraps))


def averages(ranks: int, rank: int, wrap: Any) -> list[Any]:
    """The averages of an AveragedModel and of AveragedSGD, swapped in."""
    made = []

    def notes(layers: Any, optimizer: Any) -> Any:
        made.append(AveragedModel(layers, swa(), optimizer=optimizer))
        return made[0].update

    layers, _ = train("replacement", ranks, rank, wrap, notes=notes)
    with made[0].averaged_parameters():
        found = [param.tolist() for param in layers.parameters()]
    layers, optimizer = train(
        "replacement", ranks, rank, wrap, lambda *args, **options: AveragedSGD(*args, t0=2, **options)
    )
    with optimizer.averaged_parameters():
        return found + [param.tolist() for param in layers.parameters()]


def fit_with(sampler: FixedBatchSampler, **options: Any) -> tuple[Any, WeightAveraging]:
    """A model that ``Model.fit`` has trained, which wraps it itself where there are ranks."""
    layers = network()
    model, averaging = paddle.Model(layers), WeightAveraging(ema(0.5))
    model.prepare(ASGD(0.05, sampler.batch_num, layers.parameters(), theta=0.3), paddle.nn.MSELoss())
    loader = paddle.io.DataLoader(dataset(), batch_sampler=sampler)
    model.fit(loader, verbose=0, callbacks=[BatchIndexCallback(sampler), averaging], **options)
    return model, averaging


def fit(ranks: int, rank: int, folder: Path) -> dict[str, Any]:
    """The average that ``Model.fit`` leaves, and its score."""
    model, averaging = fit_with(sampler_of(ranks, rank, drop_last=True), epochs=3, save_dir=str(folder / "saved"))
    whole = paddle.io.DataLoader(dataset(), batch_size=SAMPLES)
    averaged = averaging.averaged_model
    return {
        "averages": [value.tolist() for value in averaged.averaged_state_dict().values()],
        "loss": model.evaluate(whole, verbose=0, callbacks=[averaging])["loss"],
        "updates": averaged.num_updates,
    }


def unlike(rank: int) -> dict[str, str]:
    """What is said of samplers of which that of rank 1 differs."""
    found = {}
    at_epoch_3, resumed = sampler_of(2, rank), sampler_of(2, rank)
    if rank == 1:
        at_epoch_3.set_epoch(3)
        resumed.set_state_dict({**resumed.state_dict(), "position": 1})
    for name, sampler in {
        "seed": sampler_of(2, rank, seed=1 + rank),
        "order": sampler_of(2, rank, ["replacement", "sequential"][rank]),
        "rank": sampler_of(2, 0),
        "epoch": at_epoch_3,
        "position": resumed,
        "the same": sampler_of(2, rank),
    }.items():
        loader = paddle.io.DataLoader(dataset(), batch_sampler=sampler)
        found[name] = caught(lambda sampler=sampler, loader=loader: list(sampler.enumerate(loader)))
    sampler = sampler_of(2, rank, seed=1 + rank, drop_last=True)
    found["fit"] = caught(lambda: fit_with(sampler, epochs=1))
    # On one rank alone, as an evaluation may be: nobody waits.
    if rank == 0:
        sampler = sampler_of(1, 0)
        found["alone"] = len(list(sampler.enumerate(paddle.io.DataLoader(dataset(), batch_sampler=sampler))))
    return found


def job_of_four(found: dict[str, Any], folder: Path) -> None:
    paddle.distributed.init_parallel_env()
    found.update(cases(4, paddle.distributed.get_rank(), paddle.DataParallel))


def job(found: dict[str, Any], folder: Path) -> None:
    paddle.distributed.init_parallel_env()
    rank = paddle.distributed.get_rank()
    found["cases"] = cases(2, rank, paddle.DataParallel)
    found["averages"] = averages(2, rank, paddle.DataParallel)
    found["fit"] = fit(2, rank, folder)
    found["unlike"] = unlike(rank)
    layers, _, found["rates"] = search_of(2, rank, paddle.DataParallel)
    np.savez(folder / f"{rank}.npz", *[p.numpy() for p in layers.parameters()])
    for weighs in (True, False):
        params, said = plain(2, rank, paddle.DataParallel, weighs)
        found[f"weighs_{weighs}"] = ([param.tolist() for param in params], said)
    fleet.init(is_collective=True)
    _, _, found["rates_under_fleet"] = search_of(2, rank, fleet.distributed_model)
    found["fleet"] = [under_fleet(rank, degrees) for degrees in ({"dp_degree": 2}, {"sharding_degree": 2})]
    fleet.init(is_collective=True)
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


# ---- Steps and averages ----------------------------------------------------------------------------------------------


def close(part: Any, whole: Any, tolerance: float = 1e-6) -> None:
    assert len(part) == len(whole)
    for received, expected in zip(part, whole):
        np.testing.assert_allclose(received, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks("test_data_parallel.job_of_four", tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return cases(1, 0, lambda layers: layers)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_one_process(
    ranks: list[dict[str, Any]], four: list[dict[str, Any]], one: dict[str, Any], case: str
) -> None:
    """With batches that come twice in a pass or not at all, and with gradients that are summed in two parts."""
    tolerance = 1e-14 if CASES[case][0] == "float64" else 1e-6
    for found in ([rank["cases"][case] for rank in ranks], [rank[case] for rank in four]):
        assert all(rank == found[0] for rank in found)
        close(found[0]["params"], one[case]["params"], tolerance)
        assert found[0]["norm"] == pytest.approx(one[case]["norm"], rel=1e-6)


def test_steps_under_fleet_are_those_of_data_parallel(ranks: list[dict[str, Any]]) -> None:
    """With unequal parts and a batch index, to the bit. The norm is a sum of parts under sharding."""
    for found in ranks:
        for received in found["fleet"]:
            assert received["params"] == ranks[0]["cases"]["replacement"]["params"]
            assert received["norm"] == pytest.approx(ranks[0]["cases"]["replacement"]["norm"], rel=1e-14)


def test_averages_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["averages"] == ranks[1]["averages"]
    close(ranks[0]["averages"], averages(1, 0, lambda layers: layers))


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # of hapi's own copy of the labels
def test_fit_averages_as_in_one_process(ranks: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    """And rank 0 alone has saved the average."""
    assert ranks[0]["fit"] == ranks[1]["fit"]
    alone = fit(1, 0, tmp_path)
    close(ranks[0]["fit"]["averages"], alone["averages"])
    np.testing.assert_allclose(ranks[0]["fit"]["loss"], alone["loss"], rtol=1e-6)
    assert ranks[0]["fit"]["updates"] == alone["updates"] == 6
    saved = paddle.load(f"{folder}/saved/final_average.pdparams")
    assert [value.tolist() for value in saved.values()] == ranks[0]["fit"]["averages"]


@pytest.mark.parametrize("name", ["seed", "order", "epoch", "position"])
def test_ranks_with_other_batches_are_told(ranks: list[dict[str, Any]], name: str) -> None:
    """All of them, so that none waits for another."""
    for rank, found in enumerate(ranks):
        said = found["unlike"][name]
        assert said.startswith(f"ValueError: {name}: received ")
        assert f" on rank {rank} and another value on another rank" in said
        assert found["unlike"]["the same"] == ""
        assert found["unlike"]["fit"].startswith("ValueError: seed: received ")
    assert ranks[0]["unlike"]["alone"] == 3


def test_ranks_with_one_number_are_told(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["unlike"]["rank"].startswith("ValueError: rank: received [0, 0] of the 2 processes")
