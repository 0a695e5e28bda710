# SPDX-License-Identifier: Apache-2.0
"""AveragedSGD in static graphs, PIR from Paddle 3 on and the older format on 2.6, and in what to_static traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from averaged_trial import METHOD, averaged_state_of, reference
from problems import PIR, TRAINABLE, Network, Quadratic, StaticRun, bits
from reference import AveragedSgd
from test_averaged_sgd import METHODS
from test_half_precision import parameter, rounded, tensor
from test_static import minimizing

from paddle_asgd import AveragedSGD

static = pytest.mark.usefixtures("static_mode")
methods = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def _wide_scalars() -> Any:
    """The reference's: eta and mu are not rounded to float32."""
    paddle.set_default_dtype("float64")
    yield
    paddle.set_default_dtype("float32")


def kept(optimizer: Any) -> tuple[str, ...]:
    return ("ax", "step", "eta") if "torch_compatible=True" in repr(optimizer) else ("ax", "step")


def making(rate: Any = 0.1, **options: Any) -> Callable[[list], Any]:
    return lambda params: AveragedSGD(rate, **{**METHOD, "weight_decay": 0.1, **options})


def check(run: StaticRun, judge: AveragedSgd, tolerance: float = 1e-13) -> None:
    for p, name in enumerate(run.names):
        judge.check(p, run.state(name, kept=kept(run.built)), tolerance)


@static
@methods
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_state_follows_the_formula(dtype: str, options: dict[str, Any]) -> None:
    problem = Quadratic(batches=3)
    run = StaticRun(problem, minimizing(making(**options)), dtype)
    judge = reference(problem.start, **options)
    for step in range(12):
        run.run(step)
        judge.step(problem.gradients(step, judge.x), 0.1)
        check(run, judge, 1e-13 if dtype == "float64" else 1e-6)


@static
@methods
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_bits_of_dygraph(dtype: str, options: dict[str, Any]) -> None:
    """One function behind both doors: from the same gradients comes the same state, to the last bit.

    The rate is a float32 value, which the variable of a graph may be.
    """

    def build(loss: Any, params: list) -> Any:
        grads = [paddle.static.data(f"g{i}", list(shape), dtype) for i, shape in enumerate(TRAINABLE)]
        optimizer = AveragedSGD(0.125, parameters=params, weight_decay=0.1, **METHOD, **options)
        optimizer.apply_gradients(list(zip(params, grads)))
        return optimizer

    problem = Quadratic(3, TRAINABLE)
    run = StaticRun(problem, build, dtype)
    paddle.disable_static()
    params = problem.parameters(dtype)
    optimizer = AveragedSGD(0.125, parameters=params, weight_decay=0.1, **METHOD, **options)
    for step in range(11):
        grads = problem.gradients(step, [param.numpy() for param in params])
        optimizer.apply_gradients([(p, paddle.to_tensor(g)) for p, g in zip(params, grads)])
        paddle.enable_static()
        run.run(step, more={f"g{i}": g for i, g in enumerate(grads)}, fetch_list=[])
        paddle.disable_static()
        for name, param in zip(run.names, params):
            mine = averaged_state_of(optimizer, param)
            other = run.state(name, kept=kept(optimizer))
            # In a graph the average is there from the first step on: as a copy.
            assert step > METHOD["t0"] or "ax" in mine or other["ax"].tobytes() == other["x"].tobytes()
            assert bits({key: other[key] for key in mine}) == bits(mine)


@static
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shapes", [[[257]]] + [[[0, 3], [257]]] * PIR, ids=["alone", "beside_an_empty_one"][: 1 + PIR])
def test_masters_have_the_bits_of_dygraph(dtype: str, shapes: list) -> None:
    names = [f"x{i}" for i in range(len(shapes))]
    main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
    with paddle.utils.unique_name.guard(), paddle.static.program_guard(main, startup):
        ones = paddle.nn.initializer.Constant(1.0)
        params = [paddle.create_parameter(s, dtype, name, default_initializer=ones) for s, name in zip(shapes, names)]
        fed = [paddle.static.data(f"g{i}", shape, dtype) for i, shape in enumerate(shapes)]
        AveragedSGD(0.125, multi_precision=True, **METHOD).apply_gradients(list(zip(params, fed)))
    paddle.disable_static()
    param = parameter(np.ones(257), dtype)
    optimizer = AveragedSGD(0.125, parameters=[param], multi_precision=True, **METHOD)
    for step in range(8):
        grad = rounded(np.random.default_rng(step).normal(size=257), dtype)
        param.grad = tensor(grad)
        optimizer.step()
        feed = {f"g{i}": grad if 0 not in shape else np.zeros(shape, grad.dtype) for i, shape in enumerate(shapes)}
        paddle.enable_static()
        executor = paddle.static.Executor()
        with paddle.static.scope_guard(scope):
            if step == 0:
                executor.run(startup)
            executor.run(main, feed=feed)
        paddle.disable_static()
        state = averaged_state_of(optimizer, param)
        keys = {"x": names[-1], **{name: f"{names[-1]}_fp32_master_0_{name}_0" for name in ("ax", "step")}}
        assert bits({key: np.array(scope.find_var(keys[key]).get_tensor()) for key in state}) == bits(state)


