# SPDX-License-Identifier: Apache-2.0
"""The averages of AveragedSGD in the parameters, put there and taken out again, and when averaging begins.

What the averages are is judged in test_averaged_sgd.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
import pytest
from averaged_trial import METHOD, AveragedTrial, averaged_state_of
from refusing import assert_refused
from test_half_precision import master_of, parameter, rounded, widened

from paddle_asgd import AveragedSGD

SHAPES = [[3], [], [2, 2]]


def begun(**options: Any) -> AveragedTrial:
    trial = AveragedTrial(shapes=options.pop("shapes", SHAPES), **options)
    for _ in range(9):
        trial.step()
    return trial


def values(params: list) -> list[bytes]:
    return [param.numpy().tobytes() for param in params]


@pytest.mark.parametrize("compatible", [False, True])
def test_swapped_in_and_out(compatible: bool) -> None:
    trial = begun(torch_compatible=compatible)
    before = values(trial.params)
    averages = [averaged_state_of(trial.optimizer, param)["ax"].tobytes() for param in trial.params]
    with trial.optimizer.averaged_parameters():
        assert values(trial.params) == averages != before
        assert not any(param.stop_gradient for param in trial.params)
    assert values(trial.params) == before
    trial.step()  # goes on as if nothing had been


def closed_generator(optimizer: AveragedSGD) -> None:
    def evaluate() -> Iterator[None]:
        with optimizer.averaged_parameters():
            yield

    generator = evaluate()
    next(generator)
    generator.close()


def raising(error: type[BaseException]) -> Any:
    def leave(optimizer: AveragedSGD) -> None:
        with pytest.raises(error), optimizer.averaged_parameters():
            raise error

    return leave


WAYS = {
    "exception": raising(ArithmeticError),
    "interrupt": raising(KeyboardInterrupt),
    "exit": raising(SystemExit),
    "closed generator": closed_generator,
}


@pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS)
def test_restored_on_every_way_out(leave: Any) -> None:
    trial = begun()
    before = values(trial.params)
    leave(trial.optimizer)
    assert values(trial.params) == before
    trial.step()


def test_an_interrupt_between_swap_and_body() -> None:
    """The context is entered, but ``with`` never gets to know: what lies about is collected."""
    trial = begun()
    before = values(trial.params)
    context = trial.optimizer.averaged_parameters()
    context.__enter__()
    assert values(trial.params) != before
    del context
    assert values(trial.params) == before
    trial.step()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore:.*multi_precision=True keeps:UserWarning")
@pytest.mark.parametrize("masters", [False, True])
def test_16_bits_come_back_bit_for_bit(dtype: str, masters: bool) -> None:
    param = parameter(np.random.default_rng(2).normal(size=257), dtype)
    optimizer = AveragedSGD(0.1, parameters=[param], multi_precision=masters, **METHOD)
    for _ in range(9):
        param.grad = paddle.to_tensor(rounded(widened(param.numpy()) * 0.7, dtype))
        optimizer.step()
    before = values([param]), masters and master_of(optimizer, param).tobytes()
    average = averaged_state_of(optimizer, param)["ax"]
    with optimizer.averaged_parameters():
        np.testing.assert_array_equal(param.numpy(), rounded(average, dtype))
        assert values([param]) != before[0]
        assert (masters and master_of(optimizer, param).tobytes()) == before[1]
    assert (values([param]), masters and master_of(optimizer, param).tobytes()) == before


def test_a_parameter_without_a_gradient_keeps_its_value() -> None:
    trial = AveragedTrial(shapes=[[3], [2, 2]])
    for _ in range(9):
        trial.step(among=[0])
    before = values(trial.params)
    with trial.optimizer.averaged_parameters():
        within = values(trial.params)
    assert within[1] == before[1]
    assert within[0] != before[0]


@pytest.mark.parametrize("compatible", [False, True])
def test_when_averaging_begins(compatible: bool) -> None:
    trial = AveragedTrial(torch_compatible=compatible)
    for step in range(8):
        assert trial.optimizer.has_averages is (step >= METHOD["t0"] + 2)
        trial.step()


def test_start_averaging_sets_t0_to_now() -> None:
    """By each parameter's own clock, and those that come later begin at once."""
    trial = AveragedTrial(t0=1e6, shapes=[[3], [2, 2], [5]])
    trial.reference.t0 = [1e6] * 3
    for step in range(6):
        trial.step(among=[0] if step < 2 else [0, 1])
    assert trial.averages() == [False] * 3
    trial.optimizer.start_averaging()
    trial.reference.start_averaging()
    assert not trial.optimizer.has_averages
    for step in range(6):
        trial.step(among=[0, 1] if step < 3 else None)
        assert trial.optimizer.has_averages is (step >= 1)
    assert trial.averages() == [True] * 3
    trial.optimizer.start_averaging()  # begins anew
    trial.reference.start_averaging()
    assert not trial.optimizer.has_averages
    for _ in range(4):
        trial.step()
    assert trial.optimizer.has_averages


