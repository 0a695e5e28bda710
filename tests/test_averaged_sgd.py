# SPDX-License-Identifier: Apache-2.0
"""AveragedSGD in dygraph: torch's numbers, and the reference for every way to its step.

Static graphs, the context of the averages, checkpoints and refusals have files of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from averaged_trial import METHOD, AveragedTrial, averaged_state_of, reference
from problems import FULL_SHAPES, ON_GPU, PIR, Quadratic, bits
from test_gradients import NONE, embed, values_of
from test_gradients import parameter as table
from test_half_precision import master_of, parameter, rounded, tensor, widened

from paddle_asgd import AveragedSGD

TORCH = json.loads((Path(__file__).parent / "data" / "torch_asgd.json").read_text())
RUNS = {f"{r['name']}, {r['scalars']}{', changing rate' * r['changing']}": r for r in TORCH["runs"]}
GIVEN = TORCH["problem"]

# ---- Beside torch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def default_dtype() -> Any:
    yield paddle.set_default_dtype
    paddle.set_default_dtype("float32")


def follow_torch(run: dict[str, Any], compatible: bool) -> None:
    """Take torch's steps, and compare what it kept."""
    options = {"learning_rate" if name == "lr" else name: value for name, value in run["options"].items()}
    params = [paddle.create_parameter([len(start)], "float64") for start in GIVEN["start"]]
    for param, start in zip(params, GIVEN["start"]):
        param.set_value(np.array(start))
    optimizer = AveragedSGD(parameters=params, torch_compatible=compatible, **options)
    rate, kept = optimizer.get_lr(), {moment["steps"]: moment for moment in run["kept"]}
    for step in range(max(kept)):
        for i, param in enumerate(params):
            a, c = (np.array(GIVEN[kind][step % len(GIVEN[kind])][i]) for kind in "ac")
            param.clear_gradient(False)
            if i != 1 or step not in TORCH["without"]:
                param.grad = paddle.to_tensor(a * param.numpy() - c)
        if run["changing"]:
            optimizer.set_lr(rate * TORCH["factors"][step % len(TORCH["factors"])])
        optimizer.step()
        if step + 1 in kept:
            check_moment(kept[step + 1], optimizer, params, compatible)


def check_moment(moment: dict[str, Any], optimizer: AveragedSGD, params: list, compatible: bool) -> None:
    for param, x, ax in zip(params, moment["x"], moment["ax"]):
        state = averaged_state_of(optimizer, param)
        bound = 1e-15 * max(1, np.abs(x).max())
        np.testing.assert_allclose(state["x"], x, rtol=0, atol=bound)
        if "ax" in state:
            np.testing.assert_allclose(state["ax"], ax, rtol=0, atol=bound)
        else:
            # Torch keeps a copy of the parameter until averaging begins.
            assert ax is None or (not compatible and ax == x)


@pytest.mark.parametrize("name", RUNS)
def test_torch_step_for_step(name: str, default_dtype: Any) -> None:
    """Under a changing rate, too, and with eta and mu in either of torch's default dtypes."""
    default_dtype(RUNS[name]["scalars"])
    follow_torch(RUNS[name], compatible=True)


@pytest.mark.parametrize("name", [n for n, run in RUNS.items() if not run["changing"] and run["scalars"] == "float64"])
def test_torch_under_a_constant_rate(name: str) -> None:
    follow_torch(RUNS[name], compatible=False)


# ---- Beside the reference --------------------------------------------------------------------------------------------

METHODS = {
    "plain": {},
    "maximize": {"maximize": True},
    "compatible": {"torch_compatible": True},
    "compatible maximize": {"torch_compatible": True, "maximize": True},
}
methods = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


@methods
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_state_follows_the_formula(dtype: str, options: dict[str, Any]) -> None:
    trial = AveragedTrial(dtype=dtype, **options)
    for step in range(12):
        trial.step()
        # In the step that t0 + 1 others precede the average begins, as a copy.
        assert trial.averages() == [step > METHOD["t0"] or "torch_compatible" in options] * len(trial.params)


