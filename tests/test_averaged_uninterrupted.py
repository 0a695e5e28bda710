# SPDX-License-Identifier: Apache-2.0
"""Interrupts at any instruction of what AveragedSGD does: as if refused, or taken whole.

``--interrupts`` is that of test_uninterrupted.py. What a step computes is judged in test_averaged_sgd.py.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Callable

import paddle
import pytest
from averaged_trial import KEPT, METHOD
from interrupting import Expected, Trainee, skipped_step, step
from problems import Quadratic, bits, state_of

from paddle_asgd import AveragedSGD

#: The step that makes the averages.
FIRST_AVERAGE = METHOD["t0"] + 1


class Subject(Trainee):
    """An optimizer that has taken some steps, and is about to do what will be interrupted.

    Args:
        steps: the number of steps taken.
        started: after which of them ``start_averaging`` was called; None: after none.
        groups: whether two native calls make a step.
        source: the kind of optimizer whose state is going to be loaded.
        options: further arguments of ``AveragedSGD``.
    """

    def __init__(
        self,
        steps: int = 0,
        started: int | None = None,
        dtype: str = "float32",
        groups: bool = False,
        source: dict | None = None,
        **options: Any,
    ) -> None:
        with paddle.utils.unique_name.guard():  # so that names are those of the source
            self.problem = Quadratic(3, [[5], [], [2, 3]])
            self.params = self.problem.parameters(dtype)
            split = [{"params": self.params[:1], "weight_decay": 0.2}, {"params": self.params[1:]}]
            options = {**METHOD, "weight_decay": 0.1, **options}
            self.optimizer = AveragedSGD(0.1, parameters=split if groups else self.params, **options)
        for taken in range(steps):
            if taken == started:
                self.optimizer.start_averaging()
            self.train()
        self.checkpoint = self.state_after(source)

    def content(self) -> dict[str, Any]:
        """All that a later step depends on."""
        optimizer = self.optimizer
        found: dict[str, Any] = {param.name: bits(state_of(optimizer, param, KEPT)) for param in self.params}
        found["masters"] = {name: master.numpy().tobytes() for name, master in optimizer._master_weights.items()}
        found["averages"] = (optimizer._steps, optimizer._started, optimizer._swapped, optimizer.has_averages)
        return found


def start(subject: Subject) -> None:
    subject.optimizer.start_averaging()


def use(subject: Subject) -> None:
    with subject.optimizer.averaged_parameters():
        pass


def load(subject: Subject) -> None:
    subject.optimizer.set_state_dict(subject.checkpoint)


MIXED = {"dtype": "float16", "multi_precision": True}
COMPATIBLE = {"torch_compatible": True}
CASES: dict[str, tuple[Callable[[Subject], None], dict]] = {
    "first_step": (step, {}),
    "step_before_averaging": (step, {"steps": 2}),
    "step_that_makes_the_averages": (step, {"steps": FIRST_AVERAGE}),
    "step_that_makes_the_averages_of_groups": (step, {"steps": FIRST_AVERAGE, "groups": True}),
    "later_step": (step, {"steps": 7}),
    "later_step_of_groups": (step, {"steps": 7, "groups": True}),
    "first_step_mixed": (step, MIXED),
    "step_that_makes_the_averages_mixed": (step, {"steps": FIRST_AVERAGE, **MIXED}),
    "first_step_compatible": (step, COMPATIBLE),
    "later_step_compatible": (step, {"steps": 7, **COMPATIBLE}),
    "skipped_step": (skipped_step, {"steps": 7}),
    "start_before_all": (start, {}),
    "start": (start, {"steps": 2}),
    "start_again": (start, {"steps": 7, "started": 2}),
    "start_mixed": (start, {"steps": 2, **MIXED}),
    "use": (use, {"steps": 7}),
    "use_mixed": (use, {"steps": 7, **MIXED}),
    "use_started": (use, {"steps": 5, "started": 2, "t0": 1e6}),
    "load_into_nothing": (load, {"source": {"steps": 7}}),
    "load_nothing": (load, {"steps": 7, "source": {}}),
    "load_into_state": (load, {"steps": 2, "source": {"steps": 7}}),
    "load_started": (load, {"steps": 2, "source": {"steps": 7, "started": 3}}),
    "load_into_started": (load, {"steps": 7, "started": 3, "source": {"steps": 2}}),
    "load_mixed": (load, {**MIXED, "source": {"steps": 7, **MIXED}}),
    "load_compatible": (load, {"steps": 2, **COMPATIBLE, "source": {"steps": 7, **COMPATIBLE}}),
}


def prepared(case: str) -> tuple[Subject, Callable[[], None]]:
    act, options = CASES[case]
    subject = Subject(**options)
    if act in (step, skipped_step):
        subject.ready()
    return subject, partial(act, subject)


def finished(subject: Subject, case: str) -> dict[str, Any]:
    """Its content some steps later."""
    if CASES[case][0] in (step, skipped_step):
        subject.finish()
    subject.optimizer._set_auxiliary_var("found_inf", False)
    for _ in range(4):
        subject.train()
    return subject.content()


@pytest.mark.parametrize("case", CASES)
def test_an_interrupt_at_any_instruction(case: str, request: pytest.FixtureRequest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float16 says that masters would be better
        expected = Expected(case, partial(prepared, case), partial(finished, case=case))
        assert expected.instructions > 30
        expected.interrupt_some(request.config.getoption("--interrupts"))
