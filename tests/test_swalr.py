# SPDX-License-Identifier: Apache-2.0
"""SWALR: torch's numbers in both ways of using it, and a state to resume from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import paddle
import pytest
from paddle.optimizer import lr

from paddle_asgd import ASGD, SWALR

DATA = json.loads((Path(__file__).parent / "data" / "swalr.json").read_text())
GIVEN = DATA["arguments"]
EPOCHS = 15
CASES = [
    pytest.param(case["follow"], case["options"], case["rates"], id=f"{case['follow']}-{case['options']}")
    for case in DATA["cases"]
]


def schedule(follow: bool) -> lr.LRScheduler:
    factor = GIVEN["factor"] if follow else 1.0
    return lr.MultiplicativeDecay(GIVEN["rate"], lambda epoch: factor)


def optimizer_of(rate: Any, kind: Any = paddle.optimizer.SGD) -> Any:
    return kind(rate, parameters=[paddle.create_parameter([2], "float32")])


def rates_of(scheduler: Any, optimizer: Any, epochs: int = EPOCHS) -> list[float]:
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.get_lr())
        scheduler.step()
    return rates


@pytest.mark.parametrize(("follow", "options", "rates"), CASES)
@pytest.mark.parametrize("kind", [paddle.optimizer.SGD, ASGD], ids=["SGD", "ASGD"])
def test_numbers_of_torch(kind: Any, follow: bool, options: dict, rates: list[float]) -> None:
    start = GIVEN["start"] if follow else 0
    scheduler = SWALR(schedule(True) if follow else GIVEN["rate"], GIVEN["swa_rate"], swa_start=start, **options)
    optimizer = optimizer_of(scheduler, kind)
    assert rates_of(scheduler, optimizer) == pytest.approx(rates, rel=1e-14)


@pytest.mark.parametrize(("follow", "options", "rates"), CASES)
def test_loop_of_torch(follow: bool, options: dict, rates: list[float]) -> None:
    """With an optimizer and its own scheduler; a jump comes one epoch later, at the first step."""
    start, before = GIVEN["start"] if follow else 0, schedule(follow)
    optimizer = optimizer_of(before)
    swa_scheduler = SWALR(optimizer, GIVEN["swa_rate"], **options)
    assert swa_scheduler() == optimizer.get_lr() == GIVEN["rate"]
    seen = []
    for epoch in range(EPOCHS):
        seen.append(optimizer.get_lr())
        (swa_scheduler if epoch >= start else before).step()
    if options["anneal_epochs"] == 0:
        rates = [*rates[:start], before(), *rates[start + 1 :]]
    assert seen == pytest.approx(rates, rel=1e-14)


def test_steps_to_an_epoch() -> None:
    """As LinearWarmup of Paddle steps what it holds."""
    epochs = [0, 3, 5, 6, 12, 2, 30]
    scheduler = SWALR(lr.StepDecay(0.5, step_size=2), 0.1, 4, "linear", swa_start=5)
    reference = SWALR(lr.StepDecay(0.5, step_size=2), 0.1, 4, "linear", swa_start=5)
    rates = rates_of(reference, optimizer_of(reference), 31)
    for epoch in epochs:
        scheduler.step(epoch)
        assert scheduler() == rates[epoch]
    with pytest.raises(ValueError, match=r"^epoch: received -1"):
        scheduler.step(-1)


@pytest.mark.parametrize("at", [0, 2, 5, 6, 9, 14])
@pytest.mark.parametrize("before", [lambda: 0.5, lambda: lr.StepDecay(0.5, step_size=2)], ids=["number", "scheduler"])
def test_resumed_anywhere(before: Callable[[], Any], at: int) -> None:
    def make() -> tuple[SWALR, Any]:
        scheduler = SWALR(before(), 0.1, 4, swa_start=5)
        return scheduler, optimizer_of(scheduler, ASGD)

    whole = rates_of(*make())
    first, second = make(), make()
    assert rates_of(*first, at) == whole[:at]
    second[0].set_state_dict(first[0].state_dict())
    third = make()
    third[0].set_dict(first[0].state_dict())
    assert rates_of(*second, EPOCHS - at) == rates_of(*third, EPOCHS - at) == whole[at:]


@pytest.mark.parametrize("kind", [paddle.optimizer.Adam, ASGD], ids=["Adam", "ASGD"])
def test_comes_with_the_optimizers_state(kind: Any) -> None:
    def make() -> tuple[SWALR, Any]:
        with paddle.utils.unique_name.guard():
            scheduler = SWALR(lr.StepDecay(0.5, step_size=2), 0.1, 4, swa_start=5)
            return scheduler, optimizer_of(scheduler, kind)

    first, second = make(), make()
    for scheduler, optimizer in (first, make()):
        for _ in range(7):
            parameter = optimizer._parameter_list[0]
            parameter.sum().backward()
            optimizer.step()
            optimizer.clear_grad()
            scheduler.step()
    second[1].set_state_dict(first[1].state_dict())
    assert rates_of(*second, 8) == rates_of(*first, 8)


def test_loop_of_torch_resumed() -> None:
    """Its state, loaded before the optimizer's, takes the place of the optimizer's scheduler once it had begun."""

    def make() -> tuple[lr.LRScheduler, Any, SWALR]:
        before = schedule(True)
        optimizer = optimizer_of(before)
        return before, optimizer, SWALR(optimizer, 0.01, 4)

    for at in (3, 5, 6, 8):
        before, optimizer, swa = make()
        before2, optimizer2, swa2 = make()
        for epoch in range(at):
            (swa if epoch >= 5 else before).step()
        swa2.set_state_dict(swa.state_dict())
        optimizer2.set_state_dict(optimizer.state_dict())
        for epoch in range(at, EPOCHS):
            assert optimizer2.get_lr() == optimizer.get_lr()
            (swa if epoch >= 5 else before).step()
            (swa2 if epoch >= 5 else before2).step()
        assert optimizer.get_lr() == 0.01


def test_last_epoch() -> None:
    whole = SWALR(0.5, 0.1, 4, swa_start=2)
    for _ in range(4):
        whole.step()
    assert SWALR(0.5, 0.1, 4, swa_start=2, last_epoch=3)() == whole()


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    SWALR(0.5, 0.1, 4, "linear", verbose=True).step()
    assert "Epoch 1: SWALR set learning rate to 0.4" in capsys.readouterr().out


def test_static_graph(static_mode: None) -> None:
    """As any scheduler of Paddle; but no program can be given another one."""
    main, startup = paddle.static.Program(), paddle.static.Program()
    with paddle.static.program_guard(main, startup):
        x = paddle.static.data("x", [2, 1], "float32")
        linear = paddle.nn.Linear(1, 1, bias_attr=False)
        scheduler = SWALR(0.5, 0.25, 1, swa_start=1)
        optimizer = paddle.optimizer.SGD(scheduler)
        optimizer.minimize(linear(x).sum())
        with pytest.raises(RuntimeError, match=r"^SWALR: received an optimizer in static graph mode"):
            SWALR(optimizer, 0.1)
    executor = paddle.static.Executor(paddle.CPUPlace())
    executor.run(startup)
    values = []
    for _ in range(4):
        values.append(executor.run(main, {"x": [[1.0], [1.0]]}, [linear.weight])[0].item())
        scheduler.step()
    assert [a - b for a, b in zip(values, values[1:])] == pytest.approx([1.0, 0.5, 0.5], rel=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SWALR("0.1", 0.1), TypeError, "learning_rate: received '0.1'"),
        (lambda: SWALR(True, 0.1), TypeError, "learning_rate: received True"),
        (lambda: SWALR(-0.1, 0.1), ValueError, "learning_rate: received -0.1"),
        (
            lambda: SWALR(lr.ReduceOnPlateau(0.1), 0.1),
            TypeError,
            "learning_rate: .*ReduceOnPlateau.*pass the optimizer",
        ),
        (lambda: SWALR(0.1, [0.1, 0.2]), TypeError, "swa_lr: received"),
        (lambda: SWALR(0.1, float("nan")), ValueError, "swa_lr: received nan"),
        (lambda: SWALR(0.1, 0.1, -1), ValueError, "anneal_epochs: received -1, expected an int of at least 0"),
        (lambda: SWALR(0.1, 0.1, 1.7), TypeError, "anneal_epochs: received 1.7"),
        (lambda: SWALR(0.1, 0.1, 3, "exponential"), ValueError, "anneal_strategy: .*expected 'cos' or 'linear'"),
        (lambda: SWALR(0.1, 0.1, 3, None), TypeError, "anneal_strategy: received None"),
        (lambda: SWALR(0.1, 0.1, swa_start=-2), ValueError, "swa_start: received -2"),
        (lambda: SWALR(0.1, 0.1, last_epoch=-2), ValueError, "last_epoch: received -2"),
        (lambda: SWALR(0.1, 0.1, verbose=1), TypeError, "verbose: received 1"),
        (lambda: SWALR(optimizer_of(0.1), 0.1, swa_start=3), ValueError, "swa_start: received 3 with an optimizer"),
        (lambda: SWALR(optimizer_of(0.1), 0.1, last_epoch=3), ValueError, "last_epoch: received 3 with an optimizer"),
    ],
)
def test_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{words}"):
        call()


def test_states_refused() -> None:
    scheduler = SWALR(lr.StepDecay(0.5, step_size=2), 0.1)
    state = scheduler.state_dict()
    with pytest.raises(ValueError, match=r"^set_state_dict: received the keys \['last_epoch'\], expected \['SWALR_LR"):
        scheduler.set_state_dict({"last_epoch": 3})
    with pytest.raises(TypeError, match=r"^set_state_dict: received None"):
        scheduler.set_state_dict(None)
    assert scheduler.state_dict() == state
