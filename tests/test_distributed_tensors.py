# SPDX-License-Identifier: Apache-2.0
"""Models whose parameters ``shard_tensor`` has put on a mesh (semi-automatic parallelism): replicated, or in parts.

One job of two processes over gloo, which all tests read. Must not test tensors that are on no mesh.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Callable

import numpy as np
import over_gloo
import paddle
import pytest
from paddle import distributed
from paddle.distributed import Replicate, Shard
from ranks import caught, run_on_ranks

from paddle_asgd import ASGD, AveragedSGD, LipschitzSearch, sharded_checkpoint
from paddle_asgd.fused import FusedOptimizer
from paddle_asgd.sag import checks
from paddle_asgd.state import StateTensor

pytestmark = pytest.mark.skipif(
    not hasattr(paddle.base.core, "dtensor_from_local"), reason="a Paddle without tensors on a mesh"
)

N, STEPS, STOP = 3, 11, 5
DRAWN = [2, 0, 0, 1, 2, 2, 1, 0, 2, 2, 1]
PLACES = ("replicated", "parts")


def network(place: str) -> Any:
    """The same for every call: alone, whole on each rank, or the first layer by columns and the second by rows.

    It is so small that the watch samples all of it.
    """
    draw = np.random.default_rng(3)
    with paddle.utils.unique_name.guard():
        layers = paddle.nn.Sequential(paddle.nn.Linear(4, 4), paddle.nn.Tanh(), paddle.nn.Linear(4, 1))
    for param in layers.parameters():
        param.set_value((0.3 * draw.normal(size=param.shape)).astype("float32"))
    if place == "alone":
        return layers
    mesh = distributed.ProcessMesh([0, 1], dim_names=["x"])
    first = {layers[0]: ([Shard(1)], [Shard(0)]), layers[2]: ([Shard(0)], [Replicate()])}

    def divide(name: str, layer: Any, mesh: Any) -> None:
        if layer in first and place == "parts":
            layer.weight, layer.bias = (
                distributed.shard_tensor(tensor, mesh, placements)
                for tensor, placements in zip((layer.weight, layer.bias), first[layer])
            )

    return distributed.shard_layer(layers, mesh, divide)


class Run:
    def __init__(self, place: str, make: Callable[[list], Any]) -> None:
        self.place, self.layers = place, network(place)
        self.optimizer = make(self.layers.parameters())

    def train(self, first: int, last: int, drawn: bool = False) -> None:
        draw = np.random.default_rng(4)
        data = [draw.normal(size=[8, 5]).astype("float32") for _ in range(N)]
        for step in range(first, last):
            index = DRAWN[step] if drawn else step % N
            batch = paddle.to_tensor(data[index])
            if self.place != "alone":
                placement = Shard(0) if self.place == "replicated" else Replicate()
                batch = distributed.shard_tensor(batch, distributed.ProcessMesh([0, 1], dim_names=["x"]), [placement])
            paddle.nn.functional.mse_loss(self.layers(batch[:, :4]), batch[:, 4:]).backward()
            if drawn:
                self.optimizer.set_batch_index(0)
                self.optimizer.set_batch_index(index)
            self.optimizer.step()
            self.optimizer.clear_grad()

    def values(self) -> list[list[float]]:
        return [whole(param).flatten().tolist() for param in self.layers.parameters()]


def whole(tensor: Any) -> Any:
    return distributed.unshard_dtensor(tensor) if tensor.is_dist() else tensor


def asgd(**options: Any) -> Callable[[list], ASGD]:
    return lambda params: ASGD(0.1, N, params, **options)


#: How optimizers are made; batches are drawn where there is an odd number of options.
OPTIMIZERS: dict[str, Callable[[list], Any]] = {
    "plain": asgd(),
    "drawn": asgd(weight_decay=0.1, theta=0.3, batch_weights=[4.0, 4.0, 3.0]),
    "clipped": asgd(weight_decay=0.1, grad_clip=paddle.nn.ClipGradByGlobalNorm(0.3)),
    "clipped_each": asgd(weight_decay=paddle.regularizer.L2Decay(0.1), grad_clip=paddle.nn.ClipGradByNorm(0.3)),
    "clipped_values": asgd(grad_clip=paddle.nn.ClipGradByValue(0.1)),
    "averaged": lambda params: AveragedSGD(0.1, t0=3, parameters=params),
}


def trained(place: str, name: str, last: int = STEPS) -> Run:
    run = Run(place, OPTIMIZERS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two indices between two steps are set on purpose
        run.train(0, last, name == "drawn")
    return run


def job(found: dict[str, Any], folder: Path) -> None:
    distributed.init_parallel_env()
    over_gloo.allow_loading()
    found["refused_mesh"] = refused_mesh()
    for place in PLACES:
        for name in OPTIMIZERS:
            run = trained(place, name)
            found[f"{place}_{name}"] = run.values()
            if name == "averaged":
                with run.optimizer.averaged_parameters():
                    found[f"{place}_averages"] = run.values()
                found[f"{place}_restored"] = run.values() == found[f"{place}_averaged"]
                continue
            found[f"{place}_{name}_norm"] = run.optimizer.gradient_norm()
            found[f"{place}_{name}_ratio"] = run.optimizer.variance_ratio
            found[f"{place}_{name}_state"] = {
                key: [whole(value).tolist(), local_part(value)] for key, value in run.optimizer.state_dict().items()
            }
        for name in ("plain", "drawn"):
            checkpoints(found, folder, place, name)
    found["room"] = room()
    found["dense"] = dense_gradient()
    found["blocks"] = blocks()
    found["cleared"] = cleared()
    found["by_hand"] = [by_hand("float16", multi_precision=True), by_hand("float32", history_dtype="int8")]


def local_part(tensor: Any) -> float:
    return tensor._local_value().numel().item() / tensor.numel().item() if tensor.is_dist() else 1.0


def checkpoints(found: dict[str, Any], folder: Path, place: str, name: str) -> None:
    key, drawn = f"{place}_{name}", name == "drawn"
    run = trained(place, name, STOP)
    weights, state = copies(run.layers.state_dict()), copies(run.optimizer.state_dict())
    distributed.save_state_dict({**run.layers.state_dict(), **run.optimizer.state_dict()}, str(folder / key))
    numbers = run.optimizer.numbers_state_dict()

    def from_files(new: Run) -> None:
        new.optimizer.set_numbers_state_dict(numbers)
        for part in (new.layers, new.optimizer):
            distributed.load_state_dict(renamed(part.state_dict(), state), str(folder / key))

    def from_memory(new: Run) -> None:
        new.layers.set_state_dict(copies(weights))
        new.optimizer.set_state_dict(state)

    def from_one_process(new: Run) -> None:
        new.layers.set_state_dict(copies(weights))
        new.optimizer.set_state_dict({k: whole(v) for k, v in state.items()})

    for load in (from_files, from_memory, from_one_process):
        new = Run(place, OPTIMIZERS[name])
        load(new)
        new.train(STOP, STEPS, drawn)
        found[f"{key}_{load.__name__}"] = new.values()


def copies(tensors: dict[str, Any]) -> dict[str, Any]:
    """Of which a layer may take the memory for its own, as Paddle 3.0's does on a mesh."""
    return {key: tensor.clone() for key, tensor in tensors.items()}


