# SPDX-License-Identifier: Apache-2.0
"""Which slot a step uses and what it weighs: batch_index, batch_weights and theta, in every way to a step of dygraph.

Static graphs and checkpoints are in test_slots_elsewhere.py, the handling of these inputs in test_step_inputs.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest
from problems import DRAWN, EMPTY_IN_MINIMIZE, FULL_SHAPES, WEIGHTS, Quadratic, bits, state_of
from reference import Sag
from trial import Trial

from paddle_asgd import ASGD


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
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ASGD(0.1, 3, [paddle.create_parameter([2], "float32")], **options)
