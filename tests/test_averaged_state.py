# SPDX-License-Identifier: Apache-2.0
"""AveragedModel's state_dict: resumed to the bit in another process, refused as a whole; averaged_state_dict, copy_to.

Must not test swaps (test_averaged_model_swap.py).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from averaging import Network, arrays, batches, bits, train
from test_refusals import assert_refused, table

from paddle_asgd import ASGD, AveragedModel, ema, power_ema, swa

RULES = {
    "warm_up": lambda: ema(0.99, warmup="inverse", power=0.8),
    "ratio": lambda: ema(0.99, warmup="ratio", debias=True),
    "swa": swa,
    "power": lambda: power_ema(0.1),
}


def trained(steps: int, average: Any = None, **options: Any) -> tuple[Network, AveragedModel]:
    model = Network()
    optimizer = paddle.optimizer.Momentum(0.05, parameters=model.parameters())
    averaged = AveragedModel(model, average or ema(0.6), optimizer=optimizer, **options)
    for batch in batches(steps):
        train(model, optimizer, batch)
        averaged.update()
    return model, averaged


def content(averaged: AveragedModel) -> dict[str, Any]:
    """The state with tensors as bytes."""
    state = averaged.state_dict()
    return {**state, "averages": {name: t.numpy().tobytes() for name, t in state["averages"].items()}}


# ---- Resumed ---------------------------------------------------------------------------------------------------------

RESUMED = """
import sys, warnings
warnings.simplefilter("ignore")
import paddle
sys.path.insert(0, sys.argv[1])
from averaging import Network
from test_averaged_state import RULES, ten_more
from paddle_asgd import AveragedModel

for path, rule, dtype in zip(*[iter(sys.argv[2:])] * 3):
    # Other names of tensors than where it was saved.
    paddle.nn.Linear(3, 3), paddle.nn.BatchNorm1D(2)
    model = Network()
    optimizer = paddle.optimizer.Momentum(0.05, parameters=model.parameters())
    averaged = AveragedModel(model, RULES[rule](), optimizer=optimizer, dtype=dtype)
    model.set_state_dict(paddle.load(path + ".pdparams"))
    averaged.set_state_dict(paddle.load(path + ".pdaverage"))
    print(repr(ten_more(model, optimizer, averaged)))
