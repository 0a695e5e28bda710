# SPDX-License-Identifier: Apache-2.0
"""Interrupts at any instruction of a step, of setting batch_index and of loading: as if refused, or taken whole.

``--interrupts=N`` sets how many instructions of each case are tried; 0 is every one of them. What a step computes is
judged elsewhere (test_asgd.py): here an interrupted run must have the bits of one that is not interrupted.
"""

from __future__ import annotations

import signal
import warnings
from functools import partial
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from interrupting import Expected, Trainee, skipped_step, step
from problems import Quadratic, bits, state_of

from paddle_asgd import ASGD
from paddle_asgd.sag import history
from paddle_asgd.uninterrupted import uninterrupted

SHAPES = [[5], [], [2, 3]]
N = 3
#: Distinct slots grow slowly and one comes twice.
ORDER = [2, 2, 0, 1, 0, 2, 1]


class Subject(Trainee):
    """An optimizer that has taken some steps, and is about to do what will be interrupted.

    Args:
        steps: the number of steps taken.
        indexed: from which step on each has a batch index; None: none has.
        groups: whether two native calls make a step.
        source: the kind of optimizer whose state is going to be loaded.
        options: further arguments of ``ASGD``.
    """

    def __init__(
        self,
        steps: int = 0,
        indexed: int | None = None,
        dtype: str = "float32",
        groups: bool = False,
        source: dict | None = None,
        scheduled: bool = False,
        **options: Any,
    ) -> None:
        with paddle.utils.unique_name.guard():  # so that names are those of the source
            self.problem = Quadratic(N, SHAPES)
            self.params = self.problem.parameters(dtype)
            rate = paddle.optimizer.lr.StepDecay(0.1, step_size=2) if scheduled else 0.1
            split = [{"params": self.params[:1], "weight_decay": 0.2}, {"params": self.params[1:]}]
            self.optimizer = ASGD(rate, N, split if groups else self.params, weight_decay=0.1, **options)
        self.indexed = indexed
        for _ in range(steps):
            self.train()
        self.checkpoint = self.state_after(source)

    def ready(self) -> None:
        if self.indexed is not None and self.steps >= self.indexed:
            self.optimizer.batch_index = ORDER[self.steps % len(ORDER)]
        super().ready()

    def finish(self) -> None:
        super().finish()
        if isinstance(self.optimizer._learning_rate, paddle.optimizer.lr.LRScheduler):
            self.optimizer._learning_rate.step()

    def content(self) -> dict[str, Any]:
        """All that a later step depends on."""
        optimizer, inputs = self.optimizer, self.optimizer._inputs
        watch = None if inputs.watch is None or inputs.watch.tensor is None else inputs.watch.tensor.numpy()
        kept = ("d", "y", "y_scale", "m")
        found: dict[str, Any] = {param.name: bits(state_of(optimizer, param, kept)) for param in self.params}
        found["masters"] = {name: master.numpy().tobytes() for name, master in optimizer._master_weights.items()}
        found["watch"] = () if watch is None or not watch.any() else watch.tobytes()
        found["inputs"] = (optimizer.batch_index, inputs.index.in_use, inputs.steps)
        found["rate"] = optimizer.get_lr()
        return found


def give_index(subject: Subject) -> None:
    subject.optimizer.batch_index = 1


def load(subject: Subject) -> None:
    subject.optimizer.set_state_dict(subject.checkpoint)


def look(subject: Subject) -> None:
    subject.optimizer.state_dict()
    subject.optimizer.gradient_norm()


#: Random moments in each case of the last test.
SIGNALS = 4

