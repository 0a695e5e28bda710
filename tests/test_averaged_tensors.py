# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a model are averaged, copied or left alone, whatever others have made of the model.

Must not test when an average is updated (test_averaged_model.py).
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from averaging import COPIED, Judge, Network, arrays, batches, train
from test_refusals import assert_refused, table

from paddle_asgd import AveragedModel, ema, power_ema, swa
from paddle_asgd.averages.averaged_tensors import AveragedTensors


def momentum(model: Any, rate: float = 0.05, **options: Any) -> Any:
    return paddle.optimizer.Momentum(rate, parameters=model.parameters(), **options)


def trained(
    steps: int, average: Any, model: Any = None, copied: Any = COPIED, **options: Any
) -> tuple[Any, AveragedModel, Judge]:
    """A model, its AveragedModel and the judge after so many steps with an update each."""
    model = Network() if model is None else model
    averaged, judge = AveragedModel(model, average, **options), Judge(arrays(model), average, copied)
    optimizer = momentum(model)
    for batch in batches(steps):
        train(model, optimizer, batch)
        averaged.update()
        judge.update(arrays(model))
    return model, averaged, judge


@pytest.mark.parametrize("average", [ema(0.9), ema(0.99, warmup="inverse"), swa(), power_ema(0.1), lambda t: 0.5 / t])
def test_every_kind_of_tensor(average: Any) -> None:
    _, averaged, judge = trained(12, average)
    judge.check(arrays(averaged.averaged_state_dict()))
    assert averaged.num_updates == 12
    assert averaged.decay == average(12)


def test_default_rule() -> None:
    averaged = AveragedModel(Network())
    assert (averaged.average, averaged.decay, averaged.num_updates) == (ema(0.999), None, 0)
    assert repr(averaged).startswith("AveragedModel(Network, ema(0.999), ")


def test_buffers_can_be_averaged() -> None:
    _, averaged, judge = trained(8, ema(0.8), copied=("seen", "mask"), buffers="average")
    judge.check(arrays(averaged.averaged_state_dict()))


@pytest.mark.parametrize("exclude", [lambda name: name.startswith("last."), ["last.weight", "last.bias"], "parameters"])
def test_what_is_excluded_stays_live(exclude: Any) -> None:
    model = Network()
    listed = [model.last.weight, model.tied.weight, model.last.bias] if exclude == "parameters" else exclude
    _, averaged, judge = trained(5, ema(0.8), model, exclude=listed)
    live = arrays(model)
    # A shared parameter is excluded under all of its names.
    excluded = {"last.weight", "last.bias", "tied.weight"}
    judge.averages.update({name: live[name] for name in excluded})
    judge.check(arrays(averaged.averaged_state_dict()))
    assert excluded.isdisjoint(averaged.state_dict()["averages"])


def test_shared_parameters_are_averaged_once() -> None:
    _, averaged, _ = trained(3, ema(0.5))
    assert "tied.weight" not in averaged.state_dict()["averages"]
    weights = averaged.averaged_state_dict()
    assert weights["tied.weight"] is weights["last.weight"]


def test_buffers_that_are_not_saved_are_left_alone() -> None:
    model, averaged, _ = trained(3, ema(0.5))
    with averaged.averaged_parameters():
        model.passing.set_value(paddle.full([2], 7.0))
    assert model.passing.numpy().tolist() == [7.0, 7.0]


def test_a_frozen_parameter_that_is_trained_later() -> None:
    model = Network()
    averaged = AveragedModel(model, ema(0.5))
    averaged.update()
    model.frozen.stop_gradient = False
    for value, expected in ((1.75, 1.25), (1.25, 1.25), (3.25, 2.25)):
        model.frozen.set_value(paddle.full([3], value))
        averaged.update()
        assert averaged.averaged_state_dict()["frozen"].numpy().tolist() == [expected] * 3
    with averaged.averaged_parameters():
        assert model.frozen.numpy().tolist() == [2.25] * 3
    assert model.frozen.numpy().tolist() == [3.25] * 3


# DataParallel says that there is one card only.
@pytest.mark.filterwarnings("ignore:The program will return to single-card operation")
@pytest.mark.parametrize("kind", ["data_parallel", "to_static", "weight_norm", "renamed"])
def test_models_that_others_have_dressed(kind: str) -> None:
    model: Any = Network()
    if kind == "weight_norm":
        paddle.nn.utils.weight_norm(model.first, dim=0)
    if kind == "data_parallel":
        model = paddle.DataParallel(model)
    if kind == "to_static":
        model = paddle.jit.to_static(model, full_graph=True)
    if kind == "renamed":
        for number, param in enumerate(model.parameters()):
            param.name = f"{number}"
    _, averaged, judge = trained(6, ema(0.7), model)
    judge.check(arrays(averaged.averaged_state_dict()))
    model.eval()
    (batch,) = batches(1, seed=8)
    raw = model(batch).numpy()
    twin = Network()
    if kind == "weight_norm":
        paddle.nn.utils.weight_norm(twin.first, dim=0)
    twin.set_state_dict(averaged.averaged_state_dict())
    twin.eval()
    with averaged.averaged_parameters():
        np.testing.assert_allclose(model(batch).numpy(), twin(batch).numpy(), rtol=1e-6, atol=1e-7)
    assert model(batch).numpy().tobytes() == raw.tobytes()
    assert not np.allclose(raw, twin(batch).numpy(), rtol=1e-4)


