"""The norm of the whole gradient as far as the history knows it: gathers state, and leaves the sum to the native call.

In static graphs the state lies in the scope, and is brought to the host first. Must not write the formula.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle.base.framework import in_dygraph_mode

from .. import native
from ..arguments import dtype_name, is_tensor

if TYPE_CHECKING:
    from .asgd import ASGD


def gradient_norm(optimizer: ASGD) -> float:
    """The square root of the sum over all parameters that are trained now and have a history; inf if none has."""
    created = optimizer._state.created
    if optimizer._parameter_list is not None:
        # A wrapper that shards the optimizer takes parameters out of the list, and so may a user.
        listed = {param.name for param in optimizer._parameter_list}
        created = [param for param in created if param.name in listed]
    trained = [param for param in created if not param.stop_gradient]
    rows = [row for param in trained for row in _row(optimizer, param)]
    if not rows:
        return math.inf
    if in_dygraph_mode():
        return _norm(optimizer, rows)
    with paddle.base.dygraph.guard(paddle.CPUPlace()):
        return _norm(optimizer, [(*map(paddle.to_tensor, row[:3]), None, row[4]) for row in rows])


def _row(optimizer: ASGD, param: Any) -> list[tuple]:
    """The parameter, d, m, its master weight and its decay; nothing if it has taken no step."""
    state = optimizer._state.of(param)
    if state is None:
        return []
    decay = optimizer._options.of(param).weight_decay
    if in_dygraph_mode():
        return [(param, state[0], state[2], optimizer._state.held_master(param), decay)]
    weights = optimizer._state.held_master(param)
    arrays = [optimizer._state.value_of(t) for t in (param if weights is None else weights, state[0], state[2])]
    if any(array is None for array in arrays) or not arrays[2][0]:
        return []
    if is_tensor(decay):
        raise TypeError(
            f"gradient_norm: received a variable of the graph as weight_decay of parameter {param.name!r}, expected a "
            "number: a variable has a value only while the graph runs"
        )
    return [(_wide(arrays[0], param if weights is None else weights), *arrays[1:], None, decay)]


def _wide(array: np.ndarray, tensor: Any) -> np.ndarray:
    """16 bits as float32, which the native call can do without a master weight; NumPy has no bfloat16."""
    if dtype_name(tensor.dtype) == "bfloat16":
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if array.dtype == np.float16 else array


@paddle.no_grad()
def _norm(optimizer: ASGD, rows: list[tuple]) -> float:
    calls: dict[tuple, list[tuple]] = {}
    for row in rows:
        place, decay = row[2].place, row[4]
        key = (str(place), row[3] is None, id(decay) if is_tensor(decay) else decay)
        calls.setdefault(key, []).append(row)
    total = 0.0
    for same in calls.values():
        params, d, m, masters, decays = zip(*same)
        place = m[0].place
        part = paddle.to_tensor([0.0], dtype="float64", place=place)
        native.asgd_norm(
            params,
            d,
            m,
            None if masters[0] is None else masters,
            optimizer.batch_num,
            optimizer._inputs.index.in_use,
            optimizer._inputs.weights_on(place),
            decays[0],
            part,
        )
        total += part.item()
    return math.sqrt(total)
