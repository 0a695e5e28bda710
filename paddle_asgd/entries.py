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

#: The key under which Paddle's optimizers save the state of a scheduler.
SCHEDULER = "LR_Scheduler"


def number_entry(values: Any, dtype: str) -> paddle.Tensor:
    """Make numbers an entry of a checkpoint: a tensor on the host, since Paddle takes only dicts of tensors for a
    state_dict.

    Args:
        values: a list of numbers, or an array.
        dtype: the dtype of the entry, ``"int64"`` or ``"float64"``.

    Examples:
        >>> entry_value(number_entry([3], "int64"))
        3
    """
    return paddle.to_tensor(values, dtype, place=paddle.CPUPlace())


def _without_name(entry: Any) -> Any:
    """The entry itself, without the name that ``paddle.load(return_numpy=True)`` pairs an array with."""
    paired = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
    return entry[1] if paired else entry


def entry_value(entry: Any) -> Any:
    """Value of an entry of numbers: a number if it has one element, otherwise the tensor or array itself.

    Args:
        entry: a tensor, an array, a number, or a pair of a name and an array. Anything else is returned as it is, for
            the caller to refuse.
    """
    entry = _without_name(entry)
    if isinstance(entry, paddle.Tensor) and not entry._is_initialized():
        return entry
    return entry.item() if hasattr(entry, "item") and math.prod(entry.shape) == 1 else entry


def as_tensor(param: str, name: str, value: Any) -> Any:
    """Tensor of an entry of a parameter's state, on whatever device it is; an array becomes a tensor on the host.

    Args:
        param: the name of the parameter, for an error.
        name: the name of the entry in the layout, for an error.
        value: a tensor, an array of numbers, or a pair of a name and an array.

    Raises:
        ValueError: the value is of another kind, or a tensor whose memory has been freed.
    """
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
    """Find out what of a scheduler's entry has to be loaded, and check it.

    Args:
        scheduler: the optimizer's learning rate: a scheduler, or anything else if it is fixed.
        entry: what the checkpoint holds under ``SCHEDULER``; None if it holds nothing.

    Returns:
        The state for ``set_scheduler``; None if there is nothing to load.

    Raises:
        ValueError: the optimizer has a scheduler whose entry is missing, or incomplete, or has a bad epoch or rate.
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
    """Take from a scheduler's entry what the scheduler itself has, and check it.

    Args:
        name: the key of the entry, for an error.
        own: the scheduler's present state.
        entry: what the checkpoint holds, which may be the state of another kind of scheduler.
        unused: gets the keys of the entry that the scheduler does not have, for a warning.

    Returns:
        The entry without those keys. The state of a scheduler within it, as ``LinearWarmup`` has one, is treated alike.

    Raises:
        ValueError: a key is missing, or an epoch or a rate is not a number that a schedule can have.
    """
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
    """Load into a scheduler what ``check_scheduler`` returned.

    Args:
        scheduler: the optimizer's scheduler. One of the user's own may raise whatever it likes.
        wanted: a state with the scheduler's own keys.
    """
    with warnings.catch_warnings():
        # LinearWarmup always gives this warning about the entry of the scheduler within it.
        warnings.filterwarnings("ignore", "There are some unused values in state_dict")
        scheduler.set_state_dict(wanted)
