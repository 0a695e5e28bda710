# SPDX-License-Identifier: Apache-2.0
"""WeightAveraging under paddle.Model: what is counted, evaluated, predicted and saved, and what an error leaves behind.

Must not test the average itself (test_averaged_model.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from averaging import bits
from test_callback import Data

from paddle_asgd import AveragedModel, WeightAveraging, ema

# Model.fit of Paddle warns of its own copy of the labels.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
WEIGHTS = "_average.pdparams"


def network() -> Any:
    return paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.BatchNorm1D(4), paddle.nn.Linear(4, 1))


def prepared(kind: str = "Momentum") -> paddle.Model:
    paddle.seed(4)
    model = paddle.Model(network())
    optimizer = getattr(paddle.optimizer, kind)(0.05, parameters=model.parameters())
    model.prepare(optimizer, paddle.nn.MSELoss())
    return model


def fit(model: paddle.Model, callbacks: Sequence[Any], epochs: int = 2, **options: Any) -> None:
    options = {"batch_size": 4, "verbose": 0, "shuffle": False, **options}
    model.fit(Data(16), epochs=epochs, callbacks=list(callbacks), **options)


def score(model: paddle.Model, *callbacks: Any) -> float:
    return model.evaluate(Data(16), batch_size=16, verbose=0, callbacks=list(callbacks))["loss"][0]


def average_of(callback: WeightAveraging) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in callback.averaged_model.averaged_state_dict().items()}


class Spy(paddle.callbacks.Callback):
    """Sees the model's bits at every event."""

    def __init__(self, watched: WeightAveraging) -> None:
        super().__init__()
        self.watched, self.seen = watched, []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *arguments: self.note(name, arguments[-1])
        return super().__getattribute__(name)

    def note(self, name: str, logs: Any) -> None:
        raw = bits(self.model.network)
        average = self.watched.averaged_model and average_of(self.watched)
        self.seen.append((name, raw == average, (logs or {}).get("loss")))

    def at(self, name: str) -> list[bool]:
        return [average for event, average, _ in self.seen if event == name]


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_updates_follow_steps(accumulated: int) -> None:
    """As by hand, with the same bits."""
    model, callback = prepared(), WeightAveraging(ema(0.7))
    fit(model, [callback], accumulate_grad_batches=accumulated)
    twin = prepared()
    averaged, data = AveragedModel(twin.network, ema(0.7)), Data(16)
    for _ in range(2):
        for batch in range(4):
            x, y = (paddle.to_tensor(v[4 * batch : 4 * batch + 4]) for v in (data.x, data.y))
            paddle.nn.functional.mse_loss(twin.network(x), y).backward()
            if (batch + 1) % accumulated == 0 or batch == 3:
                twin._optimizer.step()
                twin._optimizer.clear_grad()
                averaged.update()
    assert callback.averaged_model.num_updates == averaged.num_updates == 2 * -(-4 // accumulated)
    assert average_of(callback) == {name: t.numpy().tobytes() for name, t in averaged.averaged_state_dict().items()}
    assert bits(model.network) == bits(twin.network)


def test_a_second_fit_goes_on_and_another_model_begins() -> None:
    model, callback = prepared(), WeightAveraging(ema(0.7), update_every=2)
    fit(model, [callback], 1)
    first = callback.averaged_model
    fit(model, [callback], 1)
    assert callback.averaged_model is first
    assert first.num_updates == 4
    fit(prepared(), [callback], 1)
    assert callback.averaged_model is not first
    assert callback.averaged_model.num_updates == 2


# ---- Evaluation and prediction ---------------------------------------------------------------------------------------


def test_when_the_average_is_in_the_model() -> None:
    model, callback = prepared(), WeightAveraging(ema(0.7))
    spies = [Spy(callback), Spy(callback)]
    fit(model, [spies[0], callback, spies[1]], eval_data=Data(16))
    for spy in spies:
        assert spy.at("on_eval_batch_end") == [True] * 8
        assert spy.at("on_eval_end") == [True] * 2
        for event in ("on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_epoch_end", "on_train_end"):
            # Where training begins, the average is the weights.
            assert not any(spy.at(event)[event.endswith("begin") :]), event
    assert vars(model).keys().isdisjoint({"save", "_run_one_epoch"})
    raw, with_average = score(model), score(model, callback)
    assert raw != with_average
    assert not set(bits(model.network).values()) <= set(average_of(callback).values())
    callback.averaged_model.copy_to(model.network)
    assert score(model) == with_average
    assert vars(model).keys().isdisjoint({"save", "_run_one_epoch"})


def test_prediction() -> None:
    model, callback = prepared(), WeightAveraging(ema(0.7))
    fit(model, [callback])
    before, x = bits(model.network), [Data(16).x]
    x = paddle.io.TensorDataset([paddle.to_tensor(x[0])])
    (found,) = model.predict(x, batch_size=16, verbose=0, callbacks=[callback])
    assert bits(model.network) == before
    (raw,) = model.predict(x, batch_size=16, verbose=0)
    callback.averaged_model.copy_to(model.network)
    (expected,) = model.predict(x, batch_size=16, verbose=0)
    np.testing.assert_array_equal(found[0], expected[0])
    assert not np.array_equal(found[0], raw[0])


def test_before_the_first_update_the_weights_are_evaluated() -> None:
    model, callback = prepared(), WeightAveraging(ema(0.7), update_after=100)
    fit(model, [callback], eval_data=Data(16))
    assert score(model, callback) == score(model)


@pytest.mark.parametrize("order", ["before", "after"])
def test_early_stopping_saves_what_it_scored(order: str, tmp_path: Path) -> None:
    callback = WeightAveraging(ema(0.7))
    stopping = paddle.callbacks.EarlyStopping("loss", patience=9, verbose=0)
    spy = Spy(callback)
    fit(
        prepared(),
        [stopping, callback, spy] if order == "before" else [callback, stopping, spy],
        4,
        eval_data=Data(16),
        batch_size=[4, 16],
        save_dir=str(tmp_path),
        verbose=0,
    )
    losses = [logs[0] for event, _, logs in spy.seen if event == "on_eval_end"]
    best = paddle.Model(network())
    best.prepare(None, paddle.nn.MSELoss())
    best.load(str(tmp_path / "best_model"), reset_optimizer=True)
    assert score(best) == min(losses) == stopping.best_value


# ---- Errors ----------------------------------------------------------------------------------------------------------


class Failing(paddle.callbacks.Callback):
    """Raises at an event, once."""

    def __init__(self, event: str, error: type) -> None:
        super().__init__()
        self.count = 0
        setattr(self, event, self.fail)
        self.error = error

    def fail(self, *arguments: Any) -> None:
        self.count += 1
        if self.count == 1:
            raise self.error


def content(model: paddle.Model) -> tuple:
    momentum = [t.numpy().tobytes() for t in model._optimizer.state_dict().values()]
    return bits(model.network), momentum, [layer.training for layer in model.network.sublayers()]


def evaluated(model: paddle.Model, *callbacks: Any) -> None:
    score(model, *callbacks)


def trained(model: paddle.Model, *callbacks: Any) -> None:
    fit(model, callbacks, 1, eval_data=Data(16))


EVENTS = ["on_eval_begin", "on_eval_batch_begin", "on_eval_batch_end", "on_eval_end"]


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("act", [evaluated, trained], ids=lambda act: act.__name__)
def test_an_error_in_an_evaluation(act: Callable, event: str, error: type) -> None:
    """Then fit goes on as if there had been no evaluation."""
    model, callback = prepared(), WeightAveraging(ema(0.7))
    fit(model, [callback], 1)
    # Without the error: content after what precedes the evaluation, and after one epoch more.
    twin, other = prepared(), WeightAveraging(ema(0.7))
    fit(twin, [other], 1 if act is evaluated else 2)
    with pytest.raises(error):
        act(model, callback, Failing(event, error))
    if event.startswith("on_eval_batch"):
        assert bits(model.network) == bits(twin.network)  # at once
        assert vars(model).keys().isdisjoint({"save", "_run_one_epoch"})
    fit(model, [callback], 1)
    fit(twin, [other], 1)
    assert content(model) == content(twin)
    assert average_of(callback) == average_of(other)
    assert callback.averaged_model.num_updates == other.averaged_model.num_updates
    assert vars(model).keys().isdisjoint({"save", "_run_one_epoch"})


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"average: received 0\.999"):
        WeightAveraging(0.999)
    with pytest.raises(TypeError, match="options: received optimizer=None"):
        WeightAveraging(ema(0.9), optimizer=None)
    with pytest.raises(ValueError, match="update_every: received 0"):
        fit(prepared(), [WeightAveraging(update_every=0)])
    for caller in ("evaluate", "predict"):
        with pytest.raises(RuntimeError, match=f"WeightAveraging: received a call of {caller} before fit"):
            getattr(prepared(), caller)(Data(16), verbose=0, callbacks=[WeightAveraging()])