WEIGHTED = {"batch_weights": [2.0, 2.0, 1.0]}
THETA: dict[str, Any] = {"theta": lambda step: 1 / (1 + step)}
NARROW = {"history_dtype": "int8"}
MIXED = {"dtype": "float16", "multi_precision": True}
CASES: dict[str, tuple[Callable[[Subject], None], dict]] = {
    "first_step": (step, {}),
    "later_step": (step, {"steps": 2}),
    "end_of_a_pass": (step, {"steps": 5, "indexed": 0}),
    "first_indexed_step": (step, {"steps": 2, "indexed": 2}),
    "first_step_with_all": (step, {"indexed": 0, "theta": 0.3, **WEIGHTED}),
    "first_step_theta": (step, THETA),
    "later_step_theta": (step, {"steps": 3, "watch": False, **THETA}),
    "first_step_of_groups": (step, {"groups": True}),
    "later_step_of_groups": (step, {"steps": 4, "groups": True, "indexed": 1, **THETA, **WEIGHTED}),
    "first_step_mixed": (step, MIXED),
    "later_step_mixed": (step, {"steps": 2, **MIXED}),
    "first_step_narrow": (step, NARROW),
    "later_step_narrow": (step, {"steps": 2, **NARROW, **MIXED}),
    "load_narrow": (load, {"steps": 2, **NARROW, "source": {"steps": 5, **NARROW}}),
    "load_narrow_into_nothing": (load, {**NARROW, "source": {"steps": 5, **NARROW}}),
    "skipped_step": (skipped_step, {"steps": 2, "indexed": 0, **THETA}),
    "index_before_all": (give_index, {}),
    "first_index": (give_index, {"steps": 2}),
    "first_index_mixed": (give_index, {"steps": 4, **MIXED, **WEIGHTED}),
    "later_index": (give_index, {"steps": 2, "indexed": 0}),
    "load_into_nothing": (load, {"source": {"steps": 5}}),
    "load_nothing": (load, {"steps": 2, "source": {}}),
    "load_into_state": (load, {"steps": 2, "scheduled": True, "source": {"steps": 5, "scheduled": True}}),
    "load_theta": (load, {"steps": 2, **THETA, "source": {"steps": 5, **THETA}}),
    "load_indexed": (load, {"steps": 2, "indexed": 3, **WEIGHTED, "source": {"steps": 5, "indexed": 0, **WEIGHTED}}),
    "load_cyclic": (load, {"steps": 3, "indexed": 0, "source": {"steps": 2}}),
    "load_mixed": (load, {**MIXED, "source": {"steps": 5, **MIXED}}),
    "look": (look, {"steps": 2, "indexed": 0}),
}
CASES["multi_precision_switched_on"] = (step, {"steps": 2, "dtype": "float16"})


def prepared(case: str) -> tuple[Subject, Callable[[], None]]:
    act, options = CASES[case]
    subject = Subject(**options)
    if case == "multi_precision_switched_on":
        subject.optimizer._multi_precision = True
    if act in (step, skipped_step):
        subject.ready()
    return subject, partial(act, subject)


def finished(subject: Subject, case: str) -> dict[str, Any]:
    """Its content some steps later."""
    if CASES[case][0] in (step, skipped_step):
        subject.finish()
    if subject.optimizer._inputs.index.in_use:
        subject.indexed = 0
    subject.optimizer._set_auxiliary_var("found_inf", False)
    for _ in range(N + 1):
        subject.train()
    return subject.content()


@pytest.fixture(autouse=True)
def _two_can_be_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SMALLEST", 2)


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """float16 without master weights warns."""
    warnings.simplefilter("ignore")


def expected_of(case: str, everywhere: bool = False) -> Expected:
    return Expected(case, partial(prepared, case), partial(finished, case=case), everywhere)


@pytest.mark.parametrize("case", CASES)
def test_an_interrupt_at_any_instruction(case: str, request: pytest.FixtureRequest) -> None:
    expected_of(case).interrupt_some(request.config.getoption("--interrupts"))


def test_signals_at_random_moments() -> None:
    """In whatever Python code runs just then, Paddle's and NumPy's included; the cases take turns."""
    draw, taken = np.random.default_rng(19), 0
    handler = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        for case in CASES:
            expected = expected_of(case, everywhere=True)
            for at in draw.integers(1, expected.instructions, SIGNALS, endpoint=True):
                taken += expected.interrupt(int(at), everywhere=True)
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert 0 < taken < SIGNALS * len(CASES)


def test_calls_are_made_in_order_until_one_fails() -> None:
    made: list[int] = []
    calls = [partial(made.append, 1), partial(made.append, 2), partial(made.pop, 7), partial(made.append, 3)]
    with pytest.raises(IndexError, match="pop index out of range"):
        uninterrupted(*calls)
    assert made == [1, 2]
