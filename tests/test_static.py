# SPDX-License-Identifier: Apache-2.0
"""The optimizer in static graphs: PIR from Paddle 3 on, the older format on 2.6. What holds for any parameters and
gradients is test_asgd.py's."""

from __future__ import annotations

import warnings
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import FULL_SHAPES, TRAINABLE, Quadratic, StaticRun, bits, state_of
from reference import Sag

from paddle_asgd import ASGD

pytestmark = pytest.mark.usefixtures("static_mode")


def minimizing(optimizer: Callable[[list], Any]) -> Callable[[Any, list], Any]:
    """For StaticRun: appends the optimizer that the function makes of the parameters, and keeps it."""

    def build(loss: Any, params: list) -> Any:
        made = optimizer(params)
        with warnings.catch_warnings():
            # Paddle's own optimizers warn here of what no user can help; conftest.py forgives them.
            warnings.filterwarnings("error", ".* do not have 'place' interface")
            made.minimize(loss)
        return made

    return build


def ours(params: list) -> Any:
    return ASGD(0.1, 3, weight_decay=0.1)


def check(run: StaticRun, sag: Sag, tolerance: float = 1e-13) -> None:
    for p, name in enumerate(run.names):
        sag.check(p, run.state(name), tolerance)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_all_state_follows_the_formula(n: int, dtype: str) -> None:
    problem = Quadratic(batches=n)
    run = StaticRun(problem, minimizing(lambda params: ASGD(0.1, n, weight_decay=0.1)), dtype)
    sag = Sag(problem.start, n, weight_decay=0.1)
    for step in range(3 * n + 2):
        (loss,) = run.run(step)
        tolerance = 1e-13 if dtype == "float64" else 1e-6
        # A sum of 8,482 terms of about 1.
        assert loss == pytest.approx(problem.loss(step, sag.x), rel=0, abs=tolerance * 1e4)
        sag.step(problem.gradients(step, sag.x), 0.1)
        check(run, sag, tolerance)


def test_the_losses_of_dygraph() -> None:
    problem = Quadratic(batches=3)
    run = StaticRun(problem, minimizing(ours))
    losses = [run.run(step)[0] for step in range(40)]
    paddle.disable_static()
    params = problem.parameters()
    optimizer = ASGD(0.1, 3, params, weight_decay=0.1)
    for step in range(40):
        assert problem.backward(step, params) == pytest.approx(losses[step], rel=1e-6)
        optimizer.step()
        optimizer.clear_grad()


def given_gradients(shapes: Any, dtype: str, rate: Any) -> StaticRun:
    """A program in which the gradients are fed."""

    def build(loss: Any, params: list) -> Any:
        grads = [paddle.static.data(f"g{i}", list(shape), dtype) for i, shape in enumerate(shapes)]
        with warnings.catch_warnings():
            # Nothing of Paddle's backward pass is here that had to be forgiven.
            warnings.simplefilter("error")
            return ASGD(rate, 3, params, weight_decay=0.1).apply_gradients(list(zip(params, grads)))

    return StaticRun(Quadratic(3, shapes), build, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_bits_of_dygraph(dtype: str) -> None:
    """One function behind both doors: from the same gradients comes the same state, to the last bit."""
    run = given_gradients(TRAINABLE, dtype, 0.1)
    problem = run.problem
    paddle.disable_static()
    params = problem.parameters(dtype)
    optimizer = ASGD(0.1, 3, params, weight_decay=0.1)
    for step in range(11):
        grads = problem.gradients(step, [param.numpy() for param in params])
        optimizer.apply_gradients([(p, paddle.to_tensor(g)) for p, g in zip(params, grads)])
        paddle.enable_static()
        run.run(step, more={f"g{i}": g for i, g in enumerate(grads)}, fetch_list=[])
        paddle.disable_static()
        for name, param in zip(run.names, params):
            assert bits(run.state(name)) == bits(state_of(optimizer, param))


def test_learning_rate_scheduler() -> None:
    problem = Quadratic(batches=3)
    scheduler = paddle.optimizer.lr.ExponentialDecay(0.1, gamma=0.75)
    run = StaticRun(problem, minimizing(lambda params: ASGD(scheduler, 3, weight_decay=0.1)), "float64")
    sag = Sag(problem.start, 3, weight_decay=0.1)
    for step in range(11):
        run.run(step)
        sag.step(problem.gradients(step, sag.x), 0.1 * 0.75**step)
        check(run, sag)
        scheduler.step()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [[], [1]], ids=["0d", "1"])
