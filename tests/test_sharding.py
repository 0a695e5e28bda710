# SPDX-License-Identifier: Apache-2.0
"""Where fleet divides the parameters among ranks (sharding stage 1): what a rank says is true of all parts.

One job of two processes over gloo, which all tests read. Must not test the step's numbers themselves (test_fused.py).
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.distributed import fleet
from problems import state_of, step_with
from ranks import caught, needs_fleet, run_on_ranks

from paddle_asgd import ASGD, AveragedSGD, LipschitzSearch, SlotMismatchWarning
from paddle_asgd.sag import checks, history

pytestmark = needs_fleet

DOCS = Path(__file__).parents[1] / "docs" / "distributed.md"
N, STEPS, RATE = 3, 10, 0.1
WEIGHTS = [4.0, 4.0, 3.0]
DRAWN = [2, 0, 0, 1, 2, 2, 1, 0]


def network() -> Any:
    """The same one for every rank and every call, under the same names."""
    draw = np.random.default_rng(3)
    with paddle.utils.unique_name.guard():
        layers = paddle.nn.Sequential(paddle.nn.Linear(4, 5), paddle.nn.Tanh(), paddle.nn.Linear(5, 1))
    for param in layers.parameters():
        param.set_value(draw.normal(size=param.shape).astype("float32"))
    return layers


def batches() -> list[np.ndarray]:
    draw = np.random.default_rng(4)
    return [draw.normal(size=[8, 5]).astype("float32") for _ in range(N)]


def train(model: Any, optimizer: Any, rows: slice, steps: range, order: Any = None) -> None:
    data = batches()
    for step in steps:
        batch = paddle.to_tensor(data[step % N if order is None else order[step]][rows])
        paddle.nn.functional.mse_loss(model(batch[:, :4]), batch[:, 4:]).backward()
        optimizer.step()
        optimizer.clear_grad()


class Single(paddle.nn.Layer):
    """One parameter of three elements, whose gradient is always 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.x = self.create_parameter([3], default_initializer=paddle.nn.initializer.Constant(0.0))

    def forward(self) -> Any:
        return 0.5 * self.x.sum()


def theta(step: int) -> float:
    return 0.3 / (1 + step)


class Rank:
    """One rank of the job: a model, the optimizer, and the wrapper that divides it."""

    def __init__(self, layers: Any = None, **options: Any) -> None:
        layers = network() if layers is None else layers
        self.asgd = ASGD(RATE, N, layers.parameters(), **{"weight_decay": 0.1, **options})
        self.model = fleet.distributed_model(layers)
        self.optimizer = fleet.distributed_optimizer(self.asgd)

    def train(self, first: int, last: int, order: Any = None) -> None:
        """In turn, or in the order of a list."""
        rank = paddle.distributed.get_rank()
        train(self.model, self.optimizer, slice(rank * 4, rank * 4 + 4), range(first, last), order)


def warned_in_steps() -> list[list[int]]:
    """The steps at which wrong slots are warned of, in several orders."""
    draw, steps = np.random.default_rng(8), []
    for _ in range(3):
        rank, order = Rank(), draw.integers(N, size=20 * N).tolist()
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always", SlotMismatchWarning)
            said = []
            for step in range(len(order)):
                before = len(given)
                rank.train(step, step + 1, order)
                said += [step] * any(issubclass(w.category, SlotMismatchWarning) for w in given[before:])
        steps.append(said)
    return steps


def values(layers: Any) -> list[list[float]]:
    return [param.flatten().tolist() for param in layers.parameters()]


