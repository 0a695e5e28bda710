# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints: what one process, or two ranks under fleet's sharding, have saved is loaded by each.

One job of two processes over gloo, which tests read, and what needs one process alone. Fleet's ``split_param`` asks for
a GPU and runs here by stand-ins (over_gloo.py).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Callable

import numpy as np
import over_gloo
import paddle
import pytest
from paddle.distributed import fleet, load_state_dict, save_state_dict
from paddle.optimizer.lr import ExponentialDecay
from problems import state_of, step_with
from ranks import caught, needs_fleet, run_on_ranks

from paddle_asgd import ASGD, AveragedSGD, sharded_checkpoint
from paddle_asgd.fused import FusedOptimizer
from paddle_asgd.state import StateTensor

pytestmark = pytest.mark.skipif(sharded_checkpoint.ShardedWeight is None, reason="a Paddle without ShardedWeight")

N, STEPS, STOP = 3, 11, 6
#: The batches of all steps where they are drawn; slot 1 is first seen by the resumed run.
DRAWN = [2, 0, 0, 2, 2, 0, 1, 2, 0, 1, 1]
KINDS = ("one", "whole", "slices")
CASES = ("plain", "weighted")


def theta(step: int) -> float:
    return 0.3 / (1 + step)


def options(case: str) -> dict[str, Any]:
    return {"batch_weights": [4.0, 4.0, 3.0], "theta": theta} if case == "weighted" else {}


def network() -> Any:
    """The same for every call. Slices by elements divide the first parameter in the middle of a row."""
    draw = np.random.default_rng(3)
    with paddle.utils.unique_name.guard():
        layers = paddle.nn.Sequential(paddle.nn.Linear(16, 30), paddle.nn.Tanh(), paddle.nn.Linear(30, 1))
    for param in layers.parameters():
        param.set_value((0.3 * draw.normal(size=param.shape)).astype("float32"))
    return layers


class Run:
    """A model and its optimizer, in one process or wrapped by fleet, which must have been told how to divide."""

    def __init__(self, case: str, alone: bool = False, layers: Any = None) -> None:
        self.case, self.alone = case, alone
        self.layers = network() if layers is None else layers
        self.scheduler = ExponentialDecay(0.1, 0.98)
        self.asgd = ASGD(self.scheduler, N, self.layers.parameters(), weight_decay=0.1, **options(case))
        self.model = self.layers if alone else fleet.distributed_model(self.layers)
        self.optimizer = self.asgd if alone else fleet.distributed_optimizer(self.asgd)

    def train(self, first: int, last: int) -> list[list[float]]:
        draw = np.random.default_rng(4)
        data = [draw.normal(size=[8, 17]).astype("float32") for _ in range(N)]
        rank = paddle.distributed.get_rank()
        rows = slice(None) if self.alone else slice(4 * rank, 4 * rank + 4)
        for step in range(first, last):
            index = DRAWN[step] if self.case == "weighted" else step % N
            batch = paddle.to_tensor(data[index][rows])
            paddle.nn.functional.mse_loss(self.model(batch[:, :16]), batch[:, 16:]).backward()
            if self.case == "weighted":
                self.optimizer.set_batch_index(index)
            self.optimizer.step()
            self.optimizer.clear_grad()
            self.scheduler.step()
        return [param.flatten().tolist() for param in self.layers.parameters()]

    def sharded(self) -> dict[str, Any]:
        model = self.layers.sharded_state_dict()
        return {**model, **self.asgd.sharded_state_dict(model)}

    def save(self, folder: Path) -> None:
        save_state_dict(self.sharded(), str(folder))
        if self.alone or paddle.distributed.get_rank() == 0:
            paddle.save(self.asgd.numbers_state_dict(), str(folder / "numbers.pd"))

    def load(self, folder: Path) -> None:
        self.asgd.set_numbers_state_dict(paddle.load(str(folder / "numbers.pd")))
        load_state_dict(self.sharded(), str(folder))