@methods
def test_changing_rate(options: dict[str, Any]) -> None:
    """At once by default, a step late as torch has it."""
    scheduler = paddle.optimizer.lr.ExponentialDecay(0.1, gamma=0.75)
    trial = AveragedTrial(scheduler, **options)
    for _ in range(8):
        trial.step(scheduler.last_lr)
        scheduler.step()


@methods
def test_learning_rate_and_decay_in_tensors(options: dict[str, Any]) -> None:
    trial = AveragedTrial(paddle.full([1], 0.1, "float64"), weight_decay=paddle.full([], 0.1, "float64"), **options)
    trial.reference.weight_decay = 0.1
    for _ in range(8):
        trial.step()


@pytest.mark.parametrize("clipped", [False, True])
@methods
def test_groups(options: dict[str, Any], clipped: bool) -> None:
    """Each with its own decay and multiplier; the clip sees the gradient before all else."""
    clip = {"grad_clip": paddle.nn.ClipGradByGlobalNorm(5.0)} if clipped else {}
    trial = AveragedTrial(
        shapes=FULL_SHAPES,
        groups=lambda p: [
            {"params": p[:2], "weight_decay": 0.2},
            {"params": p[2:], "learning_rate": 0.5},
        ],
        **options,
        **clip,
    )
    rest = len(FULL_SHAPES) - 2
    trial.reference.weight_decay = [0.2] * 2 + [0.1] * rest
    trial.tolerance = 1e-6 if clipped else trial.tolerance  # Paddle's norm
    for _ in range(8):
        grads = trial.gradients()
        norm = np.sqrt(sum(np.sum(g**2) for g in grads))
        assert norm > 5
        trial.step([0.1] * 2 + [0.05] * rest, [g * 5 / norm for g in grads] if clipped else grads)


@pytest.mark.parametrize("maximize", [False, True])
def test_regularizers_shrink_the_weights_whatever_the_direction(maximize: bool) -> None:
    trial = AveragedTrial(weight_decay=paddle.regularizer.L2Decay(0.125), maximize=maximize)
    trial.reference.weight_decay = 0.125
    for _ in range(8):
        trial.step()


def test_minimize_and_a_closure() -> None:
    trial = AveragedTrial()
    for step in range(6):
        loss = trial.problem.backward(step, trial.params)
        grads = trial.gradients()
        if step % 2:
            trial.optimizer.apply_gradients([(param, param.grad) for param in trial.params])
        else:
            assert trial.optimizer.step(lambda loss=loss: loss) == loss
        trial.optimizer.clear_grad()
        trial.reference.step(grads, 0.1)
        trial.steps += 1
        trial.check()


def test_parameters_have_their_own_clocks() -> None:
    """One comes late, and one pauses."""
    trial = AveragedTrial(shapes=[[3], [2, 2], [5]])
    for among in ([0, 2], [0, 2], [0], [0, 1, 2], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]):
        trial.step(among=among)
    assert trial.reference.steps == [10, 7, 8]


def test_a_group_added_later_begins_its_own_average() -> None:
    trial = AveragedTrial(shapes=[[3], [2, 2]], groups=lambda params: params[:1])
    for _ in range(6):
        trial.step(among=[0])
    trial.optimizer.add_param_group({"params": trial.params[1:]})
    for _ in range(8):
        trial.step()
    assert trial.averages() == [True, True]


@pytest.mark.parametrize("compatible", [False, True])
def test_found_inf_changes_nothing(compatible: bool) -> None:
    trial = AveragedTrial(torch_compatible=compatible, shapes=[[3], [2, 2]], dtype="float32")
    for step in range(12):
        trial.optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([step in (0, 4, 5)]))
        if step in (0, 4, 5):
            trial.problem.backward(step, trial.params)
            trial.optimizer.step()
            trial.optimizer.clear_grad()
            trial.check()
        else:
            trial.step()


