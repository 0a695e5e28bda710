# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user passes to ASGD alone: the number of batches and theta, and whether the history fits into
memory.

Must not change what it checks. Checks that every optimizer needs are in arguments.py, those of one batch in slots.py.
"""

from __future__ import annotations

import numbers
import operator
from typing import Any, Callable

import numpy as np
import paddle

from ..arguments import check_number, dtype_name, is_tensor, shown
from ..free_memory import free_memory
from .history import HISTORY_DTYPES, history_bytes


def check_count(argument: str, value: Any) -> int:
    """Check a number of batches and return it as an int.

    A float is refused even if it is whole, because ``len(dataset) / batch_size`` may be off by one.

    Args:
        argument: the name with which an error begins.
        value: an int of Python or NumPy, or a tensor of one int32 or int64; from 1 to 2**31 - 1.

    Raises:
        TypeError: the value is not an int.
        ValueError: it is None or out of range.
    """
    try:
        # operator.index accepts a tensor of floats.
        whole = not is_tensor(value) or dtype_name(value.dtype) in ("int32", "int64")
        count = operator.index(value) if whole and not isinstance(value, (bool, np.bool_)) else None
    except (TypeError, ValueError):
        count = None
    if count is None:
        raise (ValueError if value is None else TypeError)(
            f"{argument}: received {shown(value)}, expected a positive int such as len(loader); parameters go into "
            "parameters=..."
        )
    # Paddle counts along an axis in 32 bits, and some versions wrap around.
    if not 0 < count < 2**31:
        raise ValueError(f"{argument}: received {count}, expected a positive int below 2**31")
    return count


def check_theta(value: Any) -> Any:
    """Check ``theta`` and return it: None, a number of at least 0 as a float, or a callable, whose result each step
    checks.

    Raises:
        TypeError: the value is of another kind.
        ValueError: it is negative or not finite.
    """
    if value is None or callable(value):
        return value
    if isinstance(value, numbers.Real):
        return check_number("theta", value)
    raise TypeError(f"theta: received {shown(value)}, expected a number, a callable of the step, or None")


def check_step(argument: str, value: Any) -> int:
    """Check a number of steps taken, as a checkpoint holds it, and return it as an int.

    Args:
        argument: the name with which an error begins.
        value: an int of Python or NumPy of at least 0.

    Raises:
        ValueError: the value is anything else.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_)) and value >= 0:
        return int(value)
    raise ValueError(f"{argument}: received {shown(value)}, expected an int of at least 0")


def check_history(
    argument: str, count: int, parameters: list, history_dtype_of: Callable[[Any], str | None] = lambda param: None
) -> None:
    """Refuse a history that does not fit into the free memory of the host, and say which ``history_dtype`` would.

    Linux grants more memory than there is and ends the process when that is used. A GPU refuses by itself.

    Args:
        argument: the name with which an error begins.
        count: the number of slots, each of which holds a gradient of every parameter.
        parameters: those whose history is still to be made; only tensors on the host count.
        history_dtype_of: the ``history_dtype`` that the user has chosen for a parameter.

    Raises:
        ValueError: the history takes more than the free memory.
    """
    held = [p for p in parameters if isinstance(p, paddle.Tensor) and p._is_initialized()]
    on_cpu = [p for p in held if p.place.is_cpu_place()]
    needed = sum(history_bytes(p, count, history_dtype_of(p)) for p in on_cpu)
    free = free_memory()
    if needed > free:
        narrow = {dtype: sum(history_bytes(p, count, dtype) for p in on_cpu) for dtype in HISTORY_DTYPES}
        raise ValueError(
            f"{argument}: received {count}, which takes {_gib(needed)} for as many gradients of each parameter, "
            f"expected what fits into the {_gib(free)} that are free; {_narrow_remedy(count, narrow, free)}larger "
            "batches make for fewer of them"
        )


def _gib(count: int) -> str:
    """A number of bytes, as an error shows it."""
    return f"{count / 2**30:.1f} GiB"


def _narrow_remedy(count: int, narrow: dict[str, int], free: int) -> str:
    """What the error about a history that does not fit says of narrow histories.

    Args:
        count: the number of slots; with one of them there is no narrow history.
        narrow: the bytes that the history takes with each ``history_dtype``, from the widest to the narrowest.
        free: the bytes that are free.
    """
    if count == 1:
        return ""
    for dtype, needed in narrow.items():
        if needed <= free:
            return f"history_dtype={dtype!r} takes {_gib(needed)}, and "
    return f"history_dtype={dtype!r} takes {_gib(needed)} and does not fit either; "
