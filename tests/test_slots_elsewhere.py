# SPDX-License-Identifier: Apache-2.0
"""batch_index, batch_weights, theta and the norm in static graphs and in checkpoints. In dygraph: test_slots.py."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from problems import Quadratic, StaticRun, bits, state_of
from reference import Sag
from test_slots import DRAWN, METHODS, WEIGHTS
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
def test_static_weights_without_an_index() -> None:
    problem = Quadratic(batches=5)
    build = ASGD(0.1, 5, weight_decay=0.1, batch_weights=WEIGHTS)
    run = StaticRun(problem, lambda loss, params: build.minimize(loss), "float64")
    sag = Sag(problem.start, 5, 0.1, WEIGHTS)
    for step in range(12):
        run.run(step)
        sag.step(problem.gradients(step, sag.x), 0.1)
        for p, name in enumerate(run.names):
            sag.check(p, run.state(name), 1e-13)


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


@pytest.mark.usefixtures("static_mode")
def test_static_theta_of_the_step_is_refused() -> None:
    def build(loss: Any, params: list) -> None:
        with pytest.raises(
            TypeError, match="theta: received a callable, expected a number: in a static graph no Python"
        ):
            ASGD(0.1, 5, theta=lambda step: 1.0).minimize(loss)

    StaticRun(Quadratic(batches=5), build)


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


def test_cyclic_state_goes_on_with_an_index(tmp_path: Path) -> None:
    """Whether the index came before the checkpoint or comes after it."""
    for before in (True, False):
        trial = Trial(n=5)
        for _ in range(3):
            trial.step()
        state = trial.optimizer.state_dict()
        trial.optimizer = ASGD(0.1, 5, trial.params, weight_decay=0.1)
        if before:
            trial.optimizer.batch_index = 4
        trial.optimizer.set_state_dict(state)
        for index in DRAWN:
            trial.step(index=index)


def test_indexed_state_into_an_optimizer_that_has_steps() -> None:
    """Its clocks have another shape and are replaced."""
    trial, other = Trial(n=5), Trial(n=5)
    for index in DRAWN[:4]:
        trial.step(index=index)
    for _ in range(2):
        other.step()
    for source, target in zip(trial.params, other.params):
        target.set_value(source)
    state = {re.sub(r"^\w+_(\d+)", r"\g<0>", key): value for key, value in trial.optimizer.state_dict().items()}
    names = dict(zip((p.name for p in trial.params), (p.name for p in other.params)))
    state = {
        next((key.replace(a, b, 1) for a, b in names.items() if key.startswith(f"{a}_")), key): v
        for key, v in state.items()
    }
    other.optimizer.set_state_dict(state)
    other.sag = trial.sag
    for index in DRAWN[4:]:
        other.step(index=index)


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


def test_a_load_that_fails_late_leaves_the_cycle() -> None:
    """After the checkpoint's clocks were found to know the slots."""
    trial = Trial(n=5)
    trial.step(index=2)
    state = trial.optimizer.state_dict()
    sum_of_last = [key for key in state if "_d_" in key][-1]
    fresh = ASGD(0.1, 5, trial.params)
    with pytest.raises(ValueError, match="entry 'd' of parameter"):
        fresh.set_state_dict({**state, sum_of_last: paddle.zeros([7])})
    fresh.step()


def test_a_clock_of_another_dtype_is_refused() -> None:
    trial = Trial(n=5)
    trial.step()
    state = {k: v.astype("float32") if "_m_" in k else v for k, v in trial.optimizer.state_dict().items()}
    fresh = ASGD(0.1, 5, trial.params)
    fresh.batch_index = 3
    with pytest.raises(ValueError, match="entry 'm' of parameter"):
        fresh.set_state_dict(state)


def test_names_of_state_stay() -> None:
    """An index that begins in the middle puts other tensors in the clocks' place."""
    trial = Trial(n=5, theta=0.3)
    trial.step()
    before = list(trial.optimizer.state_dict())
    trial.step(index=3)
    assert list(trial.optimizer.state_dict()) == before
    assert "theta_step" not in before


@pytest.mark.usefixtures("static_mode")
def test_static_gradient_norm_before_and_with_a_variable() -> None:
    def build(loss: Any, params: list) -> Any:
        decay = paddle.full([1], 0.1, "float32")
        optimizers = [ASGD(0.1, 5), ASGD(0.1, 5, weight_decay=decay)]
        optimizers[0].minimize(loss)
        optimizers[1].apply_gradients([(params[0], paddle.ones(params[0].shape, "float32"))])
        return optimizers

    run = StaticRun(Quadratic(batches=5), build)
    with paddle.static.scope_guard(run.scope):
        assert run.built[0].gradient_norm() == math.inf
        run.run(0)
        assert 0 < run.built[0].gradient_norm() < math.inf
        with pytest.raises(TypeError, match="gradient_norm: received a variable of the graph as weight_decay"):
            run.built[1].gradient_norm()


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_damaged_theta_step_is_refused(step: Any) -> None:
    trial = Trial(n=3, theta=lambda step: 1.0)
    trial.sag.theta = 1.0
    trial.step()
    with pytest.raises(ValueError, match="'theta_step': received"):
        trial.optimizer.set_state_dict({**trial.optimizer.state_dict(), "theta_step": step})