@pytest.mark.shortcut
@methods
def test_a_plain_step_is_planned(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first, and the one that makes the averages."""
    trial = AveragedTrial(**options)
    in_full, taken = trial.optimizer._step_in_full, []
    monkeypatch.setattr(trial.optimizer, "_step_in_full", lambda: (taken.append(trial.steps), in_full()))
    for _ in range(9):
        trial.step()
    assert taken == ([0] if "torch_compatible" in options else [0, METHOD["t0"] + 1])


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("grad32", [False, True], ids=["grad16", "grad32"])
def test_masters_are_averaged(dtype: str, grad32: bool) -> None:
    problem = Quadratic(batches=3, shapes=[[1291]])
    zero = paddle.nn.initializer.Constant(0.0)
    param = paddle.create_parameter([1291], dtype, default_initializer=zero)  # no plain tensor has a main_grad in 2.6
    param.set_value(tensor(rounded(problem.start[0], dtype)))
    optimizer = AveragedSGD(0.1, parameters=[param], weight_decay=0.1, multi_precision=True, **METHOD)
    judge = reference([widened(param.numpy())])
    for step in range(12):
        (grad,) = problem.gradients(step, judge.x)
        given = grad.astype("float32") if grad32 else rounded(grad, dtype)
        setattr(param, "main_grad" if grad32 else "grad", paddle.to_tensor(given))
        optimizer.step()
        judge.step([given if grad32 else widened(given)], 0.1)
        master = master_of(optimizer, param)
        judge.check(0, {**averaged_state_of(optimizer, param), "x": master}, 1e-6)
        np.testing.assert_array_equal(param.numpy(), rounded(master, dtype))


@pytest.mark.filterwarnings("ignore:.*multi_precision=True keeps:UserWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_without_masters_the_rounded_weights_are_averaged(dtype: str) -> None:
    problem = Quadratic(batches=3, shapes=[[1291]])
    param = parameter(problem.start[0], dtype)
    optimizer = AveragedSGD(0.1, parameters=[param], weight_decay=0.1, **METHOD)
    judge = reference([widened(param.numpy())])
    for step in range(12):
        (grad,) = problem.gradients(step, judge.x)
        param.grad = paddle.to_tensor(rounded(grad, dtype))
        before = judge.ax[0]
        optimizer.step()
        judge.step([widened(rounded(grad, dtype))], 0.1)
        x = widened(param.numpy())
        # A unit in the last place: float32 arithmetic may round to the other side.
        np.testing.assert_allclose(x, judge.x[0], rtol=2.0**-8 if dtype == "bfloat16" else 2.0**-11, atol=1e-7)
        judge.x[0] = x
        mu = 1 / max(1, step - METHOD["t0"])
        judge.ax[0] = x if mu == 1 else before + mu * (x - before)
        judge.check(0, {**averaged_state_of(optimizer, param), "x": x}, 1e-6)


# ---- Sparse gradients ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(ON_GPU, reason="on a GPU, Paddle makes a dense gradient of them before the step")
@pytest.mark.parametrize("kind", ["float32", "regularized"] + ["bfloat16"] * PIR)
@pytest.mark.parametrize("shape", [[11, 5], [700, 3], [4, 1500]], ids=str)
def test_a_sparse_gradient_is_the_dense_one_to_the_bit(shape: list[int], kind: str) -> None:
    decay = {"maximize": True, "weight_decay": paddle.regularizer.L2Decay(0.25)}
    dtype, options = ("float32", decay) if kind == "regularized" else (kind, {})
    height, width = shape
    params = [table(shape, dtype) for _ in range(2)]
    given = {**METHOD, "multi_precision": True, **options}
    optimizers = [AveragedSGD(0.1, parameters=[param], **given) for param in params]
    for step in range(9):
        rows = [[3, 1, 3, 0, 3], NONE, [height - 1], [*range(height - 1, -1, -1), 2]][step % 4]
        for sparse, param, optimizer in zip((True, False), params, optimizers):
            embed(param, rows, values_of(step, rows, width), sparse)
            optimizer.step()
            optimizer.clear_grad()
        states = [bits(averaged_state_of(optimizer, param)) for optimizer, param in zip(optimizers, params)]
        assert states[0] == states[1]
