# SPDX-License-Identifier: Apache-2.0
"""What an optimizer adds to one run of a static graph's executor. Must not time dygraph (contestants.py)."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import paddle

from paddle_asgd import ASGD

from . import measure
from .cases import REFERENCE_BATCHES
from .contestants import BUILTIN, LEARNING_RATE, OURS

TENSORS, NUMEL = 160, 10_000


class Row(NamedTuple):
    """A contestant and the seconds that it adds to a run, one number a round."""

    name: str
    batches: int | None
    samples: list[float]


def rows(effort: measure.Effort) -> list[Row]:
    """For every optimizer, a run with it less a run without, in the same round."""
    optimizer = paddle.optimizer
    makers: dict[tuple[str, int | None], Callable[[], Any]] = {
        (OURS, REFERENCE_BATCHES): lambda: ASGD(LEARNING_RATE, REFERENCE_BATCHES),
        ("paddle.optimizer.SGD", None): lambda: optimizer.SGD(LEARNING_RATE),
        ("paddle.optimizer.Momentum", None): lambda: optimizer.Momentum(LEARNING_RATE),
        ("paddle.optimizer.Adam", None): lambda: optimizer.Adam(LEARNING_RATE),
        ("paddle.optimizer.AdamW", None): lambda: optimizer.AdamW(LEARNING_RATE),
    }
    if hasattr(optimizer, "ASGD"):
        makers[BUILTIN, REFERENCE_BATCHES] = lambda: optimizer.ASGD(LEARNING_RATE, REFERENCE_BATCHES)
    paddle.enable_static()
    try:
        runs = [_program(make) for make in (None, *makers.values())]
        for run in runs:
            # The first runs compile the program; a history is filled once round.
            for _ in range(2 + REFERENCE_BATCHES):
                run()
        bare, *samples = measure.take_turns(runs, effort)
    finally:
        paddle.disable_static()
    return [
        Row(name, batches, [whole - less for whole, less in zip(times, bare)])
        for (name, batches), times in zip(makers, samples)
    ]


def _program(make: Callable[[], Any] | None) -> Callable[[], Any]:
    """A function that runs a program once, which holds parameters, fixed gradients, and the update of an optimizer.

    Nothing else, so that the executor's noise over a forward and a backward pass does not drown the difference.
    """
    main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
    with paddle.utils.unique_name.guard(), paddle.static.program_guard(main, startup):
        params, gradients = _tensors(), _tensors()
        for gradient in gradients:
            gradient.stop_gradient = True
        if make is not None:
            make().apply_gradients(list(zip(params, gradients)))
    executor = paddle.static.Executor(paddle.CPUPlace())
    with paddle.static.scope_guard(scope):
        executor.run(startup)

    def run() -> None:
        with paddle.static.scope_guard(scope):
            executor.run(main, fetch_list=[])

    return run


def _tensors() -> list:
    constant = paddle.nn.initializer.Constant(0.5)
    return [paddle.create_parameter([NUMEL], "float32", default_initializer=constant) for _ in range(TENSORS)]
