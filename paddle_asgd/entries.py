# SPDX-License-Identifier: Apache-2.0
"""Single entries of a checkpoint: numbers, tensors and a scheduler's state, as they are written, read and checked.

Must not know which parameter an entry belongs to (checkpoint.py).
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import numpy as np
import paddle
from paddle.optimizer.lr import LambdaDecay, LRScheduler

from .arguments import refuse_state, shown
from .caller import warn

SCHEDULER = "LR_Scheduler"


def number_entry(values: Any, dtype: str) -> paddle.Tensor:
    """Numbers as an entry of a checkpoint: with anything but tensors in it Paddle would take it for no state_dict."""
    return paddle.to_tensor(values, dtype, place=paddle.CPUPlace())


def _without_name(entry: Any) -> Any:
    """An entry itself: paddle.load(return_numpy=True) pairs an array with its tensor's name."""
    paired = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
    return entry[1] if paired else entry


def entry_value(entry: Any) -> Any:
    """What an entry of numbers holds: a number in place of a tensor or an array that has one element."""
    entry = _without_name(entry)
    if isinstance(entry, paddle.Tensor) and not entry._is_initialized():
        return entry
    return entry.item() if hasattr(entry, "item") and math.prod(entry.shape) == 1 else entry


def as_tensor(param: str, name: str, value: Any) -> Any:
    """A tensor, on whatever device it is; arrays, which paddle.load(return_numpy=True) gives, become one."""
    value = _without_name(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiu":
        return paddle.to_tensor(value, place=paddle.CPUPlace())
    if not isinstance(value, paddle.Tensor):
        refuse_state(
            f"entry {name!r} of parameter {param!r} is {shown(value)}, expected a tensor or an array of numbers"
        )
    if not value._is_initialized() and math.prod(value.shape) > 0:
        refuse_state(f"entry {name!r} of parameter {param!r} is a tensor without memory, expected one with values")
    return value


def check_scheduler(scheduler: Any, entry: Any) -> dict[str, Any] | None:
    """What of the scheduler's entry has to be loaded, if anything.

    Args:
        scheduler: the optimizer's learning rate: a scheduler, or anything else if it is fixed.
        entry: what the checkpoint holds under ``SCHEDULER``; None if it holds nothing.
    """
    if not isinstance(scheduler, LRScheduler):
        if entry is not None:
            warn(f"set_state_dict: {SCHEDULER!r} is not used, for the optimizer has a fixed learning rate")
        return None
    if entry is None:
        if not isinstance(scheduler, LambdaDecay):
            refuse_state(
                f"{SCHEDULER!r} is missing, and the optimizer has a {type(scheduler).__name__}; files of static "
                f"graphs hold none: add scheduler.state_dict() under this name"
            )
        return None
    unused: list[str] = []
    wanted = _check_schedule(SCHEDULER, scheduler.state_dict(), entry, unused)
    if unused:
        warn(
            f"set_state_dict: {', '.join(unused)} are not used by {type(scheduler).__name__}; the checkpoint may be "
            "another scheduler's"
        )
    return wanted


def _check_schedule(name: str, own: dict[str, Any], entry: Any, unused: list[str]) -> dict[str, Any]:
    """The values that a scheduler takes from its entry, which may hold another scheduler's; adds others to unused."""
    if not isinstance(entry, dict) or not set(own) <= set(entry):
        refuse_state(f"{name!r} is {shown(entry)}, expected a dict with {', '.join(sorted(own))}")
    unused += [repr(key) for key in entry if key not in own]
    wanted = {}
    for key, mine in own.items():
        value = entry[key]
        if isinstance(mine, dict):
            value = _check_schedule(key, mine, value, unused)
        elif key == "last_epoch":
            epoch = entry_value(value)
            if isinstance(epoch, bool) or not isinstance(epoch, numbers.Integral):
                refuse_state(f"{key!r} of {name!r} is {shown(value)}, expected an int")
        elif key == "last_lr":
            rate = entry_value(value)
            real = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
            if not real or not math.isfinite(rate) or rate < 0:
                refuse_state(f"{key!r} of {name!r} is {shown(value)}, expected a finite number of at least 0")
        wanted[key] = value
    return wanted


def set_scheduler(scheduler: LRScheduler, wanted: dict[str, Any]) -> None:
    """Give a scheduler what ``check_scheduler`` returned."""
    with warnings.catch_warnings():
        # LinearWarmup says this of the entry of the scheduler that it holds, whenever it has one.
        warnings.filterwarnings("ignore", "There are some unused values in state_dict")
        scheduler.set_state_dict(wanted)