"""


def ten_more(model: Any, optimizer: Any, averaged: AveragedModel) -> list:
    """Count, decay and averages, now and after each of ten more updates."""
    found = []
    for batch in [None, *batches(10, seed=6)]:
        if batch is not None:
            train(model, optimizer, batch)
            averaged.update()
        found.append((averaged.num_updates, averaged.decay.hex(), content(averaged)["averages"]))
    return found


def test_a_fresh_process_goes_on(tmp_path: Path) -> None:
    """In mid-warm-up: decay, count, average and the next ten updates to the bit."""
    expected, arguments = [], []
    for rule in RULES:
        for dtype in ("float32", "float64"):
            path = str(tmp_path / f"{rule}_{dtype}")
            arguments += [path, rule, dtype]
            model, averaged = trained(5, RULES[rule](), dtype=dtype)
            paddle.save(model.state_dict(), path + ".pdparams")
            paddle.save(averaged.state_dict(), path + ".pdaverage")
            # From here on with an optimizer that has no momentum from before, as there.
            optimizer = paddle.optimizer.Momentum(0.05, parameters=model.parameters())
            again = AveragedModel(model, RULES[rule](), optimizer=optimizer, dtype=dtype)
            again.set_state_dict(averaged.state_dict())
            expected.append(repr(ten_more(model, optimizer, again)))
            assert again.num_updates == 15
    command = [sys.executable, "-c", RESUMED, str(Path(__file__).parent), *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-len(expected) :] == expected


@pytest.mark.parametrize("steps", range(8))
def test_the_count_of_calls_is_resumed(steps: int) -> None:
    """Between two updates, and before ``update_after``."""
    options: dict[str, Any] = {"update_after": 3, "update_every": 2}
    _, whole = trained(12, **options)
    model = Network()
    optimizer = paddle.optimizer.Momentum(0.05, parameters=model.parameters())
    averaged = AveragedModel(model, ema(0.6), optimizer=optimizer, **options)
    start = bits(model)
    for number, batch in enumerate(batches(12)):
        if number == steps:
            state = averaged.state_dict()
            averaged = AveragedModel(model, ema(0.6), optimizer=optimizer, **options)
            averaged.set_state_dict(state)
        train(model, optimizer, batch)
        averaged.update()
    assert start != bits(model)
    assert averaged.num_updates == whole.num_updates == 4
    assert content(averaged)["num_calls"] == 12


def test_a_rule_of_ones_own_is_loaded_without_comparison() -> None:
    _, averaged = trained(4, lambda t: 0.5)
    state = averaged.state_dict()
    assert state["rule"] is None
    _, other = trained(1, lambda t: 0.25)
    other.set_state_dict(state)
    assert content(other) == content(averaged)


@pytest.mark.parametrize("as_arrays", [False, True])
def test_16_bit_copies_and_arrays(as_arrays: bool, tmp_path: Path) -> None:
    """A frozen parameter of 16 bits is kept in 16 bits."""
    model = paddle.nn.Layer()
    for name, dtype in {"short": "float16", "brain": "bfloat16", "flag": "bool"}.items():
        model.register_buffer(name, paddle.to_tensor([1.0, 0.0]).astype(dtype))
    averaged = AveragedModel(model, ema(0.5))
    averaged.update()
    state = averaged.state_dict()
    if as_arrays:
        state["averages"] = {
            name: t if name == "brain" else t.numpy() for name, t in state["averages"].items() if name != "flag"
        } | {"flag": state["averages"]["flag"]}
    else:
        paddle.save(state, str(tmp_path / "state"))
        state = paddle.load(str(tmp_path / "state"))
    other = AveragedModel(model, ema(0.5))
    other.set_state_dict(state)
    assert content(other) == content(averaged)


# ---- Refused ---------------------------------------------------------------------------------------------------------


def edited(**changes: Any) -> Callable[[dict], dict]:
    return lambda state: {**state, **changes}


def averages(**changes: Any) -> Callable[[dict], dict]:
    def edit(state: dict) -> dict:
        found = {**state["averages"], **{name.replace("__", "."): value for name, value in changes.items()}}
        return {**state, "averages": {name: value for name, value in found.items() if value is not None}}

    return edit


def without(key: str) -> Callable[[dict], dict]:
    return lambda state: {name: value for name, value in state.items() if name != key}


REFUSED = {
    "list": (lambda state: [state], TypeError, "set_state_dict: received list, expected a dict"),
    "other": (lambda state: {}, ValueError, "'averages' is missing", "AveragedModel.state_dict()"),
    "weights": (lambda state: state["averages"], ValueError, "'averages' is missing"),
    "no_count": (without("num_calls"), ValueError, "'num_calls' is missing"),
    "unknown": (edited(epoch=3), ValueError, "'epoch' is unknown"),
    "rule": (edited(rule=ema(0.5).state_dict()), ValueError, "rule is {'rule': 'ema', 'decay': 0.5", "expected {"),
    "no_rule": (edited(rule=None), ValueError, "rule is None, expected {'rule': 'ema'"),
    "dtype": (edited(dtype="float64"), ValueError, "dtype is 'float64', expected 'float32'"),
    "count_float": (edited(num_updates=2.0), ValueError, "num_updates is 2.0", "expected an int"),
    "count_negative": (edited(num_calls=-1), ValueError, "num_calls is -1", "at least 0"),
    "count_large": (edited(num_updates=99), ValueError, "num_updates is 99, expected at most num_calls, 4"),
    "not_a_dict": (edited(averages=[]), ValueError, "'averages' is [] of type list, expected a dict"),
    "missing": (averages(last__bias=None), ValueError, "the average of 'last.bias' is missing (1 such"),
    "foreign": (averages(head=paddle.ones([1])), ValueError, "entry 'head' belongs to nothing that is averaged here"),
    "shape": (averages(last__bias=paddle.ones([3])), ValueError, "'last.bias' is float32 [3], expected float32 [2]"),
    "of_64": (averages(last__bias=paddle.ones([2], "float64")), ValueError, "'last.bias' is float64 [2], expected"),
    "words": (averages(last__bias="one"), ValueError, "'last.bias' is 'one' of type str", "expected a tensor"),
}


@table(REFUSED)
def test_refused_and_nothing_loaded(row: Any) -> None:
    edit, error, *pieces = row
    _, averaged = trained(4)
    _, source = trained(4)
    before = content(averaged)
    tail = ["Nothing has been loaded."] if error is ValueError else []
    assert_refused(lambda: averaged.set_state_dict(edit(source.state_dict())), error, [*pieces, *tail])
    assert content(averaged) == before


# ---- Weights for other models ----------------------------------------------------------------------------------------


def test_averaged_state_dict_is_a_models(tmp_path: Path) -> None:
    model, averaged = trained(6)
    weights = averaged.averaged_state_dict()
    assert list(weights) == list(model.state_dict())
    paddle.save(weights, str(tmp_path / "average.pdparams"))
    twin = Network()
    missing, unexpected = twin.set_state_dict(paddle.load(str(tmp_path / "average.pdparams")))
    assert (missing, unexpected) == ([], [])
    with averaged.averaged_parameters():
        assert bits(twin) == bits(model)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_copy_to_another_model(dtype: str) -> None:
    model, averaged = trained(6, dtype=dtype)
    twins = [Network(), paddle.nn.Sequential(Network())[0], Network()]
    averaged.copy_to(twins[0])
    with averaged.averaged_parameters():
        averaged.copy_to(twins[1])
        assert bits(twins[0]) == bits(twins[1]) == bits(model)
    twins[2].bfloat16()
    averaged.copy_to(twins[2])
    for name, tensor in twins[2].state_dict().items():
        expected = averaged.averaged_state_dict()[name].astype("float64").numpy()
        assert (np.abs(tensor.astype("float64").numpy() - expected) <= 2**-8 * np.abs(expected)).all(), name


def test_copy_to_the_own_model() -> None:
    """It goes on from the average, and the average has not changed."""
    model, averaged = trained(6)
    before = content(averaged)
    expected = arrays(averaged.averaged_state_dict())
    averaged.copy_to(model)
    assert {name: value.tobytes() for name, value in arrays(model).items()} == {
        name: value.tobytes() for name, value in expected.items()
    }
    assert content(averaged) == before


def test_copy_to_writes_master_weights() -> None:
    model = paddle.nn.Layer()
    model.x = model.create_parameter([50], dtype="bfloat16")
    optimizer = ASGD(0.01, 1, [model.x], multi_precision=True)
    averaged = AveragedModel(model, ema(0.5), optimizer=optimizer)
    for _ in range(3):
        model.x.grad = paddle.ones([50], "bfloat16")
        optimizer.step()
        averaged.update()
    averaged.copy_to(model)
    (master,) = optimizer._master_weights.values()
    assert master.numpy().tobytes() == averaged.state_dict()["averages"]["x"].numpy().tobytes()
    assert model.x.numpy().tobytes() == averaged.averaged_state_dict()["x"].numpy().tobytes()


def test_copy_to_a_model_that_differs() -> None:
    _, averaged = trained(2)
    for other, piece in ((paddle.nn.Linear(2, 1), "with 'bias'"), (paddle.nn.ReLU(), "without 'first.bias'")):
        with pytest.raises(ValueError, match=rf"^model: received one {piece}, expected the names"):
            averaged.copy_to(other)
    misshapen = Network()
    misshapen.last = paddle.nn.Linear(5, 3)
    before = bits(misshapen)
    with pytest.raises(ValueError, match=r"shape of value .* received \[5, 3\], expected \[5, 2\]"):
        averaged.copy_to(misshapen)
    assert bits(misshapen) == before
    with pytest.raises(TypeError, match="model: received"):
        averaged.copy_to({})
    assert np.isfinite(arrays(averaged.averaged_state_dict())["last.bias"]).all()
