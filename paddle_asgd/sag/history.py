# SPDX-License-Identifier: Apache-2.0
"""The narrow history: which parameters have one, what form its tensors have, and what a checkpoint must hold of it.

Must not encode or decode a number (csrc/block_scale.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..arguments import BYTES, FLOATING, dtype_name, refuse_state, shown
from ..distributed_tensors import local_shape

#: What ``history_dtype`` may be besides None; each takes less memory than the one before.
HISTORY_DTYPES = ("int16", "int8")
#: The consecutive elements of a slot that share a scale (``kScaleBlock`` of csrc/block_scale.h), and a scale's bytes.
BLOCK, SCALE_BYTES = 128, 4
#: Tensors with fewer elements keep exact gradients: they take little memory, and biases and norms matter much.
SMALLEST = 4096
_STORED_BYTES = {"int16": 2, "int8": 1}


def check_history_dtype(argument: str, value: Any, n: int) -> str | None:
    """Check the ``history_dtype`` of an optimizer or of a group, and return it.

    Args:
        argument: the name with which an error begins.
        value: what the user passed.
        n: the number of slots.

    Raises:
        TypeError: the value is neither a string nor None.
        ValueError: it is an unknown name, or there is one slot.

    Examples:
        >>> check_history_dtype("history_dtype", "int16", 3)
        'int16'
    """
    if value is None:
        return None
    expected = f"expected {', '.join(map(repr, HISTORY_DTYPES))} or None"
    if not isinstance(value, str):
        raise TypeError(f"{argument}: received {shown(value)}, {expected}; pass the name as a string")
    if value not in HISTORY_DTYPES:
        raise ValueError(f"{argument}: received {value!r}, {expected}, which keeps the gradients as they are")
    if n == 1:
        raise ValueError(
            f"{argument}: received {value!r} with batch_num=1, expected None, because every step would go along the "
            "rounded gradient instead of the gradient; leave it out, or split the data into batches"
        )
    return value


def narrow_dtype(param: Any, history_dtype: str | None) -> str | None:
    """The dtype in which a parameter's history is stored if it is narrow; None if it is exact.

    Args:
        param: the parameter.
        history_dtype: what the user has chosen for it.
    """
    return history_dtype if history_dtype is not None and math.prod(param.shape) >= SMALLEST else None


def scale_shape(shape: Sequence[int], n: int) -> list[int]:
    """Shape of the scales of a narrow history: one for each block of each slot.

    Args:
        shape: the parameter's shape.
        n: the number of slots.

    Examples:
        >>> scale_shape([50, 100], 3)
        [3, 40]
    """
    return [n, -(-math.prod(shape) // BLOCK)]


def history_bytes(param: Any, n: int, history_dtype: str | None) -> int:
    """Bytes of a parameter's history with its scales on this rank, if its gradients have the parameter's dtype.

    Args:
        param: the parameter.
        n: the number of slots.
        history_dtype: what the user has chosen for it.
    """
    narrow = narrow_dtype(param, history_dtype)
    if narrow is None:
        return n * math.prod(local_shape(param)) * BYTES[dtype_name(param.dtype)]
    return n * math.prod(param.shape) * _STORED_BYTES[narrow] + SCALE_BYTES * math.prod(scale_shape(param.shape, n))


def check_kept_history(param: Any, history: Any, history_dtype: str | None) -> None:
    """Refuse options of edited groups with another history than the one that the parameter has.

    Args:
        param: the parameter.
        history: its stored gradients.
        history_dtype: what the edited groups say.

    Raises:
        ValueError: the history would have to be stored anew.
    """
    held, wanted = _narrow_name(history), narrow_dtype(param, history_dtype)
    if held != wanted:
        raise ValueError(
            f"param_groups: received history_dtype={history_dtype!r} for parameter {param.name!r}, whose history is "
            f"{dtype_name(history.dtype)}, expected {held!r}, with which it began; set another before the first step, "
            "or create a new optimizer, which begins with an empty history"
        )


def check_loaded_history(param: Any, history: Any, history_dtype: str | None) -> None:
    """Refuse a checkpoint whose history has another ``history_dtype``.

    Args:
        param: the parameter.
        history: its stored gradients in the checkpoint, a tensor.
        history_dtype: what the optimizer has for it.

    Raises:
        ValueError: the checkpoint's history is of another kind. Nothing has been loaded.
    """
    name = dtype_name(history.dtype)
    received, expected = _narrow_name(history), narrow_dtype(param, history_dtype)
    if received == expected or math.prod(param.shape) < SMALLEST or name not in (*HISTORY_DTYPES, *FLOATING):
        return  # or of no history at all, which is refused like any other entry
    refuse_state(
        f"the history 'y' of parameter {param.name!r} is {name}, expected "
        f"{expected or dtype_name(param.dtype)}, for the optimizer has history_dtype={history_dtype!r}; create it with "
        f"history_dtype={received!r}, as the state was made, or begin with an empty history"
    )


def _narrow_name(history: Any) -> str | None:
    """The ``history_dtype`` of stored gradients."""
    name = dtype_name(history.dtype)
    return name if name in HISTORY_DTYPES else None