def checkpoints(found: dict[str, Any], folder: Path) -> None:
    """Continue a run with weights and a theta that varies, from every kind of checkpoint."""
    given: dict[str, Any] = {"batch_weights": WEIGHTS, "theta": theta}
    number = paddle.distributed.get_rank()
    layers = network()
    rank = Rank(layers, **given)
    rank.train(0, 5)
    weights = {name: value.clone() for name, value in layers.state_dict().items()}
    paddle.save(rank.optimizer.state_dict(), f"{folder}/{number}.pdopt")
    paddle.distributed.barrier()
    parts = [paddle.load(f"{folder}/{part}.pdopt") for part in range(2)]
    rank.train(5, STEPS)
    found["uninterrupted"] = values(layers)

    def resumed(load: Any) -> list[list[float]]:
        layers = network()
        layers.set_state_dict(weights)
        rank = Rank(layers, **given)
        load(rank)
        rank.train(5, STEPS)
        return values(layers)

    found["own"] = resumed(lambda rank: rank.optimizer.set_state_dict(dict(parts[number])))
    merged = {**parts[0], **parts[1]}
    found["merged"] = resumed(lambda rank: rank.optimizer.set_state_dict(dict(merged)))
    found["merged_directly"] = resumed(lambda rank: rank.asgd.set_state_dict(dict(merged)))
    found["of_another_rank"] = caught(lambda: Rank(**given).asgd.set_state_dict(parts[1 - number]))
    found["misspelt"] = caught(lambda: Rank(**given).asgd.set_state_dict({**merged, "other_d_0": merged["batch_num"]}))

    alone = network()
    alone.set_state_dict(weights)
    optimizer = ASGD(RATE, N, alone.parameters(), weight_decay=0.1, **given)
    optimizer.set_state_dict(merged)
    of_one = {name: paddle.to_tensor(value.numpy()) for name, value in optimizer.state_dict().items()}
    train(alone, optimizer, slice(None), range(5, STEPS))
    found["in_one_process"] = values(alone)
    found["of_one_process"] = resumed(lambda rank: rank.asgd.set_state_dict(of_one))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found["of_one_process_wrapped"] = caught(lambda: Rank(**given).optimizer.set_state_dict(dict(of_one)))
    found["said"] = [str(warning.message) for warning in said if "set_state_dict" in str(warning.message)]


def narrow(found: dict[str, Any], folder: Path) -> None:
    """A history in 8 bits, which these small tensors would not have otherwise, from its rank's part and from both."""
    usual, history.SMALLEST = history.SMALLEST, 1
    try:
        number = paddle.distributed.get_rank()
        layers = network()
        rank = Rank(layers, history_dtype="int8")
        rank.train(0, 5)
        found["bytes"] = rank.optimizer.state_bytes()
        found["narrow_norm"] = rank.optimizer.gradient_norm()
        weights = {name: value.clone() for name, value in layers.state_dict().items()}
        paddle.save(rank.optimizer.state_dict(), f"{folder}/narrow_{number}.pdopt")
        paddle.distributed.barrier()
        parts = [paddle.load(f"{folder}/narrow_{part}.pdopt") for part in range(2)]
        rank.train(5, STEPS)
        found["narrow"] = [values(layers)]
        for state in (parts[number], {**parts[0], **parts[1]}):
            layers = network()
            layers.set_state_dict(weights)
            rank = Rank(layers, history_dtype="int8")
            rank.optimizer.set_state_dict(dict(state))
            rank.train(5, STEPS)
            found["narrow"] += [values(layers)]
        found["exact"] = caught(lambda: Rank().optimizer.set_state_dict(dict(parts[number])))
    finally:
        history.SMALLEST = usual


def memory(found: dict[str, Any]) -> None:
    """The history of all 31 parameters takes 372 bytes, that of the 20 on rank 0 takes 240, of the 11 on rank 1 132."""
    whole = checks.free_memory
    saved = Rank()
    saved.train(0, 1)
    state = saved.asgd.state_dict()
    try:
        checks.free_memory = lambda: 300
        found["room_for_a_part"] = caught(lambda: Rank().train(0, 1))
        checks.free_memory = lambda: 100
        rank = Rank()
        found["no_room"] = [caught(lambda: rank.train(0, 1)) for _ in range(2)]
        found["no_room_to_load"] = caught(lambda: rank.asgd.set_state_dict(state))
        found["state"] = len(rank.asgd.state_dict())
    finally:
        checks.free_memory = whole
    found["room_again"] = caught(lambda: rank.train(0, 1))


def wide() -> Any:
    """2.5 million parameters, of which the first tensor has two."""
    return paddle.nn.Sequential(paddle.nn.Linear(1000, 2000), paddle.nn.Linear(2000, 256), paddle.nn.Linear(256, 10))


def bytes_of_history(layers: Any, asgd: ASGD, optimizer: Any) -> int:
    """Of d, y and m after a step."""
    layers(paddle.ones([2, 1000])).mean().backward()
    optimizer.step()
    states = [state_of(asgd, param) for param in asgd._parameter_list]
    return sum(state[name].nbytes for state in states for name in ("d", "y", "m"))


