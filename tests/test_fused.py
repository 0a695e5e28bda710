# SPDX-License-Identifier: Apache-2.0
"""What else Paddle's own optimizers do: they serve Paddle's wrappers, and show what they are.

Must not test options (test_options.py, test_groups.py), nor the plain ways to a step (test_doors.py)."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import PIR, Network, Quadratic, bits, state_of
from ranks import run_on_ranks
from reference import Sag
from refusing import assert_refused

from paddle_asgd import ASGD

SHAPES = [[257], [], [3, 5]]
STEPS = 8


def leaves() -> list[paddle.Tensor]:
    return Quadratic(3, SHAPES).parameters("float64")


# ---- Wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_dict", [False, True], ids=["list", "group"])
def test_sharding_wrapper(as_dict: bool) -> None:
    """fleet's wrapper leaves the optimizer a part of the parameters and never calls step()."""
    problem = Quadratic(3, SHAPES)
    params = leaves()
    options = [{"learning_rate": r, "weight_decay": w} for r, w in ((0.5, 0.25), (1.0, 0.5), (2.0, 0.125))]
    optimizer = ASGD(0.1, 3, [{"params": [p], **o} for p, o in zip(params, options)])
    mine = params[1:]
    optimizer._parameter_list = mine
    optimizer._param_groups = mine
    sag = Sag(problem.start, 3, weight_decay=[o["weight_decay"] for o in options])
    for step in range(STEPS):
        problem.backward(step, params)
        # It passes None for parameters that got no gradient.
        pairs = [(p, p.grad if step or p is not mine[0] else None) for p in mine]
        group = {"params": pairs, "grad_clip": None, "learning_rate": 1.0}
        optimizer._apply_optimize(loss=None, startup_program=None, params_grads=group if as_dict else pairs)
        optimizer.clear_grad()
        params[0].clear_gradient()
        _, *grads = problem.gradients(step, sag.x)
        sag.step([None, grads[0] if step else None, grads[1]], [0.05, 0.1, 0.2])
    for param, x in zip(params, sag.x):
        np.testing.assert_allclose(param.numpy(), x, rtol=0, atol=1e-13 * np.abs(x).max())
    assert {key for key in optimizer.state_dict() if key.startswith(params[0].name)} == set()


class Batches(paddle.io.Dataset):
    """The problem's batches as hapi wants them, one a sample."""

    def __init__(self, problem: Quadratic) -> None:
        self.numbers = [Network.numbers(problem, step) for step in range(problem.batches)]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple:
        return (self.numbers[index],)


class Squeezed(Network):
    def forward(self, numbers: Any) -> Any:
        return super().forward(numbers[0])


def test_hapi_fit() -> None:
    problem = Quadratic(3, SHAPES)
    networks = [Network(problem), Squeezed(problem)]
    optimizers = [ASGD(0.1, 3, network.parameters(), weight_decay=0.25) for network in networks]
    for step in range(9):
        networks[0](paddle.to_tensor(Network.numbers(problem, step))).backward()
        optimizers[0].step()
        optimizers[0].clear_grad()
    model = paddle.Model(networks[1])
    model.prepare(optimizers[1], loss=lambda output: output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hapi's own loader
        model.fit(Batches(problem), batch_size=1, epochs=3, shuffle=False, verbose=0)
    for p, q in zip(networks[0].parameters(), networks[1].parameters()):
        assert bits(state_of(optimizers[0], p)) == bits(state_of(optimizers[1], q))


@pytest.mark.parametrize("minimize", [False, True], ids=["step", "minimize"])
def test_disabled_grad_scaler(minimize: bool) -> None:
    problem = Quadratic(3, SHAPES)
    scaler = paddle.amp.GradScaler(enable=False)
    contents = []
    for scaled in (False, True):
        network = Network(problem)
        optimizer = ASGD(0.1, 3, network.parameters(), weight_decay=0.25)
        for step in range(STEPS):
            loss = network(paddle.to_tensor(Network.numbers(problem, step)))
            if not scaled:
                loss.backward()
                optimizer.step()
            else:
                loss = scaler.scale(loss)
                loss.backward()
                if minimize:
                    scaler.minimize(optimizer, loss)
                else:
                    scaler.step(optimizer)
                    scaler.update()
            optimizer.clear_grad()
        contents.append([bits(state_of(optimizer, p)) for p in network.parameters()])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("truth", [True, False])
def test_found_inf_is_answered(truth: bool) -> None:
    """GradScaler leaves a tensor and reads the answer from the same place."""
    problem = Quadratic(3, SHAPES)
    params = leaves()
    optimizer = ASGD(0.1, 3, params)
    for step in range(4):
        problem.backward(step, params)
        optimizer.step()
    before = [bits(state_of(optimizer, p)) for p in params]
    optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([truth]))
    optimizer.step()
    assert optimizer._get_auxiliary_var("found_inf") is truth
    assert ([bits(state_of(optimizer, p)) for p in params] == before) is truth


class WholeStep(paddle.nn.Layer):
    """Paddle's tracer finds what hangs on self, and not what a function closes over."""

    def __init__(self, problem: Quadratic) -> None:
        super().__init__()
        self.network = Network(problem)
        self.optimizer = ASGD(0.1, 3, self.network.parameters(), weight_decay=0.25)

    def forward(self, numbers: Any) -> Any:
        loss = self.network(numbers)
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return loss