def job(found: dict[str, Any], folder: Path) -> None:
    parts: dict[str, dict[str, Any]] = {}
    over_gloo.allow_slices()
    over_gloo.allow_loading()
    for kind in ("whole", "slices"):
        over_gloo.shard(2, by_elements=kind == "slices")
        for case in CASES:
            run = Run(case)
            found[f"{kind}_{case}_begins"] = run.train(0, 2)
            run.train(2, STOP)
            run.save(folder / f"{kind}_{case}")
            parts[f"{kind}_{case}"] = {key: copied(value) for key, value in run.asgd.state_dict().items()}
            found[f"{kind}_{case}"] = run.train(STOP, STEPS)
            found[f"{kind}_{case}_norm"] = run.optimizer.gradient_norm()
        found[f"{kind}_memory"] = memory()
    for kind in ("slices", "whole"):
        over_gloo.shard(2, by_elements=kind == "slices")
        for case in CASES:
            for saved in KINDS:
                run = Run(case)
                run.load(folder / f"{saved}_{case}")
                found[f"{saved}_to_{kind}_{case}"] = run.train(STOP, STEPS)
        if kind == "slices":
            state_dicts(found, folder, parts["slices_weighted"])
    found["data_parallel"] = data_parallel()
    found["padding"] = padding()
    found["refused"] = refusals()
    found["narrow"] = narrow(folder)


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, paddle.Tensor) else value


def state_dicts(found: dict[str, Any], folder: Path, state: dict[str, Any]) -> None:
    """The state_dict of a rank's slices, loaded by the rank itself, before its first step, and by the others."""
    number = paddle.distributed.get_rank()
    paddle.save(state, f"{folder}/{number}.pdopt")
    paddle.distributed.barrier()
    saved = [paddle.load(f"{folder}/{rank}.pdopt") for rank in range(2)]
    run = Run("weighted")
    load_state_dict(run.layers.sharded_state_dict(), str(folder / "slices_weighted"))
    run.optimizer.set_state_dict(dict(saved[number]))
    found["slices_by_state_dict"] = run.train(STOP, STEPS)
    joined = {**saved[number], **saved[1 - number]}
    wrong = (
        (Run("weighted").asgd, saved[1 - number]),
        (Run("weighted").asgd, joined),
        (Run("weighted", True).asgd, state),
    )
    found["slices_of_others"] = [caught(lambda a=asgd, s=given: a.set_state_dict(s)) for asgd, given in wrong]


def data_parallel() -> list[list[float]]:
    run = Run("plain")
    run.layers, run.scheduler = network(), ExponentialDecay(0.1, 0.98)
    run.model = paddle.DataParallel(run.layers)
    run.optimizer = run.asgd = ASGD(run.scheduler, N, run.layers.parameters(), weight_decay=0.1)
    return run.train(0, STEPS)


def memory() -> dict[str, int]:
    """The numbers of d and y that this rank holds, of a model whose largest tensor has 97 % of a million parameters."""
    layers = paddle.nn.Sequential(paddle.nn.Linear(1000, 1001, bias_attr=False), paddle.nn.Linear(1001, 30))
    asgd = ASGD(0.1, N, layers.parameters())
    optimizer, model = fleet.distributed_optimizer(asgd), fleet.distributed_model(layers)
    model(paddle.ones([2, 1000])).mean().backward()
    optimizer.step()
    held = {name: tensor.numel().item() for name, tensor in asgd.state_dict().items()}
    sizes = [param.numel().item() for param in layers.parameters()]
    return {
        "d": sum(numel for name, numel in held.items() if "_d_" in name),
        "y": sum(numel for name, numel in held.items() if "_y_" in name),
        "parameters": sum(sizes),
        "largest": max(sizes),
    }


def narrow_layers() -> Any:
    """The first parameter is divided at the end of a block of scales; the second keeps exact gradients."""
    with paddle.utils.unique_name.guard():
        return paddle.nn.Sequential(paddle.nn.Linear(128, 128, bias_attr=False), paddle.nn.Linear(128, 1))


def narrow(folder: Path) -> list[str]:
    """Save a narrow history of slices, beside the slices themselves, and try slices that cannot be saved."""
    said = []
    for layers, size in ((narrow_layers(), 128), (paddle.nn.Linear(64, 65, bias_attr=False), 64)):
        asgd = ASGD(0.1, N, layers.parameters(), history_dtype="int8")
        optimizer, model = fleet.distributed_optimizer(asgd), fleet.distributed_model(layers)
        for _ in range(4):
            model(paddle.ones([2, size])).square().mean().backward()
            optimizer.step()
            optimizer.clear_grad()
        sharded: dict[str, Any] = {}
        said.append(caught(lambda a=asgd, m=layers, s=sharded: s.update(a.sharded_state_dict(m.sharded_state_dict()))))
        if not said[-1]:
            save_state_dict(sharded, str(folder / "narrow"))
            paddle.save(asgd.numbers_state_dict(), str(folder / "narrow" / f"{paddle.distributed.get_rank()}.pd"))
            state = asgd.state_dict()
            values = {key: v.numpy() for key, v in state.items() if isinstance(v, paddle.Tensor) and "copy" not in key}
            np.savez(folder / f"narrow{paddle.distributed.get_rank()}.npz", **values)
    return said


