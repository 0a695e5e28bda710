# SPDX-License-Identifier: Apache-2.0
"""Interrupts at a chosen instruction of a call, and what must be true behind one. Must not know any one optimizer."""

from __future__ import annotations

import dis
import signal
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest

import paddle_asgd

#: Makes a subject, which has a method ``content``, and a call.
Prepare = Callable[[], "tuple[Any, Callable[[], None]]"]
#: Where an interrupt may come: this package, and what Paddle's optimizer does for it between two of its own calls.
TRACED = (str(Path(paddle_asgd.__file__).parent), str(Path(paddle.optimizer.__file__).with_name("optimizer.py")))
#: At these Python handles no signal: what opens a ``try`` or a ``with``, and from 3.11 on stands in its place.
WITHOUT_SIGNALS = {dis.opmap[name] for name in ("NOP", "SETUP_FINALLY", "SETUP_WITH") if name in dis.opmap}


class Instructions:
    """Counts the instructions of Python that a call makes, and interrupts one of them."""

    def __init__(self, at: int | None = None, everywhere: bool = False) -> None:
        self.at, self.everywhere, self.count, self.where = at, everywhere, 0, ""

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        if not self.everywhere and not frame.f_code.co_filename.startswith(TRACED):
            return None
        frame.f_trace_opcodes = True
        return self._inside

    def _inside(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] not in WITHOUT_SIGNALS:
            self.count += 1
            if self.count == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                if self.everywhere:
                    signal.raise_signal(signal.SIGUSR1)
                raise KeyboardInterrupt
        return self._inside

    def run(self, call: Callable[[], None]) -> None:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(before)


class Trainee:
    """An optimizer that is trained on a problem, and is going to be interrupted.

    A subclass makes ``problem``, ``params`` and ``optimizer``, and says in ``content`` what a later step depends on.
    """

    problem: Any
    params: list
    optimizer: Any
    steps: int = 0

    def ready(self) -> None:
        """All that precedes a step."""
        grads = self.problem.gradients(self.steps, [param.numpy() for param in self.params])
        for param, grad in zip(self.params, grads):
            param.grad = paddle.to_tensor(grad, dtype=param.dtype)

    def finish(self) -> None:
        self.optimizer.clear_grad(set_to_zero=False)
        self.steps += 1

    def train(self) -> None:
        self.ready()
        self.optimizer.step()
        self.finish()

    @classmethod
    def state_after(cls, source: dict | None) -> dict:
        """Copies of the state of another such optimizer, made with these arguments; empty for None."""
        state = {} if source is None else cls(**source).optimizer.state_dict()
        return {k: v.clone() if isinstance(v, paddle.Tensor) else v for k, v in state.items()}


def step(subject: Trainee) -> None:
    subject.optimizer.step()


def skipped_step(subject: Trainee) -> None:
    subject.optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([True]))
    subject.optimizer.step()


class Expected:
    """What a subject contains before a call, after it, and some steps later, if nothing interrupts it.

    Args:
        case: its name, for what is said of a failure.
        prepare: makes a subject and the call to interrupt.
        finish: takes some steps and returns the subject's content then.
        everywhere: whether instructions of all files are counted.
    """

    def __init__(
        self, case: str, prepare: Prepare, finish: Callable[[Any], dict[str, Any]], everywhere: bool = False
    ) -> None:
        self.case, self.prepare, self.finish = case, prepare, finish
        subject, call = prepare()
        self.before = subject.content()
        counting = Instructions(everywhere=everywhere)
        counting.run(call)
        self.instructions = counting.count
        self.after = subject.content()
        self.later = finish(subject)

    def interrupt(self, at: int, everywhere: bool = False) -> bool:
        """Interrupt one instruction; the call can be repeated then or, if it was taken, left. Return whether it was."""
        subject, call = self.prepare()
        tracing = Instructions(at, everywhere)
        with pytest.raises(KeyboardInterrupt):
            tracing.run(call)
        paddle.set_grad_enabled(True)  # an interrupt within Paddle's own guard leaves it off
        where, content = f"instruction {at}, {tracing.where}", subject.content()
        taken = content == self.after
        assert taken or content == self.before, f"{self.case}: half-made after an interrupt at {where}"
        if not taken:
            call()
        assert self.finish(subject) == self.later, f"{self.case}: other bits after an interrupt at {where}"
        return taken

    def interrupt_some(self, wanted: int) -> None:
        """Interrupt so many instructions, drawn at random; 0: each one."""
        draw = np.random.default_rng(17)
        size = min(wanted or self.instructions, self.instructions)
        for at in draw.choice(self.instructions, size, replace=False) + 1:
            self.interrupt(int(at))