def renamed(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Under the names of the first optimizer, since a second one in the same process has others."""
    return own if own.keys() & {"0.weight"} else dict(zip(saved, own.values()))


def refused_mesh() -> str:
    mesh = distributed.ProcessMesh([0], dim_names=["x"])
    weight = distributed.shard_tensor(paddle.nn.Linear(2, 2).weight, mesh, [Replicate()])
    return caught(lambda: ASGD(0.1, N, [weight]))


def room() -> list[str]:
    """The history of a rank must fit, 156 bytes for 13 parameters, and not that of all 25."""
    free, said = checks.free_memory, []
    try:
        for size in (156, 155):
            checks.free_memory = lambda size=size: size
            said.append(caught(lambda: Run("parts", asgd())))
    finally:
        checks.free_memory = free
    return said


def dense_gradient() -> list[str]:
    run = Run("parts", asgd())
    param = run.layers[0].weight
    said = [caught(lambda: run.optimizer.apply_gradients([(param, paddle.zeros(param.shape))]))]
    said.append(caught(lambda: run.optimizer.sharded_state_dict({})))
    return [*said, caught(lambda: LipschitzSearch(run.optimizer))]


def cleared() -> list[int]:
    """The steps that each parameter has taken, some without a gradient, by every way to a step."""
    run = Run("replicated", asgd(grad_clip=paddle.nn.ClipGradByGlobalNorm(0.3)))
    first = run.layers[0](run.layers[0].weight).sum()
    run.train(0, 1)
    run.optimizer.clear_grad(False)
    run.optimizer.step()
    first.backward()
    run.optimizer.minimize(first)
    return [value.item() for key, value in run.optimizer.state_dict().items() if "_m_" in key]


def by_hand(dtype: str, **options: Any) -> bool:
    """Whether a replicated parameter has the bits of one process, with gradients that are made by hand.

    None is in parts, because Paddle cannot divide 16-bit tensors on the CPU, and narrow histories are refused there.
    """
    one = paddle.create_parameter([64, 65], dtype)
    mesh = distributed.ProcessMesh([0, 1], dim_names=["x"])
    other = distributed.shard_tensor(one.clone(), mesh, [Replicate()])
    other.stop_gradient = False
    optimizers = [ASGD(0.1, N, [param], **options) for param in (one, other)]
    for step in range(2 * N):
        if step == N:
            state = optimizers[1].state_dict()
            optimizers[1] = ASGD(0.1, N, [other], **options)
            optimizers[1].set_state_dict(state)
        one.grad = paddle.full([64, 65], 0.1 + step, dtype)
        other.grad = distributed.shard_tensor(one.grad, mesh, other.placements)
        for optimizer in optimizers:
            optimizer.step()
    kept = [list(optimizer.state_dict().get("master_weights", {}).values()) for optimizer in optimizers]
    kept = [[whole(tensor).tolist() for tensor in (*masters, param)] for masters, param in zip(kept, (one, other))]
    bytes_held = [optimizer.state_bytes() for optimizer in optimizers]
    return kept[0] == kept[1] and bytes_held[0] == bytes_held[1]


def blocks() -> list[str]:
    """State that has one number for 128 elements."""

    class Blocks(FusedOptimizer):
        def __init__(self, parameters: list) -> None:
            layout = (
                StateTensor("scale", "float32", lambda shape: [2, -(-int(np.prod(shape)) // 128)]),
                StateTensor("step", "int64", lambda shape: [1], counts_steps=True),
            )
            super().__init__(0.1, parameters, None, None, False, None, layout, {})

    numbers = {"float32_gradients": 0}
    return [caught(lambda p=p: Blocks(network(p).parameters()).set_numbers_state_dict(numbers)) for p in PLACES]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks("test_distributed_tensors.job", tmp_path_factory.mktemp("distributed_tensors"))


def assert_close(received: Any, expected: Any) -> None:
    """Relative to the largest number of all: the one element of the last bias passes near 0, and sums may cancel."""
    flat, wanted = (np.concatenate([np.ravel(values) for values in lists]) for lists in (received, expected))
    np.testing.assert_allclose(flat, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("place", PLACES)
def test_steps_are_those_of_one_process(ranks: list[dict[str, Any]], place: str, name: str) -> None:
    assert ranks[0][f"{place}_{name}"] == ranks[1][f"{place}_{name}"]
    assert_close(ranks[0][f"{place}_{name}"], trained("alone", name).values())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "averaged"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_asked_is_that_of_one_process(ranks: list[dict[str, Any]], place: str, name: str) -> None:
    """What several ranks have of the parameters counts once."""
    alone = trained("alone", name).optimizer
    norms, ratios = ([found[f"{place}_{name}_{what}"] for found in ranks] for what in ("norm", "ratio"))
    assert norms[0] == norms[1] == pytest.approx(alone.gradient_norm(), rel=1e-6)
    assert ratios[0] == ratios[1]
    if place == "replicated":
        assert ratios[0] == pytest.approx(alone.variance_ratio, rel=1e-5)


def test_the_watch_samples_what_is_in_parts(ranks: list[dict[str, Any]]) -> None:
    """All of it, since it is small; not the last bias, which each rank has whole and the other process in a group."""

    def make(params: list) -> ASGD:
        return ASGD(0.1, N, [{"params": params[:-1]}, {"params": params[-1:], "weight_decay": 1e-30}])

    alone = Run("alone", make)
    alone.train(0, STEPS)
    assert ranks[0]["parts_plain_ratio"] == pytest.approx(alone.optimizer.variance_ratio, rel=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_state_is_that_of_one_process(ranks: list[dict[str, Any]], place: str) -> None:
    """Each rank has its part of it alone, but for the bias of one element."""
    alone = trained("alone", "drawn").optimizer.state_dict()
    for found in ranks:
        state = found[f"{place}_drawn_state"]
        values = [(value, one.numpy()) for (value, _), one in zip(state.values(), alone.values())]
        assert_close(*zip(*[pair for pair in values if pair[1].dtype == "float32"]))
        assert all(value == one.tolist() for value, one in values if one.dtype == "int64")
        parts = [(part, np.size(value)) for key, (value, part) in state.items() if "_y_" in key]
        assert [part for part, _ in parts] == ([1.0] * 4 if place == "replicated" else [0.5, 0.5, 0.5, 1.0])
        share = sum(part * size for part, size in parts) / sum(size for _, size in parts)
        assert share == 1 if place == "replicated" else share <= 0.57


@pytest.mark.parametrize("load", ["from_files", "from_memory", "from_one_process"])
@pytest.mark.parametrize("name", ["plain", "drawn"])
@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_continues_bit_for_bit(ranks: list[dict[str, Any]], place: str, name: str, load: str) -> None:
    if load == "from_files" and sharded_checkpoint.ShardedWeight is None:
        pytest.skip("a Paddle whose load_state_dict loads into copies on a GPU, for which there is no stand-in")
    for found in ranks:
        assert found[f"{place}_{name}_{load}"] == found[f"{place}_{name}"]


@pytest.mark.parametrize("place", PLACES)
def test_averages_are_those_of_one_process(ranks: list[dict[str, Any]], place: str) -> None:
    alone = trained("alone", "averaged")
    with alone.optimizer.averaged_parameters():
        for found in ranks:
            assert_close(found[f"{place}_averages"], alone.values())
            assert found[f"{place}_restored"]


def test_few_bits_have_the_bits_of_one_process(ranks: list[dict[str, Any]]) -> None:
    """16-bit parameters with master weights, and a history of 8 bits."""
    assert [found["by_hand"] for found in ranks] == [[True, True]] * 2


def test_cleared_gradients_take_no_step(ranks: list[dict[str, Any]]) -> None:
    """On a mesh Paddle leaves a tensor without memory where there is None otherwise."""
    assert [found["cleared"] for found in ranks] == [[2, 2, 1, 1]] * 2


def test_what_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["refused_mesh"].startswith("ValueError: parameters[0], 'linear_")
        assert "on a mesh of 1 ranks, expected Shard and Replicate on one of all 2" in found["refused_mesh"]
        assert found["room"][0] == ""
        assert found["room"][1].startswith("ValueError: batch_num: received 3, which takes")
        assert "received a tensor on no mesh, expected one on its mesh" in found["dense"][0]
        without = "RuntimeError: sharded_state_dict: received a call under a Paddle without"
        on_a_mesh = "TypeError: sharded_state_dict: received a call where parameters are on a mesh"
        assert found["dense"][1].startswith(without if sharded_checkpoint.ShardedWeight is None else on_a_mesh)
        assert found["dense"][2].startswith("ValueError: optimizer: received one whose parameters shard_tensor has put")
        assert found["blocks"][0] == ""
        assert "because 'scale' has one number for every 128 elements" in found["blocks"][1]