def padding() -> Any:
    """The parameter is so small that one rank has nothing of it but what fills the buffer up."""
    over_gloo.shard(2, by_elements=True)
    layers = paddle.nn.Linear(4, 5, bias_attr=False)
    asgd = ASGD(0.1, N, layers.parameters())
    optimizer, model = fleet.distributed_optimizer(asgd), fleet.distributed_model(layers)
    for _ in range(2):
        model(paddle.ones([2, 4])).mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    sharded = asgd.sharded_state_dict(layers.sharded_state_dict())
    return {key: list(weight.local_tensor.shape) for key, weight in sharded.items()}


def refusals() -> list[str]:
    class Blocks(FusedOptimizer):
        """Has a number for every 128 elements of each of its two slots."""

        def __init__(self, parameters: list) -> None:
            layout = (
                StateTensor("scale", "float32", lambda shape: [2, math.ceil(math.prod(shape) / 128)]),
                StateTensor("step", "int64", lambda shape: [1], counts_steps=True),
            )
            super().__init__(0.1, parameters, None, None, False, None, layout, {})

    said = []
    # The buffer is divided behind its element 448, which is in the midst of a block, and behind 512, which is not.
    for rows in (28, 32):
        over_gloo.shard(2, by_elements=True)
        layers = paddle.nn.Linear(rows, 32, bias_attr=False)
        blocks = Blocks(layers.parameters())
        wrapper = fleet.distributed_optimizer(blocks)
        found: dict[str, Any] = {}
        said.append(caught(lambda b=blocks, m=layers, f=found: f.update(b.sharded_state_dict(m.sharded_state_dict()))))
        said.append({k: [list(w.local_shape), list(w.global_shape), list(w.global_offset)] for k, w in found.items()})
        del wrapper  # which has held the memory of the slices
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the checkpoints of one process in it."""
    folder = tmp_path_factory.mktemp("sharded_checkpoint")
    for case in CASES:
        run = Run(case, alone=True)
        run.train(0, STOP)
        run.save(folder / f"one_{case}")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_on_ranks("test_sharded_checkpoint.job", folder)


@needs_fleet
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loads", KINDS)
@pytest.mark.parametrize("saved", KINDS)
def test_each_loads_what_each_has_saved(
    ranks: list[dict[str, Any]], folder: Path, saved: str, loads: str, case: str
) -> None:
    """The run goes on as if nothing had been in between: with the same bits on the same number of ranks, divided in the
    same way, and otherwise to 1e-6."""
    uninterrupted = Run(case, alone=True).train(0, STEPS)
    if loads == "one":
        run = Run(case, alone=True)
        run.load(folder / f"{saved}_{case}")
        resumed = run.train(STOP, STEPS)
    else:
        resumed = ranks[0][f"{saved}_to_{loads}_{case}"]
        assert ranks[1][f"{saved}_to_{loads}_{case}"] == resumed
    if saved == loads:
        assert resumed == (uninterrupted if saved == "one" else ranks[0][f"{saved}_{case}"])
    for one, part in zip(uninterrupted, resumed):
        np.testing.assert_allclose(part, one, rtol=0, atol=1e-6 * np.abs(one).max())


@needs_fleet
def test_divided_parameters_have_the_bits_of_data_parallelism(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["data_parallel"] == ranks[0]["whole_plain"] == ranks[1]["whole_plain"]


@needs_fleet
@pytest.mark.parametrize("case", CASES)
def test_slices_have_the_bits_of_whole_parameters(ranks: list[dict[str, Any]], case: str) -> None:
    """Until sums of the history are computed anew, which comes at another step for a tensor of another length."""
    assert ranks[0][f"slices_{case}_begins"] == ranks[0][f"whole_{case}_begins"] == ranks[1][f"slices_{case}_begins"]
    for slices, whole in zip(ranks[0][f"slices_{case}"], ranks[0][f"whole_{case}"]):
        np.testing.assert_allclose(slices, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@needs_fleet
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["whole", "slices"])
def test_gradient_norm_is_that_of_all_parts(ranks: list[dict[str, Any]], kind: str, case: str) -> None:
    alone = Run(case, alone=True)
    alone.train(0, STEPS)
    norms = [found[f"{kind}_{case}_norm"] for found in ranks]
    assert norms[0] == norms[1] == pytest.approx(alone.asgd.gradient_norm(), rel=1e-6)


@needs_fleet
def test_the_state_dict_of_slices_is_their_own_ranks(ranks: list[dict[str, Any]]) -> None:
    """The slices of two ranks have the same names, and here the first ones have the same shapes."""
    for rank, found in enumerate(ranks):
        assert found["slices_by_state_dict"] == found["slices_weighted"]
        of_another = f"ValueError: set_state_dict: it is of the slices of parameters that rank {1 - rank} had"
        for said in found["slices_of_others"][:2]:
            assert said.startswith(of_another)
        assert f"that rank {rank} had" in found["slices_of_others"][2]


@needs_fleet
def test_memory_of_a_rank(ranks: list[dict[str, Any]]) -> None:
    """Whole parameters are divided badly where one is large, elements evenly."""
    whole, slices = ([found[f"{kind}_memory"] for found in ranks] for kind in ("whole", "slices"))
    parameters = whole[0]["parameters"]
    assert parameters > 1e6
    assert whole[0]["largest"] > 0.97 * parameters
    assert sum(found["y"] for found in whole) == N * parameters
    assert sum(found["d"] for found in whole) == parameters
    assert max(found["y"] for found in whole) == N * whole[0]["largest"]
    assert max(found["d"] + found["y"] for found in slices) <= 1.02 / 2 * (N + 1) * parameters


@needs_fleet
def test_padding_is_not_saved(ranks: list[dict[str, Any]]) -> None:
    """A clock is all that a rank has to save of a parameter of which it has nothing."""
    names = ("weight.d_0", "weight.y_0_0", "weight.y_1_0", "weight.y_2_0")
    assert ranks[0]["padding"] == {**{name: [20] for name in names}, "weight.m_0": [1]}
    assert ranks[1]["padding"] == {"weight.m_0": [1]}


@needs_fleet
def test_blocks_are_divided_at_their_ends_or_not_at_all(ranks: list[dict[str, Any]]) -> None:
    """A number for a block of elements, as a history of few bits has one: half of it belongs to nobody."""
    for rank, found in enumerate(ranks):
        refused, nothing, accepted, whole = found["refused"]
        assert refused.startswith("ValueError: model_sharded_state_dict: received a part of a parameter")
        assert nothing == {}
        assert accepted == ""
        shard = [[4], [8], [4 * rank]]
        assert whole == {"weight.scale_0_0": shard, "weight.scale_1_0": shard, "weight.step_0": [[1], [1], [0]]}


@needs_fleet
def test_narrow_histories_of_slices(ranks: list[dict[str, Any]], folder: Path) -> None:
    """Numbers and scales of whole blocks. A slice of fewer than 4,096 elements is stored in another form."""
    for found in ranks:
        assert found["narrow"][0] == ""
        assert "is stored in another form than the whole parameter's would be" in found["narrow"][1]
    layers = narrow_layers()
    optimizer = ASGD(0.1, N, layers.parameters(), history_dtype="int8")
    optimizer.set_numbers_state_dict(paddle.load(str(folder / "narrow" / "0.pd")))
    load_state_dict(optimizer.sharded_state_dict(layers.sharded_state_dict()), str(folder / "narrow"))
    parts = [np.load(folder / f"narrow{rank}.npz") for rank in range(2)]
    held = state_of(optimizer, layers[0].weight, ("d", "y", "m", "y_scale"))
    for name, shape in (("y", [N, -1]), ("y_scale", [N, -1]), ("d", [-1])):
        slices = [part[k] for part in parts for k in part.files if re.fullmatch(rf"linear_0\.w_0_{name}_\d+", k)]
        whole = np.concatenate(slices, -1)
        assert held[name].dtype == whole.dtype
        assert np.array_equal(held[name].reshape(shape), whole)
    assert held["y"].dtype == np.int8
    assert held["m"].tolist() == [4]
    with pytest.raises(ValueError, match=r"set_state_dict: int8_histories is 1, expected 0; create the optimizer with"):
        ASGD(0.1, N, layers.parameters()).set_numbers_state_dict(optimizer.numbers_state_dict())


# ---- In one process --------------------------------------------------------------------------------------------------


def saved_and_loaded(make: Callable[[], tuple[Any, Any]], folder: Path, between: Callable[..., Any]) -> tuple[Any, Any]:
    """Two optimizers of ``make``, the second of which has loaded what the first has saved after ``between``."""
    (layers, first), (others, second) = make(), make()
    between(first)
    model = layers.sharded_state_dict()
    save_state_dict({**model, **first.sharded_state_dict(model)}, str(folder))
    second.set_numbers_state_dict(first.numbers_state_dict())
    model = others.sharded_state_dict()
    load_state_dict({**model, **second.sharded_state_dict(model)}, str(folder))
    return first, second


def values_of(optimizer: Any) -> list[Any]:
    """Of all entries, in their order: optimizers of one process have different names for the same state."""
    state = optimizer.state_dict()
    masters = state.pop("master_weights", {})
    return [value.astype("float64").tolist() for value in (*state.values(), *masters.values())]


def layers_of(dtype: str, shapes: list[list[int]]) -> Any:
    layers = paddle.nn.Layer()
    for number, shape in enumerate(shapes):
        layers.add_parameter(f"p{number}", layers.create_parameter(shape, dtype=dtype))
    return layers


SHAPES = [[2, 3], [], [0, 2], [1]]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("drawn", [False, True])
def test_one_process_loads_all_state(dtype: str, drawn: bool, tmp_path: Path) -> None:
    """Also of parameters without dimensions or elements, and of one that has never had a gradient."""

    def make() -> tuple[Any, Any]:
        layers = layers_of(dtype, SHAPES)
        return layers, ASGD(0.1, N, layers.parameters(), multi_precision=True, name="mine")

    def train(optimizer: ASGD) -> None:
        for step in range(4):
            if drawn:
                optimizer.batch_index = (2 * step) % N
            for number, param in enumerate(optimizer._parameter_list[:3]):
                param.grad = paddle.full_like(param, 1.0 + step - 2 * number).detach()
            optimizer.step()

    first, second = saved_and_loaded(make, tmp_path, train)
    assert values_of(first) == values_of(second)
    assert len(values_of(first)) == 4 * 3 + 1 + 4 * ("16" in dtype)
    train(first)
    train(second)
    assert values_of(first) == values_of(second)


def test_an_edited_group_decides_what_is_made() -> None:
    """State that is made before the first step to be filled has the form that the first step expects."""
    layers = paddle.nn.Linear(64, 64)
    optimizer = ASGD(0.1, N, [{"params": layers.parameters()}])
    optimizer.param_groups[0]["history_dtype"] = "int8"
    sharded = optimizer.sharded_state_dict(layers.sharded_state_dict())
    assert sharded["weight.y_1_0"].local_tensor.dtype == paddle.int8
    step_with(optimizer, 1.0, 1.0)
    assert state_of(optimizer, layers.weight)["y"].dtype == np.int8


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("compatible", [False, True])
def test_averages_are_loaded(starts: bool, compatible: bool, tmp_path: Path) -> None:
    """They and their beginning are state that not every run has."""

    def make() -> tuple[Any, Any]:
        layers = layers_of("float32", [[2, 3], [4]])
        return layers, AveragedSGD(0.1, t0=3, parameters=layers.parameters(), torch_compatible=compatible)

    def train(optimizer: AveragedSGD) -> None:
        for step in range(4):
            step_with(optimizer, 1.0 + step, -2.0)
            if starts and step == 1:
                optimizer.start_averaging()

    first, second = saved_and_loaded(make, tmp_path, train)
    for _ in range(2):
        assert values_of(first) == values_of(second)
        train(first)
        train(second)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("compatible", [False, True])
def test_averages_of_what_takes_no_step(starts: bool, compatible: bool, tmp_path: Path) -> None:
    """State that a checkpoint needs is made of it, and a swap leaves it as it is."""

    def make() -> tuple[Any, Any]:
        layers = layers_of("float32", [[2], [2]])
        layers.p1.set_value(paddle.full([2], 0.75))
        return layers, AveragedSGD(
            0.1, t0=1e6 if starts else 0, parameters=layers.parameters(), torch_compatible=compatible
        )

    def train(optimizer: AveragedSGD) -> None:
        for step in range(4):
            step_with(optimizer, 1.0 + step)
            if starts and step == 1:
                optimizer.start_averaging()

    for optimizer in saved_and_loaded(make, tmp_path, train):
        spare = optimizer._parameter_list[1]
        with optimizer.averaged_parameters():
            assert spare.tolist() == [0.75, 0.75]
        train(optimizer)
        step_with(optimizer, 1.0, 1.0)
        assert spare.tolist() != [0.75, 0.75]


@pytest.mark.parametrize("starts", [False, True])
def test_a_checkpoint_from_before_the_averages(starts: bool, tmp_path: Path) -> None:
    """It takes them from the optimizer that has them."""
    layers = layers_of("float32", [[2]])
    optimizer = AveragedSGD(0.1, t0=1e6 if starts else 3, parameters=layers.parameters())
    step_with(optimizer, 1.0)
    model = layers.sharded_state_dict()
    save_state_dict({**model, **optimizer.sharded_state_dict(model)}, str(tmp_path))
    numbers, before = optimizer.numbers_state_dict(), values_of(optimizer)
    for step in range(8):
        step_with(optimizer, 1.0)
        if starts and step == 1:
            optimizer.start_averaging()
    assert optimizer.has_averages
    optimizer.set_numbers_state_dict(numbers)
    load_state_dict({**model, **optimizer.sharded_state_dict(model)}, str(tmp_path))
    assert values_of(optimizer) == before
    for _ in range(4):
        assert not optimizer.has_averages
        step_with(optimizer, 1.0)
    assert optimizer.has_averages != starts


@pytest.mark.parametrize("starts", [False, True])
def test_numbers_of_a_rank_whose_part_is_frozen(starts: bool) -> None:
    """They are those of the other ranks: fleet gives the largest parameter to rank 0, which writes them."""

    def numbers(frozen: bool) -> dict[str, Any]:
        layers = layers_of("float32", [[2]])
        layers.p0.stop_gradient = frozen
        optimizer = AveragedSGD(0.1, t0=1e6 if starts else 1, parameters=layers.parameters())
        for step in range(4):
            step_with(optimizer, *[1.0] * (not frozen))
            if starts and step == 1:
                optimizer.start_averaging()
        return {name: value.tolist() for name, value in optimizer.numbers_state_dict().items()}

    assert numbers(True) == numbers(False)
    assert [numbers(True)[f"has_{name}"] for name in ("ax", "t0")] == [[1], [int(starts)]]


def test_gradient_norm_of_state_before_the_first_step() -> None:
    layers = layers_of("float32", [[2], [2]])
    optimizer = ASGD(0.1, N, layers.parameters(), weight_decay=0.1)
    optimizer.sharded_state_dict(layers.sharded_state_dict())
    assert optimizer.gradient_norm() == math.inf
    step_with(optimizer, 3.0)
    assert 0 < optimizer.gradient_norm() < math.inf


def test_gradients_of_more_bits_than_the_parameters(tmp_path: Path) -> None:
    """Mixed precision may keep float32 gradients beside 16-bit parameters, which the next run does before it steps."""

    def make() -> tuple[Any, Any]:
        layers = layers_of("float16", [[2]])
        return layers, ASGD(0.1, N, layers.parameters(), multi_precision=True)

    def train(optimizer: ASGD) -> None:
        (param,) = optimizer._parameter_list
        param.main_grad = paddle.to_tensor([1.0, 1e-9])
        optimizer.step()

    first, second = saved_and_loaded(make, tmp_path, train)
    assert values_of(first) == values_of(second)
    assert values_of(second)[1][0] == [1.0, np.float32(1e-9)]


def test_memory_is_the_optimizers_own() -> None:
    """So that loading writes where the next step reads, whatever Paddle's flags say of views."""
    layers = layers_of("float32", [[2, 3]])
    optimizer = ASGD(0.1, N, layers.parameters())
    step_with(optimizer, 1.0)
    try:
        paddle.set_flags({"FLAGS_use_stride_kernel": False})
        sharded = optimizer.sharded_state_dict(layers.sharded_state_dict())
    finally:
        paddle.set_flags({"FLAGS_use_stride_kernel": True})
    for weight in sharded.values():
        weight.local_tensor.fill_(7)
    assert all(set(np.ravel(value)) == {7} for value in values_of(optimizer)[:-1])


