# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user hands to ASGD alone: the number of batches and theta, and whether the history fits into memory.

Must not change what it checks. Checks that every optimizer needs are in arguments.py, those of one batch in slots.py.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np
import paddle

from ..arguments import BYTES, check_number, dtype_name, is_tensor, shown
from ..free_memory import free_memory


def check_count(argument: str, value: Any) -> int:
    """A positive int. A float is refused even if it is whole: len(dataset) / batch_size may be off by one."""
    try:
        # A float tensor has an index, too.
        whole = not is_tensor(value) or dtype_name(value.dtype) in ("int32", "int64")
        count = operator.index(value) if whole and not isinstance(value, (bool, np.bool_)) else None
    except (TypeError, ValueError):
        count = None
    if count is None:
        raise (ValueError if value is None else TypeError)(
            f"{argument}: received {shown(value)}, expected a positive int such as len(loader); parameters go into "
            "parameters=..."
        )
    # Paddle counts along one axis in 32 bits, and some versions of it wrap around.
    if not 0 < count < 2**31:
        raise ValueError(f"{argument}: received {count}, expected a positive int below 2**31")
    return count


def check_theta(value: Any) -> Any:
    """None, a number of at least 0, or a callable that gives one."""
    if value is None or callable(value):
        return value
    if isinstance(value, numbers.Real):
        return check_number("theta", value)
    raise TypeError(f"theta: received {shown(value)}, expected a number, a callable of the step, or None")


def check_step(argument: str, value: Any) -> int:
    """How many steps have been taken."""
    if isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_)) and value >= 0:
        return int(value)
    raise ValueError(f"{argument}: received {shown(value)}, expected an int of at least 0")


def check_history(argument: str, count: int, parameters: list) -> None:
    """``count`` copies of the parameters must fit into the memory that is free.

    Linux grants more memory than there is and ends the process when it is used. A GPU refuses by itself.
    """
    held = [p for p in parameters if isinstance(p, paddle.Tensor) and p._is_initialized()]
    on_cpu = [p for p in held if p.place.is_cpu_place()]
    needed = count * sum(math.prod(p.shape) * BYTES[dtype_name(p.dtype)] for p in on_cpu)
    free = free_memory()
    if needed > free:
        raise ValueError(
            f"{argument}: received {count}, which takes {needed / 2**30:.1f} GiB for as many copies of the parameters, "
            f"expected what fits into the {free / 2**30:.1f} GiB that are free; larger batches make for fewer of them"
        )