def test_a_model_that_is_cast_later() -> None:
    """By amp.decorate or by hand: averages stay as wide as they were, copies have the dtype of what they copy."""
    model = Network()
    averaged = AveragedModel(model, ema(0.5))
    before = arrays(model)
    averaged.update()
    model.bfloat16()
    with averaged.averaged_parameters():
        assert str(model.frozen.dtype) == "paddle.bfloat16"
    model.last.bias.set_value(paddle.full([2], 3.0, "bfloat16"))
    averaged.update()
    held = averaged.state_dict()["averages"]
    np.testing.assert_array_equal(held["last.bias"].numpy(), before["last.bias"] * 0.5 + 1.5)
    assert held["frozen"].dtype == model.frozen.dtype
    weights = averaged.averaged_state_dict()
    assert {name: tensor.dtype for name, tensor in weights.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    with averaged.averaged_parameters():
        assert model.last.bias.numpy().tobytes() == weights["last.bias"].numpy().tobytes()


def test_a_state_dict_of_ones_own() -> None:
    """The tensors themselves are followed, whatever a model says of itself."""

    class Renamed(Network):
        def state_dict(self) -> dict:
            return {f"mine.{name}": tensor.clone() for name, tensor in super().state_dict().items()}

    model = Renamed()
    averaged = AveragedModel(model, ema(0.5))
    model.last.bias.set_value(paddle.full([2], 3.0))
    averaged.update()
    assert averaged.averaged_state_dict()["last.bias"].tolist() == [1.5, 1.5]


def test_a_layer_that_cannot_be_copied() -> None:
    model = Network()
    model.handle = open(__file__)  # noqa: SIM115
    with model.handle:
        _, averaged, judge = trained(3, ema(0.7), model)
        judge.check(arrays(averaged.averaged_state_dict()))


def test_parameters_without_elements_and_without_dimensions() -> None:
    model = paddle.nn.Layer()
    for name, shape in {"empty": [0, 3], "number": [], "long": [257], "none": [0]}.items():
        model.register_buffer(name, paddle.ones(shape))
    averaged = AveragedModel(model, ema(0.5), buffers="average")
    model.number.set_value(paddle.full([], 3.0))
    averaged.update()
    with averaged.averaged_parameters():
        assert model.number.item() == 2.0
    assert list(averaged.averaged_state_dict()["empty"].shape) == [0, 3]


def test_a_model_of_nothing() -> None:
    averaged = AveragedModel(paddle.nn.ReLU())
    averaged.update()
    with averaged.averaged_parameters():
        assert averaged.averaged_state_dict() == {}


# ---- The plan of an update that is like the last one -----------------------------------------------------------------


def other_memory(model: Any, optimizer: Any) -> None:
    paddle.full([2], 3.0)._share_buffer_to(model.last.bias)


def other_memory_of_a_copied_one(model: Any, optimizer: Any) -> None:
    paddle.full([2], 3.0)._share_buffer_to(model.scale)


def trained_since(model: Any, optimizer: Any) -> None:
    model.frozen.stop_gradient = False
    model.frozen.set_value(paddle.full([3], 2.0))


def cast_since(model: Any, optimizer: Any) -> None:
    model.bfloat16()


def other_master(model: Any, optimizer: Any) -> None:
    optimizer._master_weights[model.last.bias.name] = paddle.full([2], 3.0)


def other_masters(model: Any, optimizer: Any) -> None:
    optimizer._master_weights = {model.last.bias.name: paddle.full([2], 3.0)}


def no_masters(model: Any, optimizer: Any) -> None:
    optimizer._master_weights = None
    model.last.bias.set_value(paddle.full([2], 3.0))


@pytest.mark.parametrize(
    "change",
    [
        None,
        other_memory,
        other_memory_of_a_copied_one,
        trained_since,
        cast_since,
        other_master,
        other_masters,
        no_masters,
    ],
)
def test_a_plan_is_followed_until_something_differs(change: Callable | None) -> None:
    model = Network()
    optimizer = momentum(model)
    optimizer._master_weights = {model.first.bias.name: model.first.bias.clone()}
    averaged = AveragedTensors(model, optimizer, None, False, "float32")
    averaged.update(1.0)
    plan = averaged._plan
    averaged.update(1.0)
    assert averaged._plan is plan
    if change is not None:
        change(model, optimizer)
    averaged.update(1.0)
    assert (averaged._plan is plan) == (change is None)
    # The averages have become the values.
    expected = arrays(model)
    if change in (other_master, other_masters):
        expected["last.bias"][:] = 3
    received = arrays(averaged.as_in_model(False))
    for name, value in expected.items():
        assert received[name].tobytes() == value.tobytes(), name


# ---- What is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "name": (lambda: "last.weight", TypeError, "exclude: received 'last.weight'", "within a list"),
    "close": (lambda: ["last.wieght"], ValueError, "'last.wieght'", "did you mean 'last.weight'?"),
    "prefix": (lambda: ["zzz"], ValueError, "exclude: received 'zzz'", "a callable can exclude"),
    "number": (lambda: [1], TypeError, "exclude: received 1", "structured names and parameters"),
    "other": (lambda: [paddle.ones([7])], ValueError, "exclude: received", "[7]", "of the model"),
    "tensor": (lambda: paddle.ones([7]), TypeError, "exclude: received", "within a list"),
}


@table(REFUSED)
def test_refused_exclusions(row: Any) -> None:
    make, error, *pieces = row
    assert_refused(lambda: AveragedModel(Network(), exclude=make()), error, pieces)