def test_a_parameter_that_is_not_trained_has_no_entry() -> None:
    layers = layers_of("float32", [[2], [3]])
    layers.p0.stop_gradient = True
    sharded = ASGD(0.1, 1, layers.parameters()).sharded_state_dict(layers.sharded_state_dict())
    assert list(sharded) == ["p1.d_0", "p1.y_0_0", "p1.m_0"]


def test_numbers_may_come_after_the_state(tmp_path: Path) -> None:
    """They drop nothing that has been loaded."""
    layers = layers_of("float32", [[2]])
    optimizer = ASGD(0.1, N, layers.parameters())
    step_with(optimizer, 1.0)
    before = values_of(optimizer)
    optimizer.set_numbers_state_dict(optimizer.numbers_state_dict())
    assert values_of(optimizer) == before


NUMBERS = [
    (lambda numbers: numbers.update(batch_num=4), r"set_state_dict: batch_num is 4, expected 3"),
    (lambda numbers: numbers.pop("batch_num"), r"set_state_dict: batch_num is missing, expected what numbers_state"),
    (lambda numbers: numbers.pop("batch_weights"), r"was made with batch_weights: none"),
    (lambda numbers: numbers.update(theta_step=-1), r"'theta_step'"),
    (lambda numbers: numbers.pop("LR_Scheduler"), r"'LR_Scheduler' is missing"),
    (
        lambda numbers: numbers.pop("batch_index_used"),
        r"set_state_dict: batch_index_used is None of type NoneType, expected a number",
    ),
    (lambda numbers: numbers.update(batch_index_used=0), r"batch_index_used is 0, and a batch_index of this optimizer"),
    (lambda numbers: numbers.update(p0_d_0=paddle.zeros([2])), r"set_state_dict: entry 'p0_d_0' is unknown, expected"),
]


