# SPDX-License-Identifier: Apache-2.0
"""Which slot a step uses and what it weighs: batch_index, batch_weights, theta and the norm, in every way to a step of
dygraph. Static graphs and checkpoints are in test_slots_elsewhere.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest
from problems import EMPTY_IN_MINIMIZE, FULL_SHAPES, Quadratic, bits, state_of
from reference import Sag
from trial import Trial

from paddle_asgd import ASGD

#: Distinct slots grow slowly, some come twice in a row, the last is seen late; more than three passes.
DRAWN = [2, 2, 0, 4, 4, 3, 0, 2, 1, 1, 3, 0, 4, 2, 2, 1, 0, 3]
WEIGHTS = [16.0, 16.0, 16.0, 16.0, 9.0]


def method(**options: Any) -> Any:
    return pytest.param(options, id="_".join(options) or "plain")


METHODS = pytest.mark.parametrize(
    "options",
    [
        method(),
        method(batch_weights=WEIGHTS),
        method(theta=0.3),
        method(theta=1),
        method(batch_weights=WEIGHTS, theta=0.3),
    ],
)


@METHODS
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "cyclic"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_state_follows_the_formula(dtype: str, indexed: bool, options: dict) -> None:
    trial = Trial(n=5, dtype=dtype, watch=False, **options)
    for index in DRAWN:
        trial.step(index=index if indexed else None)


def test_many_slots_and_a_thousand_steps() -> None:
    """The same index sequence in plain NumPy; more slots than fit into one word of marks."""
    n, draw = 130, np.random.default_rng(3)
    trial = Trial(n=n, shapes=[[5], [2, 3]], learning_rate=0.01, batch_weights=draw.uniform(0.5, 1.5, n), watch=False)
    trial.tolerance = 1e-12
    for index in draw.integers(0, n, 1000):
        trial.step(index=int(index), rate=0.01)
    assert all(seen.all() for seen in trial.sag.seen)


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


def test_an_index_in_cyclic_order_changes_nothing() -> None:
    """Down to the bits; so does the same weight for all."""
    trials = [
        Trial(n=3, dtype="float32"),
        Trial(n=3, dtype="float32"),
        Trial(n=3, dtype="float32", batch_weights=[7] * 3),
    ]
    for step in range(11):
        trials[0].step()
        trials[1].step(index=step % 3)
        trials[2].step()
        states = [[bits(state_of(t.optimizer, p)) for p in t.params] for t in trials]
        assert states[0] == states[2]
        for plain, indexed in zip(*states[:2]):
            assert [plain[name] for name in "xdy"] == [indexed[name] for name in "xdy"]


def test_index_begins_in_the_middle() -> None:
    """What a fixed cycle has seen so far stays seen."""
    trial = Trial(n=5)
    for _ in range(3):
        trial.step()
    for index in DRAWN:
        trial.step(index=index)


def test_parameters_with_clocks_of_their_own() -> None:
    """One that some batches do not use has seen fewer of them."""
    trial = Trial(n=5, shapes=FULL_SHAPES, batch_weights=WEIGHTS)
    for step, index in enumerate(DRAWN):
        used = [i for i in range(len(trial.params)) if (step + i) % 3]
        trial.steps = index
        trial.optimizer.batch_index = index
        trial.problem.backward(index, trial.params, among=used)
        trial.optimizer.step()
        trial.optimizer.clear_grad(set_to_zero=False)
        trial.follow([g if i in used else None for i, g in enumerate(trial.gradients())], index=index)


def test_groups_and_a_scheduler() -> None:
    """Two native calls in a step take the same index."""
    problem = Quadratic(batches=5)
    params = problem.parameters("float64")
    scheduler = paddle.optimizer.lr.StepDecay(0.1, step_size=4, gamma=0.5)
    groups = [{"params": params[:2], "learning_rate": 0.5}, {"params": params[2:], "weight_decay": 0.2}]
    optimizer = ASGD(scheduler, 5, groups, weight_decay=0.1, batch_weights=WEIGHTS, theta=0.3)
    decays = [0.1] * 2 + [0.2] * (len(params) - 2)
    sag = Sag(problem.start, 5, weight_decay=decays, weights=WEIGHTS, theta=0.3)
    for index in DRAWN:
        optimizer.batch_index = index
        problem.backward(index, params)
        optimizer.step()
        optimizer.clear_grad()
        sag.step(problem.gradients(index, sag.x), np.array([0.5] * 2 + [1.0] * (len(params) - 2)) * scheduler(), index)
        scheduler.step()
        for p, param in enumerate(params):
            sag.check(p, state_of(optimizer, param), 1e-13)
    assert optimizer.gradient_norm() == pytest.approx(sag.gradient_norm(), rel=1e-13)


@pytest.mark.parametrize("way", ["apply_gradients", "minimize", "_apply_optimize"])
def test_other_ways_to_a_step(way: str) -> None:
    trial = Trial(n=5, batch_weights=WEIGHTS)
    for index in DRAWN:
        trial.steps = index
        trial.optimizer.batch_index = index
        trial.problem.backward(index, trial.params)
        pairs = [(param, param.grad) for param in trial.params]
        if way == "minimize":
            trial.optimizer.minimize(paddle.zeros([]))
        elif way == "apply_gradients":
            trial.optimizer.apply_gradients(pairs)
        else:
            trial.optimizer._apply_optimize(loss=None, startup_program=None, params_grads=pairs)
        trial.optimizer.clear_grad()
        taken = [g if EMPTY_IN_MINIMIZE or way != "minimize" or g.size else None for g in trial.gradients()]
        trial.follow(taken, index=index)


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


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (5, ValueError, "batch_index: received 5, expected 0 to 4, for batch_num is 5"),
        (-1, ValueError, "batch_index: received -1, expected 0 to 4"),
        (2**70, ValueError, f"batch_index: received {2**70}, expected 0 to 4"),
        (True, TypeError, "batch_index: received True of type bool, expected an int"),
        (1.0, TypeError, "batch_index: received 1.0 of type float, expected an int"),
        ("1", TypeError, "batch_index: received '1' of type str, expected an int"),
        (None, TypeError, "batch_index: received None.*, expected an int"),
        (np.array([5]), TypeError, "batch_index: received"),
        (np.array([1, 2]), TypeError, "batch_index: received"),
        (lambda: paddle.to_tensor(5), ValueError, "batch_index: received 5, expected 0 to 4"),
        (
            lambda: paddle.to_tensor([1, 2]),
            TypeError,
            r"batch_index: received a tensor of int64 and shape \[2\], expected an int or a tensor",
        ),
        (
            lambda: paddle.to_tensor(1, dtype="int32"),
            TypeError,
            r"received a tensor of int32 and shape \[\]",
        ),
        (lambda: paddle.to_tensor(1.0), TypeError, r"batch_index: received a tensor of float32 and shape \[\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_indices(value: Any, error: type[Exception], message: str) -> None:
    trial = Trial(n=5)
    with pytest.raises(error, match=message):
        trial.optimizer.batch_index = value() if callable(value) else value
    assert trial.optimizer.batch_index is None
    trial.step()  # and nothing has changed: the slots take turns


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_weights": [1.0, 2.0]}, ValueError, "batch_weights: received 2 numbers, expected 3"),
        ({"batch_weights": [[1.0, 2.0, 3.0]]}, ValueError, "batch_weights: received 1 x 3 numbers"),
        (
            {"batch_weights": [1.0, 0.0, 1.0]},
            ValueError,
            r"batch_weights\[1\]: received 0.0, expected a positive number",
        ),
        ({"batch_weights": [1.0, 2.0, math.nan]}, ValueError, r"batch_weights\[2\]: received nan"),
        ({"batch_weights": [math.inf, 2.0, 1.0]}, ValueError, r"batch_weights\[0\]: received inf"),
        (
            {"batch_weights": 3.0},
            TypeError,
            "batch_weights: received 3.0 of type float, expected a list of 3 positive numbers",
        ),
        ({"batch_weights": "abc"}, TypeError, "batch_weights: received 'abc' of type str"),
        ({"batch_weights": ["a", "b", "c"]}, TypeError, "batch_weights: received"),
        ({"batch_weights": [1e-13, 1.0, 1.0]}, ValueError, "whose smallest is 1e-13 times the largest"),
        ({"batch_weights": [1e308, 1e308, 1e290]}, ValueError, "whose smallest is 1e-18 times the largest"),
        ({"theta": -0.1}, ValueError, "theta: received -0.1, expected a finite number of at least 0"),
        ({"theta": math.nan}, ValueError, "theta: received nan"),
        (
            {"theta": "1"},
            TypeError,
            "theta: received '1' of type str, expected a number, a callable of the step, or None",
        ),
        ({"theta": True}, TypeError, "theta: received True"),
        ({"watch": 1}, TypeError, "watch: received 1 of type int, expected True or False"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ASGD(0.1, 3, [paddle.create_parameter([2], "float32")], **options)


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


def test_gradient_norm_leaves_out_what_is_frozen() -> None:
    """Its gradient in the history never changes again, and a loop that waits for 0 would wait for ever."""
    trial = Trial(n=5, shapes=FULL_SHAPES)
    for index in DRAWN:
        trial.step(index=index)
    for param in trial.params[1:]:
        param.stop_gradient = True
    only = Sag(trial.sag.x[:1], 5, 0.1)
    only.d, only.y, only.m, only.seen = trial.sag.d[:1], trial.sag.y[:1], trial.sag.m[:1], trial.sag.seen[:1]
    assert trial.optimizer.gradient_norm() == pytest.approx(only.gradient_norm(), rel=1e-13)
    for param in trial.params[1:]:
        param.stop_gradient = False
    trial.optimizer._parameter_list = trial.params[:1]  # as wrappers that shard an optimizer do
    assert trial.optimizer.gradient_norm() == pytest.approx(only.gradient_norm(), rel=1e-13)


@pytest.mark.parametrize("indexed", [True, False])
def test_master_weights_switched_off_after_steps(indexed: bool) -> None:
    """The history is found under the name of the master weight, and a first batch index finds the clock there."""
    param = paddle.create_parameter([4], "float16")
    optimizer = ASGD(0.1, 3, [param], multi_precision=True)
    for step in range(6):
        if step == 3:
            optimizer._multi_precision = False
        if step >= 3 and indexed:
            optimizer.batch_index = step % 3
        param.grad = paddle.full([4], 1.0 + step, "float16")
        optimizer.step()
    state = state_of(optimizer, param)
    assert (state["m"][0], state["d"].tolist()) == (6, [15.0] * 4)
    assert optimizer.gradient_norm() == pytest.approx(10.0)


def test_an_index_from_another_mode() -> None:
    """Paddle would end the process."""
    trial = Trial(n=5)
    trial.optimizer.batch_index = 1
    paddle.enable_static()
    with pytest.raises(TypeError, match="batch_index: received 1 of type int, set in another mode than this step's"):
        trial.optimizer._begin_step()


def test_repr_shows_what_is_not_at_its_default() -> None:
    params = [paddle.create_parameter([2], "float32")]
    plain = (
        "ASGD(learning_rate=0.1, batch_num=2, parameters=1, weight_decay=None, grad_clip=None, multi_precision=False"
    )
    assert repr(ASGD(0.1, 2, params)) == f"{plain})"
    given = ASGD(0.1, 2, params, batch_weights=[1, 2], theta=0.5, watch=False)
    assert repr(given) == f"{plain}, batch_weights=2 numbers, theta=0.5, watch=False)"


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


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "cyclic"])
def test_gradient_norm(indexed: bool) -> None:
    trial = Trial(n=5, batch_weights=WEIGHTS)
    assert trial.optimizer.gradient_norm() == math.inf
    for index in DRAWN:
        trial.step(index=index if indexed else None)
        assert trial.optimizer.gradient_norm() == pytest.approx(trial.sag.gradient_norm(), rel=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("masters", [True, False], ids=["masters", "no_masters"])
def test_gradient_norm_of_16_bits(dtype: str, masters: bool, recwarn: Any) -> None:
    param = paddle.to_tensor([1.0, -2.0, 0.5]).astype(dtype)
    param.stop_gradient = False
    optimizer = ASGD(0.1, 3, [param], weight_decay=0.5, multi_precision=masters)
    param.grad = paddle.to_tensor([0.5, 1.0, 0.25]).astype(dtype)
    optimizer.step()
    x = (optimizer._master_weights[param.name] if masters else param).astype("float64").numpy()
    expected = np.linalg.norm(np.array([0.5, 1.0, 0.25]) + 0.5 * x)
    assert optimizer.gradient_norm() == pytest.approx(expected, rel=1e-14)
