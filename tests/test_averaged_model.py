# SPDX-License-Identifier: Apache-2.0
"""AveragedModel: what is averaged and what is copied, when an update counts, and how exact it is over many updates.

Must not test swaps (test_averaged_model_swap.py) nor what is saved (test_averaged_model_state.py).
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from averaging import COPIED, Judge, Network, arrays, batches, train
from problems import PIR, Quadratic
from problems import Network as TrainedNetwork
from test_fused import WholeStep
from test_refusals import assert_refused, table

from paddle_asgd import ASGD, AveragedModel, ema, native, power_ema, swa

ADAM = paddle.optimizer.Adam
OPTIMIZERS: dict[str, Any] = {
    "Adam": ADAM,
    "AdamW": paddle.optimizer.AdamW,
    "Momentum": paddle.optimizer.Momentum,
    "ASGD": lambda rate, parameters: ASGD(rate, 3, parameters),
}


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


# ---- What is averaged ------------------------------------------------------------------------------------------------


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


# ---- When an update counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_update_after_and_every(after: int, every: int) -> None:
    model = Network()
    averaged = AveragedModel(model, ema(0.6), update_after=after, update_every=every)
    optimizer, judge = momentum(model), Judge(arrays(model), ema(0.6))
    for call, batch in enumerate(batches(14), start=1):
        train(model, optimizer, batch)
        averaged.update()
        if call <= after:
            judge = Judge(arrays(model), ema(0.6))
        elif (call - after) % every == 0:
            judge.update(arrays(model))
        judge.check(arrays(averaged.averaged_state_dict()))
        assert averaged.num_updates == judge.updates
    assert averaged.num_updates == (14 - after) // every


def test_before_update_after_the_average_is_the_weights_of_now() -> None:
    model = Network()
    averaged = AveragedModel(model, ema(0.6), update_after=2)
    model.last.bias.set_value(paddle.full([2], 4.0))
    assert averaged.averaged_state_dict()["last.bias"].tolist() == [4.0, 4.0]
    assert averaged.state_dict()["averages"]["last.bias"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_counted_and_not_calls(name: str) -> None:
    """Four batches accumulate for a step, and ``update`` is called after every one, and twice."""
    model = Network()
    optimizer = OPTIMIZERS[name](0.01, parameters=model.parameters())
    averaged, judge = AveragedModel(model, ema(0.6), optimizer=optimizer), Judge(arrays(model), ema(0.6))
    for number, batch in enumerate(batches(12), start=1):
        model(batch).square().mean().backward()
        if number % 4 == 0:
            optimizer.step()
            optimizer.clear_grad()
            judge.update(arrays(model))
        averaged.update()
        averaged.update()
    assert averaged.num_updates == 3
    judge.check(arrays(averaged.averaged_state_dict()))


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GradScaler that works on the CPU, where Paddle switches its own off."""
    module = paddle.amp.grad_scaler
    place = SimpleNamespace(is_gpu_place=lambda: True)
    monkeypatch.setattr(module, "_dygraph_tracer", lambda: SimpleNamespace(_expected_place=place))
    return paddle.amp.GradScaler(init_loss_scaling=2.0, use_dynamic_loss_scaling=False)