@pytest.mark.parametrize(("change", "words"), NUMBERS)
def test_numbers_that_do_not_fit(change: Callable[[dict], Any], words: str) -> None:
    run = Run("weighted", alone=True)
    run.train(0, 2)
    numbers, state = run.asgd.numbers_state_dict(), values_without_rate(run)
    change(numbers)
    with pytest.raises(ValueError, match=words):
        run.asgd.set_numbers_state_dict(numbers)
    assert values_without_rate(run) == state


def values_without_rate(run: Run) -> Any:
    state = run.asgd.state_dict()
    return run.scheduler.state_dict(), {k: v.tolist() for k, v in state.items() if k != "LR_Scheduler"}


def test_what_cannot_be_sharded() -> None:
    layers = layers_of("float32", [[2], [3]])
    optimizer = ASGD(0.1, N, layers.parameters())
    with pytest.raises(TypeError, match=r"set_numbers_state_dict: received list, expected a dict"):
        optimizer.set_numbers_state_dict([])
    for wrong in (None, layers.state_dict()):
        with pytest.raises(TypeError, match=r"model_sharded_state_dict: received .*, expected a dict of ShardedWeight"):
            optimizer.sharded_state_dict(wrong)
    model = layers.sharded_state_dict()
    del model["p1"]
    with pytest.raises(ValueError, match=r"model_sharded_state_dict: received no entry of parameter '.*', expected"):
        optimizer.sharded_state_dict(model)
    slices = ASGD(0.1, N, layers.parameters())
    slices._parameter_list = [
        paddle.base.framework.EagerParamBase([1], "float32", name=p.name) for p in layers.parameters()
    ]
    with pytest.raises(
        RuntimeError, match=r"sharded_state_dict: received a call before the first step under a wrapper"
    ):
        slices.sharded_state_dict(layers.sharded_state_dict())


def test_a_paddle_without_this_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_checkpoint, "ShardedWeight", None)
    with pytest.raises(
        RuntimeError, match=r"sharded_state_dict: received a call under a Paddle without .*ShardedWeight"
    ):
        ASGD(0.1, N, layers_of("float32", [[2]]).parameters()).sharded_state_dict({})