def job(found: dict[str, Any], folder: Path) -> None:
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 1, "sharding_degree": 2}
    fleet.init(is_collective=True, strategy=strategy)
    rank = Rank()
    found["parts"] = [param.name for param in rank.asgd._parameter_list]
    found["norms"] = [rank.optimizer.gradient_norm()]
    rank.train(0, STEPS)
    found["norms"] += [rank.optimizer.gradient_norm()]
    found["search"] = caught(lambda: LipschitzSearch(rank.asgd))
    found["ratio"] = rank.optimizer.variance_ratio
    found["warned"] = warned_in_steps()
    layers = network()
    drawn = Rank(layers)
    for index in DRAWN:
        drawn.optimizer.set_batch_index(index)
        drawn.train(0, 1, [index])
    found["drawn"] = values(layers)
    checkpoints(found, folder)
    narrow(found, folder)
    memory(found)
    single = Rank(Single(), weight_decay=None)
    found["single"] = [single.optimizer.gradient_norm()]
    for _ in range(2 * N):
        single.model().backward()
        single.optimizer.step()
        single.optimizer.clear_grad()
    found["single"] += [single.optimizer.gradient_norm()]
    layers = wide()
    asgd = ASGD(0.1, 8, layers.parameters())
    wrapped = fleet.distributed_model(layers), asgd, fleet.distributed_optimizer(asgd)
    found["wide"] = bytes_of_history(*wrapped)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found = run_on_ranks("test_sharding.job", tmp_path_factory.mktemp("sharding"))
    assert all(one["parts"] for one in found)
    return found


@pytest.fixture
def alone() -> ASGD:
    """One process that has taken the steps of all ranks."""
    model = network()
    optimizer = ASGD(RATE, N, model.parameters(), weight_decay=0.1)
    train(model, optimizer, slice(None), range(STEPS))
    return optimizer


def test_gradient_norm_is_that_of_all_parts(ranks: list[dict[str, Any]], alone: ASGD) -> None:
    """Before the first step, and then the same double on every rank, so that a stopping rule stops all of them."""
    assert ranks[0]["norms"] == ranks[1]["norms"]
    assert ranks[0]["norms"][0] == math.inf
    assert ranks[0]["norms"][1] == pytest.approx(alone.gradient_norm(), rel=1e-6)


def test_a_rank_without_parameters_takes_part(ranks: list[dict[str, Any]]) -> None:
    """Of one parameter and two ranks; the first time before any step."""
    assert ranks[0]["single"] == ranks[1]["single"]
    assert ranks[0]["single"][0] == math.inf
    assert ranks[0]["single"][1] == pytest.approx(math.sqrt(3) * 0.5, rel=1e-6)


def test_the_watch_sees_all_parts(ranks: list[dict[str, Any]], alone: ASGD) -> None:
    """Every parameter of this network is so small that all of its elements are sampled."""
    assert ranks[0]["ratio"] == ranks[1]["ratio"]
    assert ranks[0]["ratio"] == pytest.approx(alone.variance_ratio, rel=1e-5)