@pytest.mark.parametrize("way", ["step", "minimize"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_steps_do_not_count(name: str, way: str, scaler: Any) -> None:
    model = paddle.nn.Linear(2, 1)
    optimizer = OPTIMIZERS[name](0.01, parameters=model.parameters())
    averaged = AveragedModel(model, ema(0.6), optimizer=optimizer)
    for factor in (1.0, math.inf, 2.0, math.nan, math.inf, 3.0):
        loss = scaler.scale((model(paddle.ones([1, 2])) * factor).mean())
        loss.backward()
        if way == "step":
            scaler.step(optimizer)
            scaler.update()
        else:
            scaler.minimize(optimizer, loss)
        optimizer.clear_grad()
        averaged.update()
    assert averaged.num_updates == 3


def test_one_step_of_groups_is_one() -> None:
    model = Network()
    groups = [{"params": [model.first.weight]}, {"params": [model.last.weight]}]
    for optimizer in (ADAM(0.01, parameters=groups), ASGD(0.01, 1, groups)):
        averaged = AveragedModel(model, ema(0.5), optimizer=optimizer)
        train(model, optimizer, batches(1)[0])
        averaged.update()
        averaged.update()
        assert averaged.num_updates == 1


def test_a_step_that_ends_with_an_error_does_not_count() -> None:
    model = Network()
    optimizer = ASGD(0.1, 2, model.parameters())
    averaged = AveragedModel(model, ema(0.5), optimizer=optimizer)
    model.last.bias.grad = paddle.ones([2])
    model.last.bias.regularizer = "none that Paddle knows"
    with pytest.raises(Exception, match="str"):
        optimizer.step()
    averaged.update()
    assert averaged.num_updates == 0


def test_two_averages_of_one_optimizer_and_one_that_is_gone() -> None:
    model = Network()
    optimizer = momentum(model)
    first = AveragedModel(model, ema(0.5), optimizer=optimizer)
    second = AveragedModel(model, swa(), optimizer=optimizer, update_every=2)
    gone = AveragedModel(model, swa(), optimizer=optimizer)
    gone.update()
    # At once, with the memory of its averages, and not when the garbage collector comes.
    gc.disable()
    there = weakref.ref(gone)
    del gone
    assert there() is None
    gc.enable()
    for batch in batches(4):
        train(model, optimizer, batch)
        first.update()
        second.update()
    assert (first.num_updates, second.num_updates) == (4, 2)


def test_a_counted_optimizer_cannot_be_copied() -> None:
    """A copy would step the original."""
    import copy

    model = Network()
    optimizer = momentum(model)
    averaged = AveragedModel(model, optimizer=optimizer)
    with pytest.raises(TypeError, match="optimizer: received a request to copy or pickle"):
        copy.copy(optimizer.step)
    assert averaged.num_updates == 0


@pytest.mark.skipif(PIR, reason="only Paddle 2.6 traces a step")
def test_a_step_within_a_static_graph_is_refused() -> None:
    problem = Quadratic(3, [[2]])
    whole = WholeStep(problem)
    averaged = AveragedModel(whole.network, optimizer=whole.optimizer)
    numbers = paddle.to_tensor(TrainedNetwork.numbers(problem, 0))
    with pytest.raises(Exception, match="step: received a call within a function that to_static traces whole"):
        paddle.jit.to_static(whole, full_graph=True)(numbers)
    assert averaged.num_updates == 0


# ---- Precision -------------------------------------------------------------------------------------------------------


class Weight(paddle.nn.Layer):
    """One parameter."""

    def __init__(self, dtype: str, value: float = 1.0) -> None:
        super().__init__()
        fill = paddle.nn.initializer.Constant(value)
        self.x = self.create_parameter([5], dtype=dtype, default_initializer=fill)


@pytest.mark.parametrize("decay", [0.999, 0.9999])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_do_not_stall(dtype: str, decay: float) -> None:
    model = Weight(dtype)
    averaged = AveragedModel(model, ema(decay))
    model.x.set_value(paddle.full([5], 2.0, dtype))
    for _ in range(100_000):
        averaged.update()
    (held,) = averaged.state_dict()["averages"].values()
    np.testing.assert_allclose(held.numpy(), 2.0, atol=1e-3)


def test_float64_does_not_stall_above_9999() -> None:
    average, value = paddle.ones([3], "float64"), paddle.full([3], 2.0, "bfloat16")
    update = native.average_update_call([average], [value], ema(0.99999).weight(1), [], [])
    for _ in range(2_000_000):
        update()
    np.testing.assert_allclose(average.numpy(), 2.0, atol=1e-4)
    # As the formula has it, with the rounding errors of that many updates.
    np.testing.assert_allclose(average.numpy(), 2 - 0.99999**2_000_000, atol=1e-10)


def test_float32_that_will_stall_warns_once() -> None:
    model = Weight("float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quiet in (AveragedModel(model, ema(0.9999)), AveragedModel(model, ema(0.99999), dtype="float64")):
            quiet.update()
        AveragedModel(Weight("float64"), ema(0.99999)).update()
    averaged = AveragedModel(model, ema(0.99999))
    with pytest.warns(UserWarning, match=r'AveragedModel: a decay of 0.99999 loses .* dtype="float64"') as caught:
        averaged.update()
    averaged.update()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_average_stays_within_what_it_saw(dtype: str) -> None:
    model, draw = Weight("float32"), np.random.default_rng(2)
    low = high = np.ones(5, "float32")
    averaged = AveragedModel(model, lambda t: float(draw.uniform() ** 3), dtype=dtype)
    for _ in range(2_000):
        value = draw.normal(size=5).astype("float32") * np.float32(10.0 ** draw.integers(-3, 1))
        model.x.set_value(value)
        averaged.update()
        low, high = np.minimum(low, value), np.maximum(high, value)
        found = averaged.averaged_state_dict()["x"].numpy()
        assert (found >= np.nextafter(low, np.float32(-np.inf))).all()
        assert (found <= np.nextafter(high, np.float32(np.inf))).all()


def test_equal_weights_have_themselves_for_an_average() -> None:
    model = Weight("float32", 0.1)
    for averaged in (AveragedModel(model, ema(0.9)), AveragedModel(model, power_ema(0.1)), AveragedModel(model, swa())):
        for _ in range(100):
            averaged.update()
        assert averaged.averaged_state_dict()["x"].numpy().tobytes() == model.x.numpy().tobytes()


# ---- What is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "model": (lambda: {"model": [1]}, TypeError, "model: received [1]", "paddle.nn.Layer"),
    "hapi_model": (lambda: {"model": paddle.Model(Network())}, TypeError, "model: received", "pass model.network"),
    "average": (lambda: {"average": 0.999}, TypeError, "average: received 0.999", "ema(0.999)"),
    "optimizer": (lambda: {"optimizer": "Adam"}, TypeError, "optimizer: received 'Adam'", "paddle.optimizer.Optimizer"),
    "after": (lambda: {"update_after": -1}, ValueError, "update_after: received -1", "at least 0"),
    "every": (lambda: {"update_every": 0}, ValueError, "update_every: received 0", "at least 1"),
    "every_float": (lambda: {"update_every": 2.0}, TypeError, "update_every: received 2.0", "an int"),
    "buffers": (lambda: {"buffers": "both"}, ValueError, "buffers: received 'both'", "'copy' or 'average'"),
    "dtype": (lambda: {"dtype": "float16"}, ValueError, "dtype: received 'float16'", "'float32' or 'float64'"),
    "dtype_of_paddle": (lambda: {"dtype": paddle.float32}, TypeError, "dtype: received"),
    "exclude_name": (lambda: {"exclude": "last.weight"}, TypeError, "exclude: received 'last.weight'", "within a list"),
    "exclude_close": (lambda: {"exclude": ["last.wieght"]}, ValueError, "'last.wieght'", "did you mean 'last.weight'?"),
    "exclude_prefix": (lambda: {"exclude": ["zzz"]}, ValueError, "exclude: received 'zzz'", "a callable can exclude"),
    "exclude_number": (lambda: {"exclude": [1]}, TypeError, "exclude: received 1", "structured names and parameters"),
    "exclude_other": (lambda: {"exclude": [paddle.ones([7])]}, ValueError, "exclude: received", "[7]", "of the model"),
    "exclude_tensor": (lambda: {"exclude": paddle.ones([7])}, TypeError, "exclude: received", "within a list"),
}


@table(REFUSED)
def test_refused_arguments(row: Any) -> None:
    make, error, *pieces = row
    assert_refused(lambda: AveragedModel(**{"model": Network(), **make()}), error, pieces)


@pytest.mark.parametrize("decay", [1.5, -0.1, math.nan, "0.9", None, True])
def test_a_rule_that_gives_no_decay(decay: Any) -> None:
    """Nothing is written, and the update can be made when the rule is mended."""
    answers = [0.5, decay, 0.25]
    model = Network()
    averaged = AveragedModel(model, lambda t: answers[t - 1])
    averaged.update()
    before = arrays(averaged.averaged_state_dict())
    model.last.bias.set_value(paddle.full([2], 9.0))
    with pytest.raises((ValueError, TypeError), match=r"decay of update 2: received .*, expected a number"):
        averaged.update()
    assert averaged.num_updates == 1
    after = arrays(averaged.averaged_state_dict())
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)
    answers[1] = 0.5
    averaged.update()
    assert averaged.num_updates == 2


@pytest.mark.usefixtures("static_mode")
def test_static_graphs_are_refused() -> None:
    with pytest.raises(RuntimeError, match="AveragedModel: received a call in static graph mode"):
        AveragedModel(paddle.nn.ReLU())
