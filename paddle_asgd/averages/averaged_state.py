# SPDX-License-Identifier: Apache-2.0
"""What the state_dict of an AveragedModel must hold before anything of it is loaded. Must not know how it is used."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Callable

from ..arguments import dtype_name, refuse_state, shown
from ..entries import as_tensor, entry_value

_COUNTS = ("num_calls", "num_updates")


def check_state(
    state_dict: Any, expected: dict[str, Any], held: dict[str, Any], others: Collection[str] = ()
) -> tuple[list[Callable[[], Any]], int, int]:
    """Check all of a state_dict.

    Args:
        state_dict: what ``AveragedModel.state_dict`` gave, perhaps by way of a file.
        expected: the rule and the dtype of the averages, as they must be there.
        held: from structured names to the tensors that are loaded into.
        others: structured names whose averages other ranks keep; here they must be there, and are not loaded.

    Returns:
        The calls, of C alone, that copy it in; the number of calls; the number of updates.
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"set_state_dict: received {type(state_dict).__name__}, expected a dict")
    names = ("averages", *_COUNTS, *expected)
    missing = [name for name in names if name not in state_dict]
    if missing:
        refuse_state(f"{missing[0]!r} is missing, expected what AveragedModel.state_dict() returned")
    unknown = [key for key in state_dict if key not in names]
    if unknown:
        refuse_state(f"{unknown[0]!r} is unknown, expected what AveragedModel.state_dict() returned")
    for name, value in expected.items():
        received = _plain(state_dict[name])
        if received != value:
            refuse_state(f"{name} is {received!r}, expected {value!r}, with which the AveragedModel was created")
    calls, updates = (_count(name, state_dict[name]) for name in _COUNTS)
    if updates > calls:
        refuse_state(f"num_updates is {updates}, expected at most num_calls, {calls}")
    return _copies(state_dict["averages"], held, others), calls, updates


def _plain(value: Any) -> Any:
    """Numbers without the tensor that a file may have put around them."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return entry_value(value)


def _count(name: str, value: Any) -> int:
    count = entry_value(value)
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 0:
        refuse_state(f"{name} is {shown(count)}, expected an int of at least 0")
    return int(count)


def _copies(averages: Any, held: dict[str, Any], others: Collection[str]) -> list[Callable[[], Any]]:
    if not isinstance(averages, Mapping):
        refuse_state(f"'averages' is {shown(averages)}, expected a dict")
    # All ranks must come to the same end, so what only another rank needs must be there, too.
    missing = [name for name in (*held, *others) if name not in averages]
    if missing:
        refuse_state(f"the average of {missing[0]!r} is missing ({len(missing)} such entries)")
    unknown = [name for name in averages if name not in held and name not in others]
    if unknown:
        refuse_state(f"entry {unknown[0]!r} belongs to nothing that is averaged here")
    copies = []
    for name, target in held.items():
        value = as_tensor(name, "average", averages[name])
        received, wanted = ((dtype_name(t.dtype), list(t.shape)) for t in (value, target))
        if received != wanted:
            refuse_state(
                f"entry 'average' of parameter {name!r} is {received[0]} {received[1]}, expected {wanted[0]} "
                f"{wanted[1]}"
            )
        if math.prod(target.shape) > 0:  # some versions of Paddle refuse to copy nothing
            copies.append(partial(target.copy_, value, True))
    return copies