@pytest.mark.usefixtures("static_mode")
def test_static_graphs_are_refused() -> None:
    with pytest.raises(RuntimeError, match="static graph mode, expected dygraph"):
        WeightAveraging().on_train_begin()


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_beside_the_weights(tmp_path: Path) -> None:
    model, callback = prepared(), WeightAveraging(ema(0.7))
    fit(model, [callback], 2, save_dir=str(tmp_path), verbose=0)
    names = {path.name for path in tmp_path.iterdir()}
    endings = (".pdparams", ".pdopt", WEIGHTS, ".pdaverage")
    assert names == {f"{name}{ending}" for name in ("0", "1", "final") for ending in endings}
    assert {k: t.numpy().tobytes() for k, t in paddle.load(str(tmp_path / f"final{WEIGHTS}")).items()} == average_of(
        callback
    )
    assert bits(model.network) == {
        k: t.numpy().tobytes() for k, t in paddle.load(str(tmp_path / "final.pdparams")).items()
    }
    other = paddle.Model(network())
    other.prepare(None, paddle.nn.MSELoss())
    other.load(str(tmp_path / "final_average"))
    assert score(other) == score(model, callback)


def test_resumed_from_a_save(tmp_path: Path) -> None:
    rule = ema(0.9, warmup="inverse")
    whole, expected = prepared("SGD"), WeightAveraging(rule)
    fit(whole, [expected], 1, save_dir=str(tmp_path), verbose=0)
    fit(whole, [expected], 1)
    model, callback = prepared("SGD"), WeightAveraging(rule)
    model.load(str(tmp_path / "0"))
    callback.load(str(tmp_path / "0"))
    fit(model, [callback], 1)
    assert callback.averaged_model.num_updates == 8
    assert average_of(callback) == average_of(expected)
    callback.load(str(tmp_path / "0"))
    assert callback.averaged_model.num_updates == 4
    other = WeightAveraging(ema(0.5))
    other.load(str(tmp_path / "0"))
    with pytest.raises(ValueError, match="rule is"):
        fit(model, [other], 1)