@pytest.mark.skipif(PIR, reason="Paddle 3 cannot trace a whole step, of any optimizer")
def test_to_static_of_a_whole_step() -> None:
    problem = Quadratic(3, SHAPES)
    contents = []
    for traced in (False, True):
        whole = WholeStep(problem)
        train = paddle.jit.to_static(whole, full_graph=True) if traced else whole
        for step in range(STEPS):
            train(paddle.to_tensor(Network.numbers(problem, step)))
        contents.append([bits(state_of(whole.optimizer, p)) for p in whole.parameters()])
    assert contents[0] == contents[1]


STATIC_STEP = """
import warnings
warnings.simplefilter("ignore")
import paddle
from paddle_asgd import ASGD
param = paddle.to_tensor([1.0, 2.0], stop_gradient=False)
optimizer = ASGD(0.1, 3, [param])
for _ in range({steps}):
    param.square().sum().backward()
    optimizer.step()
paddle.enable_static()
try:
    optimizer.step()
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("steps", [0, 2])
def test_step_in_static_mode(steps: int) -> None:
    """As paddle.optimizer's step: a sentence, and no end of the process."""
    code = STATIC_STEP.format(steps=steps)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]
    assert "step" in done.stdout
    assert "static" in done.stdout.lower() or "dynamic" in done.stdout.lower()


def train_network(rows: slice, wrap: Callable, report: str) -> None:
    """One process of the test below."""
    draw = np.random.default_rng(3)
    network = paddle.nn.Sequential(paddle.nn.Linear(4, 5), paddle.nn.Tanh(), paddle.nn.Linear(5, 1))
    for param in network.parameters():
        param.set_value(draw.normal(size=param.shape).astype("float32"))
    batches = [draw.normal(size=[8, 5]).astype("float32") for _ in range(3)]
    model = wrap(network)
    optimizer = ASGD(0.1, 3, network.parameters(), weight_decay=0.1)
    for step in range(STEPS):
        batch = paddle.to_tensor(batches[step % 3][rows])
        paddle.nn.functional.mse_loss(model(batch[:, :4]), batch[:, 4:]).backward()
        optimizer.step()
        optimizer.clear_grad()
    np.savez(report, *[p.numpy() for p in network.parameters()])


def train_in_parallel(found: dict, folder: Path) -> None:
    paddle.distributed.init_parallel_env()
    rank = paddle.distributed.get_rank()
    train_network(slice(rank * 4, rank * 4 + 4), paddle.DataParallel, f"{folder}/{rank}.npz")


def test_two_processes_over_gloo(tmp_path: Path) -> None:
    """Each half of every batch in a process of its own: the same as one process, but for the order of additions."""
    run_on_ranks("test_fused.train_in_parallel", tmp_path)
    train_network(slice(None), lambda network: network, str(tmp_path / "alone.npz"))
    alone, *others = (np.load(tmp_path / f"{name}.npz") for name in ("alone", 0, 1))
    for key in alone:
        assert np.array_equal(others[0][key], others[1][key])
        np.testing.assert_allclose(others[0][key], alone[key], rtol=0, atol=1e-6 * np.abs(alone[key]).max())


# ---- What users look at ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda o: copy.deepcopy({"optimizer": o})],
    ids=["copy", "deepcopy", "pickle", "deepcopy_inside"],
)
def test_copies_say_what_to_do_instead(duplicate: Callable) -> None:
    optimizer = ASGD(0.1, 3, leaves())
    pieces = ["ASGD", "cannot be copied", "set_state_dict(optimizer.state_dict())"]
    assert_refused(lambda: duplicate(optimizer), TypeError, pieces)


def test_repr() -> None:
    params = leaves()
    optimizer = ASGD(0.125, 3, params)
    assert repr(optimizer) == (
        "ASGD(learning_rate=0.125, batch_num=3, parameters=3, weight_decay=None, grad_clip=None, multi_precision=False)"
    )
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    clip = paddle.nn.ClipGradByNorm(1.0)
    text = repr(ASGD(0.125, 3, groups, weight_decay=0.5, grad_clip=clip, multi_precision=True))
    assert "parameters=3, weight_decay=0.5, grad_clip=ClipGradByNorm, multi_precision=True" in text
    groups[0]["grad_clip"] = None
    assert "grad_clip=ClipGradByNorm" in repr(ASGD(0.125, 3, groups, grad_clip=clip))
    optimizer.set_lr(0.5)
    assert "learning_rate=0.5" in repr(optimizer)


def test_repr_of_a_scheduler_and_of_a_tensor() -> None:
    params = leaves()
    assert "ExponentialDecay" in repr(ASGD(paddle.optimizer.lr.ExponentialDecay(0.1, 0.9), 3, params))
    assert "Tensor" in repr(ASGD(paddle.to_tensor([0.25]), 3, params))
    assert "\n" not in repr(ASGD(paddle.to_tensor([0.25]), 3, params, weight_decay=paddle.to_tensor([0.5])))
