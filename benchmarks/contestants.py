# SPDX-License-Identifier: Apache-2.0
"""Who is timed: each contestant is a name, the batches it remembers, and a function that takes a turn.

Everybody works on the same parameters and gradients (PyTorch on its own), which nobody's speed depends on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, NamedTuple

import paddle

from paddle_asgd import ASGD

from . import cold, floor
from .cases import ITEM_SIZE, NARROW, REFERENCE_BATCHES, Case
from .torch_process import BYTES_AN_ELEMENT, TorchProcess, available

OURS = "paddle_asgd.ASGD"
BUILTIN = "paddle.optimizer.ASGD"
FLOOR = "bytes only"
#: Small, for the parameters must stay in range however often they are moved.
LEARNING_RATE = 1e-7


class Contestant(NamedTuple):
    """One who takes turns; ``batches`` is None without a history."""

    name: str
    batches: int | None
    turn: Callable[[], cold.Turn]
    history: str | None = None


class Entry(NamedTuple):
    """A contestant before it takes its memory: ``bytes_an_element`` beyond the parameters and gradients of all.

    ``make`` gives its step; it is None for the contestants of PyTorch's process. ``history`` is the dtype of a narrow
    one.
    """

    name: str
    batches: int | None
    bytes_an_element: float
    make: Callable[[Tensors], Callable[[], Any]] | None
    history: str | None = None


class Tensors:
    """The parameters of a case with their gradients."""

    def __init__(self, case: Case) -> None:
        paddle.seed(1)
        self.case = case
        self.paddle = [
            paddle.create_parameter(shape, case.dtype, default_initializer=paddle.nn.initializer.Constant(0.5))
            for shape in case.shapes()
        ]
        for param in self.paddle:
            param.grad = paddle.randn(param.shape).astype(case.dtype)


def _ours(batches: int, history: str | None = None) -> Callable[[Tensors], Any]:
    return lambda tensors: (
        ASGD(LEARNING_RATE, batches, tensors.paddle, multi_precision=True, history_dtype=history).step
    )


def _builtin(batches: int) -> Callable[[Tensors], Any]:
    return lambda tensors: paddle.optimizer.ASGD(LEARNING_RATE, batches, tensors.paddle).step


def entries(case: Case) -> list[Entry]:
    """All who can run a case on the CPU; Paddle's own optimizers have no mixed precision there."""
    size = ITEM_SIZE[case.dtype]
    kept = 4 if size == 4 else 8  # d, and the master weight
    found = [Entry(OURS, n, kept + n * size, _ours(n)) for n in case.batches]
    if case.dtype != "float32":
        return found
    if case.narrow_numel():
        n = REFERENCE_BATCHES
        found += [
            Entry(OURS, n, kept + n * (size - case.saved_a_slot(history) / case.numel), _ours(n, history), history)
            for history in NARROW
        ]
    optimizer = paddle.optimizer
    if hasattr(optimizer, "ASGD"):
        found += [Entry(BUILTIN, n, 4 + 4 * n, _builtin(n)) for n in case.batches if n <= REFERENCE_BATCHES]
    found += [
        Entry("paddle.optimizer.SGD", None, 0, lambda t: optimizer.SGD(LEARNING_RATE, t.paddle).step),
        Entry(
            "paddle.optimizer.Momentum",
            None,
            4,
            lambda t: optimizer.Momentum(LEARNING_RATE, parameters=t.paddle, use_multi_tensor=True).step,
        ),
        Entry(
            "paddle.optimizer.Adam",
            None,
            8,
            lambda t: optimizer.Adam(LEARNING_RATE, parameters=t.paddle, use_multi_tensor=True).step,
        ),
        # It has no use_multi_tensor.
        Entry("paddle.optimizer.AdamW", None, 8, lambda t: optimizer.AdamW(LEARNING_RATE, parameters=t.paddle).step),
    ]
    if available():
        # The process has parameters and gradients of its own.
        found += [Entry(name, None, state + 2 * size, None) for name, state in BYTES_AN_ELEMENT.items()]
    return found


def fitting(case: Case, memory: int) -> tuple[list[Entry], list[Entry]]:
    """Those who together fit into ``memory`` bytes, and those who are left out: the largest."""
    here, out = entries(case), []
    taken = 2 * ITEM_SIZE[case.dtype] * case.numel
    for entry in sorted(here, key=lambda e: e.bytes_an_element):
        taken += entry.bytes_an_element * case.numel
        if taken > memory:
            taken -= entry.bytes_an_element * case.numel
            out.append(entry)
    return [entry for entry in here if entry not in out], out


@contextmanager
def admit(case: Case, chosen: list[Entry], seconds: float) -> Iterator[list[Contestant]]:
    """Make the contestants, and let each fill its history; beside each of ours goes the floor on its memory.

    Args:
        case: what they work on.
        chosen: who takes part.
        seconds: as ``cold.Turns`` takes it.
    """
    tensors = Tensors(case)
    process = (
        TorchProcess(case.model, LEARNING_RATE, seconds, case.cold) if any(e.make is None for e in chosen) else None
    )
    contestants = []
    try:
        for entry in chosen:
            if entry.make is None:
                process = process or TorchProcess(case.model, LEARNING_RATE, seconds, case.cold)
                contestants.append(Contestant(entry.name, None, process.turns_of(entry.name)))
                continue
            step = entry.make(tensors)
            # A full pass fills the history; and the first steps of everybody create state.
            for _ in range(2 + (entry.batches or 0)):
                step()
            turns = cold.Turns(step, seconds, case.cold)
            contestants.append(Contestant(entry.name, entry.batches, turns, entry.history))
            if entry.name == OURS and floor.library() is not None:
                step = floor.bytes_only(step.__self__, tensors.paddle, entry.batches)
                turns = cold.Turns(step, seconds, case.cold)
                contestants.append(Contestant(FLOOR, entry.batches, turns, entry.history))
        yield contestants
    finally:
        if process is not None:
            process.close()
