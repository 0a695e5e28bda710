# SPDX-License-Identifier: Apache-2.0
"""Averages where fleet divides the parameters among ranks: each rank keeps those of its part, and all see the whole.

One job of two processes over gloo, which all tests read. Of one network both ranks have a part, unequal ones; of the
other the second rank has nothing. What fleet divides by elements asks for a GPU, and runs here by stand-ins
(over_gloo.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import over_gloo
import paddle
import pytest
from paddle.distributed import fleet
from ranks import caught, needs_fleet, run_on_ranks
from test_sharding import Single, network, train, values

from paddle_asgd import ASGD, AveragedModel, AveragedSGD, PostHocEMA, ema, sharded_checkpoint, swa

pytestmark = needs_fleet

STEPS = 6
#: The stand-ins are for the Paddle that has these.
SLICES = sharded_checkpoint.ShardedWeight is not None


class WithFrozen(paddle.nn.Layer):
    """A network with a frozen parameter, a buffer, and a parameter that no optimizer updates."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.frozen = self.create_parameter([3], default_initializer=paddle.nn.initializer.Constant(0.75))
        self.frozen.stop_gradient = True
        self.spare = self.create_parameter([2], default_initializer=paddle.nn.initializer.Constant(0.5))
        self.register_buffer("scale", paddle.ones([2]))

    def forward(self, x: Any) -> Any:
        return self.net(x) * self.scale.mean() * self.frozen.mean()

    def trained(self) -> list[Any]:
        return self.net.parameters()


def alone(layers: Any, optimizer: Any) -> tuple[Any, Any]:
    return layers, optimizer


def on_ranks(layers: Any, optimizer: Any) -> tuple[Any, Any]:
    return fleet.distributed_model(layers), fleet.distributed_optimizer(optimizer)


def by_elements(layers: Any, optimizer: Any) -> tuple[Any, Any]:
    """The wrapper of the optimizer first: it gives the parameters another memory."""
    optimizer = fleet.distributed_optimizer(optimizer)
    return fleet.distributed_model(layers), optimizer


def rows() -> slice:
    """The samples of this rank of every batch of eight."""
    ranks, rank = paddle.distributed.get_world_size(), paddle.distributed.get_rank()
    return slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)


def steps_of(layers: Any) -> Any:
    """A function that trains for one step."""

    def step(model: Any, optimizer: Any, number: int) -> None:
        if isinstance(layers, Single):
            model().backward()
            optimizer.step()
            optimizer.clear_grad()
        else:
            train(model, optimizer, rows(), range(number, number + 1))

    return step


def averaged_model(layers: Any, wrap: Any, folder: Path, method: Any = ASGD) -> dict[str, Any]:
    """What an AveragedModel says of a training and of its continuation from a checkpoint."""
    trained, step, found = (
        layers.trained() if isinstance(layers, WithFrozen) else layers.parameters(),
        steps_of(layers),
        {},
    )
    inner = ASGD(0.1, 3, trained) if method is ASGD else method(0.05, parameters=trained)
    averaged = AveragedModel(layers, swa(), optimizer=inner, update_after=2)
    model, optimizer = wrap(layers, inner)
    for number in range(STEPS):
        step(model, optimizer, number)
        averaged.update()
    found["elsewhere"] = [elsewhere(averaged)]
    found["bytes"] = sum(4 * int(tensor.size) for tensor in averaged._tensors.kept_here.values())
    found["updates"], found["is_divided"] = averaged.num_updates, averaged.is_divided
    before = values(layers)
    with averaged.averaged_parameters():
        found["within"] = values(layers)
        found["state_within"] = plain(averaged.state_dict()["averages"])
        found["refused"] = caught(lambda: step(model, optimizer, 0))
    found["elsewhere"].append(elsewhere(averaged))
    found["restored"] = values(layers) == before
    layers.clear_gradients()
    state = averaged.state_dict()
    found["state"], found["weights"] = plain(state["averages"]), plain(averaged.averaged_state_dict())
    found["elsewhere"].append(elsewhere(averaged))
    step(model, optimizer, STEPS)
    averaged.update()
    found["next"] = plain(averaged.averaged_state_dict())
    averaged.set_state_dict(state)
    averaged.update()  # no step has been taken since the last
    found["loaded"] = plain(averaged.averaged_state_dict())
    found["missing"] = caught(lambda: averaged.set_state_dict({**state, "averages": {}}))
    other = WithFrozen() if isinstance(layers, WithFrozen) else type(layers)()
    averaged.copy_to(other)
    found["copied"] = plain(other.state_dict())
    return found


def elsewhere(averaged: AveragedModel) -> list[str]:
    """The names of the averages of which this rank has nothing now."""
    return [entry.name for entry in averaged._tensors.held if entry.held is None]