@static
@methods
def test_learning_rate_scheduler(options: dict[str, Any]) -> None:
    problem = Quadratic(batches=3)
    scheduler = paddle.optimizer.lr.ExponentialDecay(0.1, gamma=0.75)
    run = StaticRun(problem, minimizing(making(scheduler, **options)), "float64")
    judge = reference(problem.start, **options)
    for step in range(8):
        run.run(step)
        judge.step(problem.gradients(step, judge.x), 0.1 * 0.75**step)
        check(run, judge)
        scheduler.step()


@static
@pytest.mark.parametrize("maximize", [False, True])
def test_regularizer_and_clip(maximize: bool) -> None:
    problem = Quadratic(batches=3)
    decay, clip = paddle.regularizer.L2Decay(0.125), paddle.nn.ClipGradByGlobalNorm(5.0)
    run = StaticRun(problem, minimizing(making(weight_decay=decay, grad_clip=clip, maximize=maximize)), "float64")
    judge = reference(problem.start, weight_decay=0.125, maximize=maximize)
    for step in range(8):
        grads = problem.gradients(step, judge.x)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads))
        assert norm > 5
        run.run(step)
        judge.step([g * 5 / norm for g in grads], 0.1)
        check(run, judge, 1e-6)


@static
@pytest.mark.parametrize("compatible", [False, True])
def test_a_step_with_found_inf_changes_nothing(compatible: bool) -> None:
    def build(loss: Any, params: list) -> Any:
        optimizer = making(torch_compatible=compatible)(params)
        optimizer._set_auxiliary_var("found_inf", paddle.static.data("found_inf", [1], "bool"))
        optimizer.minimize(loss)
        return optimizer

    problem = Quadratic(batches=3)
    run = StaticRun(problem, build, "float64")
    judge = reference(problem.start, torch_compatible=compatible)
    for step in range(11):
        skip = step in (0, 4, 5)
        run.run(step, more={"found_inf": np.array([skip])})
        if not skip:
            judge.step(problem.gradients(step, judge.x), 0.1)
        check(run, judge)


@static
def test_save_and_resume(tmp_path: Path) -> None:
    problem = Quadratic(batches=3)
    runs = [StaticRun(problem, minimizing(making()), "float64") for _ in range(2)]
    for step in range(6):
        runs[0].run(step)
    with paddle.static.scope_guard(runs[0].scope):
        paddle.static.save(runs[0].main, str(tmp_path / "model"))
    with paddle.static.scope_guard(runs[1].scope):
        paddle.static.load(runs[1].main, str(tmp_path / "model"), runs[1].executor)
    for step in range(6, 11):
        for run in runs:
            run.run(step)
        for name in runs[0].names:
            assert bits(runs[0].state(name, kept=kept(run.built))) == bits(runs[1].state(name, kept=kept(run.built)))


class WholeStep(paddle.nn.Layer):
    """Paddle 2.6's tracer finds what hangs on self, and not what a function closes over."""

    def __init__(self, problem: Quadratic) -> None:
        super().__init__()
        self.network = Network(problem)
        self.optimizer = AveragedSGD(0.1, parameters=self.network.parameters(), weight_decay=0.1, **METHOD)

    def forward(self, numbers: Any) -> Any:
        loss = self.network(numbers)
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return loss


def test_to_static() -> None:
    """A step within a traced function. Only Paddle 2.6 traces the whole of it, which then has its t0 for good."""
    paddle.set_default_dtype("float32")
    problem = Quadratic(batches=3, shapes=[[3], [2, 2]])
    whole = WholeStep(problem)
    optimizer, params = whole.optimizer, whole.parameters()
    train = paddle.jit.to_static(whole, full_graph=not PIR)
    judge = reference(problem.start)
    for step in range(8):
        train(paddle.to_tensor(Network.numbers(problem, step)))
        judge.step(problem.gradients(step, judge.x), 0.1)
        for p, param in enumerate(params):
            judge.check(p, averaged_state_of(optimizer, param), 1e-6)
    before = [param.numpy() for param in params]
    with optimizer.averaged_parameters():
        for param, average in zip(params, judge.ax):
            np.testing.assert_allclose(param.numpy(), average, rtol=0, atol=1e-6)
    for param, value in zip(params, before):
        np.testing.assert_array_equal(param.numpy(), value)
    if not PIR:
        with pytest.raises(RuntimeError, match="start_averaging: received a call where a static graph holds the step"):
            optimizer.start_averaging()
