# SPDX-License-Identifier: Apache-2.0
"""What a step takes besides tensors: a batch index, weights, theta; when each is taken, kept, refused or forgotten.

Which slot a step uses and what it computes is tested in test_slots.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from problems import DRAWN, WEIGHTS, Quadratic, StaticRun, bits, state_of
from reference import Sag
from trial import Trial

from paddle_asgd import ASGD


@pytest.mark.parametrize(
    "kind",
    [int, np.int64, lambda i: paddle.to_tensor(i), lambda i: paddle.to_tensor([i])],
    ids=["int", "numpy", "0d", "1d"],
)
def test_kinds_of_index(kind: Any) -> None:
    trial = Trial(n=5)
    for index in DRAWN[:7]:
        trial.optimizer.batch_index = kind(index)
        assert trial.optimizer.batch_index == index
        trial.steps = index
        trial.problem.backward(index, trial.params)
        trial.optimizer.step()
        trial.optimizer.clear_grad()
        trial.follow(trial.gradients(), index=index)
        assert trial.optimizer.batch_index is None


def test_index_begins_in_the_middle() -> None:
    """What a fixed cycle has seen so far stays seen."""
    trial = Trial(n=5)
    for _ in range(3):
        trial.step()
    for index in DRAWN:
        trial.step(index=index)


@pytest.mark.parametrize("shortcut", [True, False], ids=["after_steps", "at_first"])
def test_a_step_without_an_index(shortcut: bool) -> None:
    """Once used, it is needed: by the shortcut and by the full way alike. Nothing changes."""
    trial = Trial(n=5)
    for index in DRAWN[: 3 if shortcut else 1]:
        trial.step(index=index)
    before = [bits(state_of(trial.optimizer, param)) for param in trial.params]
    trial.problem.backward(0, trial.params)
    with pytest.raises(ValueError, match="batch_index: received none for this step, expected 0 to 4"):
        trial.optimizer.step()
    assert [bits(state_of(trial.optimizer, param)) for param in trial.params] == before


def test_a_step_that_was_refused_keeps_its_index() -> None:
    trial = Trial(n=3, shapes=[[4]])
    trial.step(index=2)
    trial.optimizer.batch_index = 1
    trial.params[0].grad = paddle.zeros([4], "float64").cast("float64")
    trial.optimizer.set_lr(0.1)
    trial.params[0].optimize_attr = {"learning_rate": -1.0}
    with pytest.raises(ValueError, match="learning_rate of parameter"):
        trial.optimizer.step()
    assert trial.optimizer.batch_index == 1


def test_an_inf_changes_nothing() -> None:
    """But takes the index: the step is over."""
    trial = Trial(n=5)
    trial.step(index=1)
    before = [bits(state_of(trial.optimizer, param)) for param in trial.params]
    trial.optimizer._set_auxiliary_var("found_inf", paddle.to_tensor(True))
    trial.optimizer.batch_index = 3
    trial.problem.backward(3, trial.params)
    trial.optimizer.step()
    trial.optimizer.clear_grad()
    assert [bits(state_of(trial.optimizer, param)) for param in trial.params] == before
    assert trial.optimizer.batch_index is None
    trial.optimizer._set_auxiliary_var("found_inf", paddle.to_tensor(False))
    trial.step(index=3)


def test_an_index_from_another_mode() -> None:
    """Paddle would end the process."""
    trial = Trial(n=5)
    trial.optimizer.batch_index = 1
    paddle.enable_static()
    with pytest.raises(TypeError, match="batch_index: received 1 of type int, set in another mode than this step's"):
        trial.optimizer._begin_step()


@pytest.mark.parametrize("kind", [list, tuple, np.array, paddle.to_tensor], ids=["list", "tuple", "numpy", "tensor"])
def test_kinds_of_weights(kind: Any) -> None:
    trial = Trial(n=5, batch_weights=WEIGHTS)
    trial.optimizer = ASGD(0.1, 5, trial.params, weight_decay=0.1, batch_weights=kind(WEIGHTS))
    for index in DRAWN:
        trial.step(index=index)


def test_groups_that_a_wrapper_brings_one_by_one() -> None:
    """The last of them ends the step; with a flat list as its only group, each does."""
    trial = Trial(n=5)
    optimizer = trial.optimizer
    for flat in (False, True):
        for index in DRAWN[:4]:
            trial.steps = index
            optimizer.batch_index = index
            trial.problem.backward(index, trial.params)
            pairs = [(param, param.grad) for param in trial.params]
            groups = [pairs] if flat else [pairs[:2], pairs[2:]]
            optimizer._param_groups = trial.params if flat else [{"params": group} for group in groups]
            for number, group in enumerate(groups):
                assert optimizer.batch_index == index
                optimizer._apply_optimize(None, None, {"params": group}, param_group_idx=number)
            assert optimizer.batch_index is None
            optimizer.clear_grad()
            trial.follow(trial.gradients(), index=index)


def test_theta_of_the_step() -> None:
    """A callable is given the number of steps taken before; a checkpoint carries it."""
    asked = []

    def theta(step: int) -> float:
        asked.append(step)
        return 1 / (step + 1)

    trial = Trial(n=5, theta=theta)
    for step, index in enumerate(DRAWN):
        trial.sag.theta = 1 / (step + 1)
        trial.step(index=index)
    assert asked == list(range(len(DRAWN)))
    state = trial.optimizer.state_dict()
    assert state["theta_step"] == len(DRAWN)
    again = ASGD(0.1, 5, trial.params, weight_decay=0.1, theta=theta)
    again.set_state_dict(state)
    again.batch_index = 3
    trial.problem.backward(3, trial.params)
    again.step()
    assert asked[-1] == len(DRAWN)


def test_theta_that_is_no_number() -> None:
    trial = Trial(n=3, theta=lambda step: -1.0)
    trial.problem.backward(0, trial.params)
    with pytest.raises(ValueError, match=r"theta of step 0: received -1\.0, expected a finite"):
        trial.optimizer.step()
    assert len(state_of(trial.optimizer, trial.params[0])) == 1


def test_repr_shows_what_is_not_at_its_default() -> None:
    params = [paddle.create_parameter([2], "float32")]
    plain = (
        "ASGD(learning_rate=0.1, batch_num=2, parameters=1, weight_decay=None, grad_clip=None, multi_precision=False"
    )
    assert repr(ASGD(0.1, 2, params)) == f"{plain})"
    given = ASGD(0.1, 2, params, batch_weights=[1, 2], theta=0.5, watch=False)
    assert repr(given) == f"{plain}, batch_weights=2 numbers, theta=0.5, watch=False)"


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
def test_static_theta_of_the_step_is_refused() -> None:
    def build(loss: Any, params: list) -> None:
        with pytest.raises(
            TypeError, match="theta: received a callable, expected a number: in a static graph no Python"
        ):
            ASGD(0.1, 5, theta=lambda step: 1.0).minimize(loss)

    StaticRun(Quadratic(batches=5), build)


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"watch": 1}, TypeError, "watch: received 1 of type int, expected True or False"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ASGD(0.1, 3, [paddle.create_parameter([2], "float32")], **options)