def test_all_ranks_warn_at_the_same_step(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["warned"] == ranks[1]["warned"]
    assert sum(map(bool, ranks[0]["warned"])) >= 2


def test_a_search_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["search"].startswith("ValueError: optimizer: received one whose parameters a wrapper has divided")
        assert "paddle.DataParallel" in found["search"]


@pytest.mark.parametrize("saved", ["own", "merged", "merged_directly", "of_one_process"])
def test_a_resumed_run_continues_bit_for_bit(ranks: list[dict[str, Any]], saved: str) -> None:
    """With weights and a theta that varies, which the wrapper would drop."""
    for found in ranks:
        assert found[saved] == found["uninterrupted"]


def test_a_narrow_history_of_a_part(ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are those of the part, and it resumes to the bit, from the part's state and from that of all."""
    monkeypatch.setattr(history, "SMALLEST", 1)
    whole = ASGD(RATE, N, network().parameters(), history_dtype="int8").state_bytes()
    assert tuple(map(sum, zip(*(found["bytes"] for found in ranks)))) == whole
    assert min(found["bytes"][1] for found in ranks) > 0
    assert ranks[0]["narrow_norm"] == ranks[1]["narrow_norm"]
    for found in ranks:
        assert found["narrow"] == ranks[0]["narrow"][:1] * 3
        assert "is int8, expected float32" in found["exact"]


def test_what_ranks_have_saved_is_loaded_by_one_process(ranks: list[dict[str, Any]]) -> None:
    for one, part in zip(ranks[0]["in_one_process"], ranks[0]["uninterrupted"]):
        np.testing.assert_allclose(one, part, rtol=0, atol=1e-6 * np.abs(part).max())


def test_what_no_rank_may_load(ranks: list[dict[str, Any]]) -> None:
    """The part of another rank, an entry that belongs to nothing, and a state that the wrapper has shortened."""
    for found in ranks:
        assert "the entries of parameter 'linear_" in found["of_another_rank"]
        assert "state of 'other' belongs to no parameter" in found["misspelt"]
        assert "the checkpoint was made with batch_weights: none" in found["of_one_process_wrapped"]
        assert len(found["said"]) == 1
        assert "set_state_dict: no entry 'batch_num'" in found["said"][0]


def test_the_history_of_a_part_must_fit(ranks: list[dict[str, Any]]) -> None:
    """Not that of all parameters, which the optimizer is made with. A step that has no room makes no state."""
    for found in ranks:
        assert found["room_for_a_part"] == ""
        for refusal in (*found["no_room"], found["no_room_to_load"]):
            assert refusal.startswith("ValueError: batch_num: received 3, which takes ")
        assert found["state"] == 1 + len(found["parts"])  # batch_num, and its copies
        assert found["room_again"] == ""


def test_the_batch_index_goes_through_the_wrapper(ranks: list[dict[str, Any]]) -> None:
    layers = network()
    optimizer = ASGD(RATE, N, layers.parameters(), weight_decay=0.1)
    for index in DRAWN:
        optimizer.batch_index = index
        train(layers, optimizer, slice(None), range(1), [index])
    assert ranks[0]["drawn"] == ranks[1]["drawn"]
    for one, part in zip(values(layers), ranks[0]["drawn"]):
        np.testing.assert_allclose(one, part, rtol=0, atol=1e-6 * np.abs(part).max())


def test_bytes_are_those_of_the_docs(ranks: list[dict[str, Any]]) -> None:
    layers = wide()
    asgd = ASGD(0.1, 8, layers.parameters())
    measured = [bytes_of_history(layers, asgd, asgd), *[found["wide"] for found in ranks]]
    assert measured[0] == sum(measured[1:])
    row = re.search(r"^\| 2.5 M parameters, n = 8 .*$", DOCS.read_text(), re.MULTILINE)[0]
    assert [f"{count / 1e6:.1f} MB" for count in measured] == re.findall(r"[\d.]+ MB", row)[:3]


# ---- In one process, with a list that is divided by hand -------------------------------------------------------------


def divided(names: list[str], own: slice, **options: Any) -> ASGD:
    """An optimizer of 16-bit parameters of these names, which a wrapper has left a part."""
    params = [paddle.create_parameter([2], "float16") for _ in names]
    for param, name in zip(params, names):
        param.name = name
    optimizer = ASGD(RATE, N, params, multi_precision=True, **options)
    optimizer._parameter_list = params[own]
    return optimizer


def saved_by_one_process() -> tuple[ASGD, dict[str, Any]]:
    optimizer = divided(["a", "b", "c"], slice(None))
    optimizer._parameter_list = optimizer._own_list
    step_with(optimizer, 1.0, 2.0, 3.0)
    return optimizer, optimizer.state_dict()


def test_a_part_takes_its_own_master_weights() -> None:
    whole, state = saved_by_one_process()
    part = divided(["a", "b", "c"], slice(1, 2))
    part.set_state_dict(state)
    assert set(part._master_weights) == {"b"}
    assert state_of(part, part._parameter_list[0])["d"].tolist() == [2.0, 2.0]
    assert len(whole.state_dict()["master_weights"]) == 3


def test_a_part_is_matched_by_position_among_all() -> None:
    """A model that was built anew has other names; the part's place in the list says which entries are its own."""
    _, state = saved_by_one_process()
    part = divided(["x", "y", "z"], slice(1, 2))
    with pytest.warns(UserWarning, match="matched by their order, from 'a' to 'x' on"):
        part.set_state_dict(state)
    assert state_of(part, part._parameter_list[0])["d"].tolist() == [2.0, 2.0]


def test_copies_that_differ_are_refused() -> None:
    """Such a state was joined from several checkpoints."""
    _, state = saved_by_one_process()
    part = divided(["a", "b", "c"], slice(1, 2))
    with pytest.raises(ValueError, match=r"set_state_dict: entry 'b_copy_of_batch_num' differs from 'batch_num'"):
        part.set_state_dict({**state, "b_copy_of_batch_num": paddle.to_tensor([4])})
    assert part._master_weights == {}


def test_numbers_of_averaged_sgd_survive_the_wrapper() -> None:
    """Its layout has a tensor called t0, and so is one of its numbers."""

    def part() -> AveragedSGD:
        optimizer = AveragedSGD(RATE, t0=5.0, parameters=[paddle.create_parameter([2], "float32") for _ in range(2)])
        optimizer._parameter_list = optimizer._own_list[1:]
        optimizer._parameter_list[0].name = "kept"
        return optimizer

    first, second = part(), part()
    first.start_averaging()
    step_with(first, 1.0)
    state = first.state_dict()
    second.set_state_dict({key: value for key, value in state.items() if "kept" in key})
    loaded = second.state_dict()
    numbers = ("lambd", "alpha", "t0", "torch_compatible", "averaging_started")
    assert [loaded[name].item() for name in numbers] == [state[name].item() for name in numbers]
    assert loaded["averaging_started"].item() == 1