def plain(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def post_hoc(wrap: Any, folder: Path) -> dict[str, Any]:
    layers = network()
    inner = ASGD(0.1, 3, layers.parameters())
    averages = PostHocEMA(layers, folder=folder / "post_hoc", every=2, dtype="float64", optimizer=inner)
    model, optimizer = wrap(layers, inner)
    for number in range(STEPS):
        train(model, optimizer, rows(), range(number, number + 1))
        averages.update()
    if averages.averages[0].is_divided:
        paddle.distributed.barrier()  # rank 0 has written the last snapshot
    return {"snapshots": averages.snapshots, "wide": plain(averages.reconstruct(0.07))}


def averaged_sgd(layers: Any, wrap: Any) -> dict[str, Any]:
    step, found = steps_of(layers), {}
    inner = AveragedSGD(0.1, t0=2, parameters=layers.parameters())
    model, optimizer = wrap(layers, inner)
    step(model, optimizer, 0)
    found["early"] = [inner.has_averages, caught(lambda: inner.averaged_parameters().__enter__())]
    for number in range(1, STEPS):
        step(model, optimizer, number)
    found["has_averages"] = inner.has_averages
    before = values(layers)
    with inner.averaged_parameters():
        found["within"] = values(layers)
        found["refused"] = caught(lambda: step(model, optimizer, 0))
    found["restored"] = values(layers) == before

    def leave_by_error() -> None:
        with inner.averaged_parameters():
            raise KeyError("within")

    found["error"] = caught(leave_by_error)
    found["restored_again"] = values(layers) == before
    layers.clear_gradients()
    step(model, optimizer, STEPS)
    inner.start_averaging()
    for number in range(3):
        step(model, optimizer, number)
    with optimizer.averaged_parameters():
        found["begun_anew"] = values(layers)
    return found


def everything(wrap: Any, folder: Path) -> dict[str, Any]:
    return {
        "asgd": averaged_model(WithFrozen(), wrap, folder),
        "momentum": averaged_model(WithFrozen(), wrap, folder, paddle.optimizer.Momentum),
        "single": averaged_model(Single(), wrap, folder),
        "averaged_sgd": averaged_sgd(network(), wrap),
        "averaged_sgd_single": averaged_sgd(Single(), wrap),
        "post_hoc": post_hoc(wrap, folder),
    }


def masters(wrap: Any) -> dict[str, Any]:
    """Averages of float16 parameters whose master weights only one rank has."""
    layers = paddle.nn.Layer()
    for name in ("a", "b", "c"):
        layers.add_parameter(name, layers.create_parameter([3], dtype="float16"))
        getattr(layers, name).set_value(paddle.to_tensor([1.0, -1.0, 0.5], "float16"))
    inner = ASGD(0.0011, 3, layers.parameters(), multi_precision=True)
    averaged = AveragedModel(layers, ema(0.9), optimizer=inner)
    wrap(layers, inner)
    for number in range(STEPS):
        # Only this rank's part, without fleet: its sum of float16 gradients over gloo is NaN.
        for param in inner._parameter_list:
            (param.astype("float32") * (0.1 + number)).sum().backward()
        inner.step()
        inner.clear_grad()
        averaged.update()
    with averaged.averaged_parameters():
        within = [param.astype("float32").tolist() for param in layers.parameters()]
    return {"averages": plain(averaged.state_dict()["averages"]), "within": within}


def job(found: dict[str, Any], folder: Path) -> None:
    over_gloo.shard(2)
    found.update(everything(on_ranks, folder), masters=masters(on_ranks))
    # Not given to fleet, so every rank has all of it.
    found["undivided"] = averaged_model(WithFrozen(), alone, folder)["is_divided"]
    if not SLICES:
        return
    over_gloo.allow_slices()
    over_gloo.shard(2, by_elements=True)
    found["slices"] = {
        "asgd": averaged_model(WithFrozen(), by_elements, folder),
        "averaged_sgd": averaged_sgd(network(), by_elements),
        "averaged_sgd_single": averaged_sgd(Single(), by_elements),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks("test_averaged_ranks.job", tmp_path_factory.mktemp("averaged"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds, on the whole batches."""
    return everything(alone, tmp_path_factory.mktemp("alone"))


def close(part: Any, whole: Any) -> None:
    """Two values, lists of values or dicts of them, to 1e-6 of the largest of each."""
    pairs = zip(part, whole) if isinstance(whole, list) else [(part[name], whole[name]) for name in whole]
    assert len(part) == len(whole)
    for received, expected in pairs:
        np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


MODELS = ["asgd", "momentum", "single"]
SEEN = ["within", "state_within", "state", "weights", "next", "loaded", "copied"]


@pytest.mark.parametrize("name", MODELS)
def test_averaged_model_is_that_of_one_process(ranks: list[dict[str, Any]], one: dict[str, Any], name: str) -> None:
    """Swapped in, saved before and after, loaded again and copied: the same bits on both ranks."""
    for what in SEEN:
        assert ranks[0][name][what] == ranks[1][name][what], what
        close(ranks[0][name][what], one[name][what])
    for found in (*(rank[name] for rank in ranks), one[name]):
        assert found["updates"] == STEPS - 2
        assert found["state_within"] == found["state"] == found["loaded"] != found["next"]
        assert found["restored"] is True
        assert found["refused"].startswith("RuntimeError: step: received a call while the average is in the model")
        # On a rank that keeps none of them, too: otherwise the ranks would part here.
        assert found["missing"].startswith("ValueError: set_state_dict: the average of ")


def test_each_rank_keeps_the_averages_of_its_part(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """20 and 11 of 31 trained elements; of what no rank updates (7 elements), all of it."""
    for name in MODELS[:2]:
        assert [found[name]["bytes"] for found in ranks] == [4 * (20 + 7), 4 * (11 + 7)]
        assert one[name]["bytes"] == 4 * (31 + 7)
    assert [found["single"]["bytes"] for found in ranks] == [12, 0]
    # Nothing is left of what was fetched for a swap or for a file.
    assert [found["single"]["elsewhere"] for found in ranks] == [[[]] * 3, [["x"]] * 3]
    assert ranks[0]["asgd"]["elsewhere"] == [["net.0.bias", "net.2.weight", "net.2.bias"]] * 3
    assert ranks[1]["asgd"]["elsewhere"] == [["net.0.weight"]] * 3
    assert [found["asgd"]["is_divided"] for found in ranks] == [True, True]
    assert [found["undivided"] for found in ranks] == [False, False]
    assert one["asgd"]["is_divided"] is False


def test_master_weights_of_another_rank(ranks: list[dict[str, Any]]) -> None:
    """The average follows them where they are, to the bits of one process."""
    expected = masters(alone)
    assert all(found["masters"] == expected for found in ranks)
    rounded = np.float16(expected["averages"]["a"])
    assert np.abs(rounded - expected["averages"]["a"]).max() > 1e-5  # more than 16 bits can hold


def test_snapshots_hold_all_parts(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert ranks[0]["post_hoc"] == ranks[1]["post_hoc"]
    assert ranks[0]["post_hoc"]["snapshots"] == [list(snapshot) for snapshot in one["post_hoc"]["snapshots"]]
    close(ranks[0]["post_hoc"]["wide"], one["post_hoc"]["wide"])


@pytest.mark.parametrize("name", ["averaged_sgd", "averaged_sgd_single"])
def test_averaged_sgd_is_that_of_one_process(ranks: list[dict[str, Any]], one: dict[str, Any], name: str) -> None:
    """All parts are in the model within the context, on every rank, and nobody waits when it ends."""
    assert ranks[0][name] == ranks[1][name]
    found = ranks[0][name]
    for what in ("within", "begun_anew"):
        close(found[what], one[name][what])
    assert found["early"][0] is False
    assert found["early"][1].startswith("RuntimeError: averaged_parameters: received a call before averaging had begun")
    assert found["has_averages"] is found["restored"] is found["restored_again"] is True
    assert found["refused"].startswith("RuntimeError: step: received a call within averaged_parameters()")
    assert found["error"] == "KeyError: 'within'"


@pytest.mark.skipif(not SLICES, reason="the stand-ins do not fit this Paddle's split_param")
@pytest.mark.parametrize("name", ["asgd", "averaged_sgd", "averaged_sgd_single"])
def test_averages_of_slices_are_those_of_one_process(
    ranks: list[dict[str, Any]], one: dict[str, Any], name: str
) -> None:
    """Each rank steps on a part of every parameter. AveragedModel keeps all averages on every rank."""
    first, second = (found["slices"][name] for found in ranks)
    assert first == second
    for what in SEEN if name == "asgd" else ("within", "begun_anew"):
        close(first[what], one[name][what])
    assert first["restored"] is True
    if name == "asgd":
        assert first["bytes"] == one[name]["bytes"]


def test_parts_by_elements_keep_the_whole_average() -> None:
    """The optimizer then has other tensors under the names of the parameters, and so have its master weights."""
    layers = network()
    optimizer = ASGD(0.1, 3, layers.parameters())
    averaged = AveragedModel(layers, ema(0.5), optimizer=optimizer)
    part = paddle.create_parameter([10], "float32")
    part.name = layers.parameters()[0].name
    optimizer._parameter_list = [part]
    optimizer._master_weights = {part.name: part}

    averaged._tensors.divide(None)
    train(layers, paddle.optimizer.SGD(0.1, layers.parameters()), slice(None), range(1))
    averaged._tensors.update(1.0)
    assert plain(averaged._tensors.averages(False)) == plain(layers.state_dict())
    assert averaged.is_divided is False
