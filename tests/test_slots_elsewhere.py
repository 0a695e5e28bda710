# SPDX-License-Identifier: Apache-2.0
"""batch_index, batch_weights and theta in static graphs and in checkpoints. In dygraph: test_slots.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from problems import DRAWN, WEIGHTS, Quadratic, StaticRun, bits, state_of
from reference import Sag
from test_slots import METHODS
from trial import Trial

from paddle_asgd import ASGD


def fed(shape: Sequence[int] = (1,), **options: Any) -> Any:
    """For StaticRun: an optimizer whose batch index is fed."""

    def build(loss: Any, params: list) -> Any:
        optimizer = ASGD(0.1, 5, weight_decay=0.1, **options)
        optimizer.batch_index = paddle.static.data("batch_index", list(shape), "int64")
        optimizer.minimize(loss)
        assert optimizer.batch_index is None
        return optimizer

    return build


def feed(index: int, shape: Sequence[int] = (1,)) -> dict:
    return {"more": {"batch_index": np.full(shape, index, dtype=np.int64)}}


@METHODS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.usefixtures("static_mode")
def test_static_follows_the_formula(dtype: str, options: dict) -> None:
    problem = Quadratic(batches=5)
    run = StaticRun(problem, fed(**options), dtype)
    sag = Sag(problem.start, 5, 0.1, options.get("batch_weights"), options.get("theta"))
    for index in DRAWN:
        run.run(index, **feed(index))
        sag.step(problem.gradients(index, sag.x), 0.1, index)
        for p, name in enumerate(run.names):
            sag.check(p, run.state(name), 1e-13 if dtype == "float64" else 1e-6)
    with paddle.static.scope_guard(run.scope):
        tolerance = 1e-13 if dtype == "float64" else 1e-6
        assert run.built.gradient_norm() == pytest.approx(sag.gradient_norm(), rel=tolerance)


@pytest.mark.usefixtures("static_mode")
@pytest.mark.parametrize("shape", [(1,), ()], ids=["1d", "0d"])
@pytest.mark.parametrize("index", [-1, 5, 2**62])
def test_static_index_out_of_range(index: int, shape: tuple) -> None:
    """Comes from the run, names n, and changes nothing."""
    run = StaticRun(Quadratic(batches=5), fed(shape), "float64")
    run.run(3, **feed(3, shape))
    before = [bits(run.state(name)) for name in run.names]
    with pytest.raises(ValueError, match=f"batch_index: received {index}, expected 0 to 4, for batch_num is 5"):
        run.run(0, **feed(index, shape))
    assert [bits(run.state(name)) for name in run.names] == before
    run.run(4, **feed(4, shape))


@pytest.mark.usefixtures("static_mode")
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda: 3, TypeError, "batch_index: received 3 in static graph mode, where it would be the same in every run"),
        (
            lambda: paddle.static.data("i", [1], "int32"),
            TypeError,
            r"received a tensor of int32 and shape \[1\]",
        ),
        (
            lambda: paddle.static.data("i", [2], "int64"),
            TypeError,
            r"received a tensor of int64 and shape \[2\]",
        ),
        (lambda: np.int64(7), TypeError, "batch_index: received 7 in static graph mode"),
    ],
    ids=["int", "int32", "two", "numpy"],
)
def test_static_refusals(value: Any, error: type[Exception], message: str) -> None:
    with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        optimizer = ASGD(0.1, 5)
        with pytest.raises(error, match=message):
            optimizer.batch_index = value()


@pytest.mark.usefixtures("static_mode")
def test_static_index_after_minimize() -> None:
    def build(loss: Any, params: list) -> Any:
        optimizer = ASGD(0.1, 5)
        optimizer.minimize(loss)
        index = paddle.static.data("batch_index", [1], "int64")
        with pytest.raises(RuntimeError, match="batch_index: received after minimize"):
            optimizer.batch_index = index
        return optimizer

    run = StaticRun(Quadratic(batches=5), build)
    run.run(0, **feed(0))


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def resumed(trial: Trial, folder: Path, return_numpy: bool = False, **options: Any) -> ASGD:
    """An optimizer of the same parameters that has loaded what the trial's saved."""
    path = str(folder / "state.pdopt")
    paddle.save(trial.optimizer.state_dict(), path)
    optimizer = ASGD(0.1, 5, trial.params, weight_decay=0.1, **options)
    optimizer.set_state_dict(paddle.load(path, return_numpy=return_numpy))
    return optimizer


@pytest.mark.parametrize("return_numpy", [False, True], ids=["tensors", "arrays"])
@pytest.mark.parametrize("stop", [1, 4, 13])
def test_resume_is_exact(tmp_path: Path, stop: int, return_numpy: bool) -> None:
    whole = Trial(n=5, dtype="float32", batch_weights=WEIGHTS)
    trial = Trial(n=5, dtype="float32", batch_weights=WEIGHTS)
    for index in DRAWN:
        whole.step(index=index)
    for index in DRAWN[:stop]:
        trial.step(index=index)
    trial.optimizer = resumed(trial, tmp_path, return_numpy, batch_weights=WEIGHTS)
    trial.problem.backward(0, trial.params)
    with pytest.raises(ValueError, match="batch_index: received none"):
        trial.optimizer.step()
    trial.optimizer.clear_grad()
    for index in DRAWN[stop:]:
        trial.step(index=index)
    for left, right in zip(whole.params, trial.params):
        assert bits(state_of(whole.optimizer, left)) == bits(state_of(trial.optimizer, right))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (1, 4, "a clock m has 4 distinct slots and 3 marks, 0 of them out of range"),
        (2, 0b100111, "a clock m has 3 distinct slots and 4 marks, 1 of them out of range"),
        (2, 0b100110, "a clock m has 3 distinct slots and 3 marks, 1 of them out of range"),
        (0, 2, "a clock m has 2 steps and 3 distinct slots"),
    ],
)
def test_damaged_clocks_are_refused(entry: int, value: int, message: str) -> None:
    trial = Trial(n=5)
    for index in DRAWN[:4]:
        trial.step(index=index)
    state = {key: v.numpy() if hasattr(v, "numpy") else v for key, v in trial.optimizer.state_dict().items()}
    clock = next(key for key in state if "_m_" in key)
    state[clock] = state[clock].copy()
    state[clock][entry] = value
    fresh = ASGD(0.1, 5, trial.params)
    with pytest.raises(ValueError, match=message):
        fresh.set_state_dict(state)
    fresh.step()  # without an index, and so as if nothing had been loaded


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        (WEIGHTS, None, "with batch_weights: some, and the optimizer none"),
        (None, WEIGHTS, "with batch_weights: none, and the optimizer some"),
        (WEIGHTS, [1.0, 2.0, 3.0, 4.0, 5.0], "with batch_weights: others"),
    ],
    ids=["some_none", "none_some", "others"],
)
def test_other_weights_are_refused(saved: Any, own: Any, message: str) -> None:
    """d is a sum with the checkpoint's."""
    trial = Trial(n=5, batch_weights=saved)
    trial.step(index=2)
    optimizer = ASGD(0.1, 5, trial.params, batch_weights=own)
    with pytest.raises(ValueError, match=message):
        optimizer.set_state_dict(trial.optimizer.state_dict())
    optimizer.step()  # without an index: nothing has been loaded