def test_no_memory_before_averaging_begins() -> None:
    """Nor after a step that was refused."""
    trial = AveragedTrial(shapes=[[3], [2, 2]])
    for _ in range(METHOD["t0"] + 1):
        trial.step()
    assert trial.averages() == [False, False]
    trial.problem.backward(trial.steps, trial.params)
    trial.optimizer._learning_rate = float("nan")
    with pytest.raises(ValueError, match="learning_rate of this step"):
        trial.optimizer.step()
    assert trial.averages() == [False, False]
    trial.optimizer._learning_rate = 0.1
    trial.optimizer.clear_grad()
    trial.step()
    assert trial.averages() == [True, True]


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_before_averaging() -> None:
    trial = AveragedTrial(shapes=[[3]])
    for _ in range(METHOD["t0"] + 1):
        trial.step()
        assert_refused(
            trial.optimizer.averaged_parameters().__enter__,
            RuntimeError,
            ["averaged_parameters", "before averaging had begun", "t0 = 3", "start_averaging()"],
        )
    trial.step()


def test_what_is_refused_while_the_averages_are_in() -> None:
    trial = begun()
    state = trial.optimizer.state_dict()
    before = values(trial.params)
    trial.problem.backward(trial.steps, trial.params)
    with trial.optimizer.averaged_parameters():
        within = values(trial.params)
        second = trial.optimizer.averaged_parameters()
        assert_refused(second.__enter__, RuntimeError, ["averaged_parameters", "while the averages are in"])
        assert_refused(trial.optimizer.step, RuntimeError, ["step", "within averaged_parameters()"])
        refused = lambda: trial.optimizer.set_state_dict(state)  # noqa: E731
        assert_refused(refused, RuntimeError, ["set_state_dict", "within averaged_parameters()"])
        assert values(trial.params) == within
    assert values(trial.params) == before
    trial.optimizer.clear_grad()
    trial.step()


@pytest.mark.usefixtures("static_mode")
def test_static_mode() -> None:
    paddle.disable_static()
    optimizer = begun().optimizer
    paddle.enable_static()
    enter = optimizer.averaged_parameters().__enter__
    assert_refused(enter, RuntimeError, ["averaged_parameters", "static graph mode", "<parameter>_ax_0"])
    assert_refused(optimizer.start_averaging, RuntimeError, ["start_averaging", "static graph"])
    assert not optimizer.has_averages


CONSTRUCTOR = {
    "lambd": ({"lambd": -1e-4}, ValueError, ["lambd", "-0.0001"]),
    "lambd text": ({"lambd": "0.1"}, TypeError, ["lambd", "'0.1'"]),
    "alpha": ({"alpha": -0.5}, ValueError, ["alpha", "-0.5"]),
    "alpha nan": ({"alpha": float("nan")}, ValueError, ["alpha", "nan"]),
    "t0": ({"t0": -1}, ValueError, ["t0", "-1"]),
    "t0 inf": ({"t0": float("inf")}, ValueError, ["t0", "inf"]),
    "t0 bool": ({"t0": True}, TypeError, ["t0", "True"]),
    "maximize": ({"maximize": 1}, TypeError, ["maximize", "1", "True or False"]),
    "torch_compatible": ({"torch_compatible": None}, TypeError, ["torch_compatible", "None"]),
    "learning_rate": ({"learning_rate": -0.1}, ValueError, ["learning_rate", "-0.1"]),
    "group lambd": ({"parameters": [{"params": [], "lambd": 0.1}]}, ValueError, ["'lambd'", "whole optimizer"]),
    "group t0": ({"parameters": [{"params": [], "t0": 1}]}, ValueError, ["'t0'", "whole optimizer"]),
}


@pytest.mark.parametrize(("given", "error", "pieces"), CONSTRUCTOR.values(), ids=CONSTRUCTOR)
def test_constructor(given: dict[str, Any], error: type, pieces: list[str]) -> None:
    parameters = [paddle.create_parameter([2], "float32")]
    assert_refused(lambda: AveragedSGD(**{"parameters": parameters, **given}), error, pieces)