def test_learning_rate_and_weight_decay_as_variables(shape: list, dtype: str) -> None:
    def optimizer(params: list) -> Any:
        rate, decay = (paddle.static.data(name, shape, dtype) for name in ("rate", "decay"))
        return ASGD(rate, 3, weight_decay=decay)

    problem = Quadratic(batches=3)
    run = StaticRun(problem, minimizing(optimizer), "float64")
    sag = Sag(problem.start, 3)
    for step in range(11):
        rate, decay = np.full(shape, 0.1 / (step + 1), dtype), np.full(shape, 0.01 * (step + 1), dtype)
        run.run(step, more={"rate": rate, "decay": decay})
        sag.weight_decay = decay.item()
        sag.step(problem.gradients(step, sag.x), rate.item())
        check(run, sag)


def clipped(grads: list) -> list:
    norm = np.sqrt(sum(np.sum(g**2) for g in grads))
    assert norm > 5
    return [g * 5 / norm for g in grads]


def test_global_norm_clipping() -> None:
    problem = Quadratic(batches=3)
    clip = paddle.nn.ClipGradByGlobalNorm(5.0)
    run = StaticRun(problem, minimizing(lambda params: ASGD(0.1, 3, weight_decay=0.1, grad_clip=clip)))
    sag = Sag(problem.start, 3, weight_decay=0.1)
    for step in range(11):
        run.run(step)
        sag.step(clipped(problem.gradients(step, sag.x)), 0.1)
        check(run, sag, 1e-6)


def test_l2_decay_enters_the_history() -> None:
    problem = Quadratic(batches=3)
    decay = paddle.regularizer.L2Decay(0.125)
    run = StaticRun(problem, minimizing(lambda params: ASGD(0.1, 3, weight_decay=decay)), "float64")
    sag = Sag(problem.start, 3)
    for step in range(11):
        run.run(step)
        sag.step([g + 0.125 * x for g, x in zip(problem.gradients(step, sag.x), sag.x)], 0.1)
        check(run, sag)


def test_parameter_groups() -> None:
    """Each with its own weight decay, multiplier of the learning rate, and clip."""

    def optimizer(params: list) -> Any:
        clip = paddle.nn.ClipGradByGlobalNorm(5.0)
        groups = [
            {"params": params[:2], "weight_decay": 0.2, "grad_clip": clip},
            {"params": params[2:], "learning_rate": 0.5},
        ]
        return ASGD(0.1, 3, groups, weight_decay=0.1)

    problem = Quadratic(batches=3, shapes=FULL_SHAPES)
    run = StaticRun(problem, minimizing(optimizer))
    rest = len(FULL_SHAPES) - 2
    sag = Sag(problem.start, 3, weight_decay=[0.2] * 2 + [0.1] * rest)
    for step in range(11):
        run.run(step)
        grads = problem.gradients(step, sag.x)
        sag.step(clipped(grads[:2]) + grads[2:], [0.1] * 2 + [0.05] * rest)
        check(run, sag, 1e-6)


def test_two_optimizers_in_one_program() -> None:
    def build(loss: Any, params: list) -> None:
        first, second = ASGD(0.1, 3, params, weight_decay=0.1), ASGD(0.05, 2, params, weight_decay=0.2)
        pairs = sorted(first.backward(loss), key=lambda pair: pair[0].name)
        first.apply_gradients(pairs[:2])
        second.apply_gradients(pairs[2:])

    problem = Quadratic(batches=3)
    run = StaticRun(problem, build, "float64")
    sags = [Sag(problem.start[:2], 3, weight_decay=0.1), Sag(problem.start[2:], 2, weight_decay=0.2)]
    for step in range(11):
        run.run(step)
        sags[0].step(problem.gradients(step, sags[0].x), 0.1)
        grads = problem.gradients(step, [*sags[0].x, *sags[1].x])[2:]
        sags[1].step(grads, 0.05)
        for p, name in enumerate(run.names):
            sags[p >= 2].check(p - 2 * (p >= 2), run.state(name), 1e-13)


def test_a_step_with_found_inf_changes_nothing() -> None:
    def build(loss: Any, params: list) -> None:
        optimizer = ours(params)
        optimizer._set_auxiliary_var("found_inf", paddle.static.data("found_inf", [1], "bool"))
        optimizer.minimize(loss)

    problem = Quadratic(batches=3)
    run = StaticRun(problem, build, "float64")
    sag = Sag(problem.start, 3, weight_decay=0.1)
    for step in range(11):
        skip = step in (0, 4, 5)
        before = [bits(run.state(name)) for name in run.names]
        run.run(step, more={"found_inf": np.array([skip])})
        if skip:
            assert [bits(run.state(name)) for name in run.names] == before
        else:
            sag.step(problem.gradients(step, sag.x), 0.1)
        check(run, sag)
