# SPDX-License-Identifier: Apache-2.0
"""AveragedModel: when an update counts, and how exact the average is over many updates; what is refused.

Must not test which tensors there are (test_averaged_tensors.py), swaps (test_averaged_model_swap.py), nor what is saved
(test_averaged_state.py).
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import paddle
import pytest
from averaging import Judge, Network, arrays, batches, train
from test_refusals import assert_refused, table

from paddle_asgd import AveragedModel, ema, native, power_ema, swa


def momentum(model: Any, rate: float = 0.05, **options: Any) -> Any:
    return paddle.optimizer.Momentum(rate, parameters=model.parameters(), **options)


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
    update = partial(native.average_update, [average], [value], ema(0.99999).weight(1), [], [])
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
