# SPDX-License-Identifier: Apache-2.0
"""The norm of the whole gradient as the history knows it: gathers state, and leaves the sum to the native call.

In static graphs the state lies in the scope and is brought to the host first. Must not write the formula.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle.base.framework import in_dygraph_mode

from .. import native
from ..arguments import dtype_name, is_tensor
from ..distributed_tensors import copies_of, local
from ..sharding import summed
from ..state import ParameterState
from .step_inputs import StepInputs


class _Known(NamedTuple):
    """What is known of one parameter's gradient: tensors, or arrays from the scope of a static graph."""

    param: Any
    d: Any
    m: Any
    master: Any
    decay: Any
    #: the number of ranks of the group that know the same
    copies: int = 1


def gradient_norm(
    trained: list[tuple[Any, Any]], state: ParameterState, inputs: StepInputs, group: Any | None = None
) -> float:
    """The norm of ``d / seen + weight_decay * x`` over all parameters that have a history; inf if none has.

    Args:
        trained: parameters, each with its weight decay.
        state: their state.
        inputs: the number of slots and the batches' weights.
        group: the ranks over whose parameters it is; None stands for this process alone.

    Raises:
        TypeError: in a static graph, a weight decay is a variable.
    """
    in_graph = not in_dygraph_mode()
    found = [_in_scope(*pair, state) if in_graph else _held(*pair, state) for pair in trained]
    known = [entry for entry in found if entry is not None]
    # State may be made before the first step, for a checkpoint to be loaded or saved.
    stepped = in_graph or any(entry.m[0].item() for entry in known)
    if state.in_shards:
        # What several ranks have must count once.
        pairs = zip(trained, found)
        shares = [copies_of(param, group.nranks) for (param, _), entry in pairs if entry is not None]
        known = [entry._replace(copies=copies) for entry, copies in zip(known, shares)]
    if group is not None:
        # A rank whose part is empty takes part, too, or the others would wait for it.
        mine = paddle.to_tensor([_sum_of_squares(known, inputs), stepped], dtype="float64")
        total, count = summed(mine, group).tolist()
        return math.sqrt(total) if count else math.inf
    if not known or not stepped:
        return math.inf
    if not in_graph:
        return math.sqrt(_sum_of_squares(known, inputs))
    with paddle.base.dygraph.guard(paddle.CPUPlace()):
        on_host = [entry._replace(**{name: paddle.to_tensor(getattr(entry, name)) for name in ("param", "d", "m")})
                   for entry in known]  # fmt: skip
        return math.sqrt(_sum_of_squares(on_host, inputs))


def _held(param: Any, decay: Any, state: ParameterState) -> _Known | None:
    """What dygraph knows of a parameter; None if it has taken no step."""
    tensors = state.named(param)
    if tensors is None:
        return None
    return _Known(*map(local, (param, tensors["d"], tensors["m"], state.held_master(param))), decay)


def _in_scope(param: Any, decay: Any, state: ParameterState) -> _Known | None:
    """What the scope of a static graph knows of a parameter, as arrays; None if it has taken no step.

    Args:
        param: the parameter.
        decay: its weight decay, a number.
        state: the optimizer's state.

    Raises:
        TypeError: the weight decay is a variable, which has a value only while the graph runs.
    """
    tensors = state.named(param)
    if tensors is None:
        return None
    master = state.held_master(param)
    weights = param if master is None else master
    x, d, m = (state.value_of(tensor) for tensor in (weights, tensors["d"], tensors["m"]))
    if x is None or d is None or m is None or not m[0]:
        return None
    if is_tensor(decay):
        raise TypeError(
            f"gradient_norm: received a variable of the graph as weight_decay of parameter {param.name!r}, expected a "
            "number: a variable has a value only while the graph runs"
        )
    return _Known(_wide(x, weights), d, m, None, decay)


def _wide(array: np.ndarray, tensor: Any) -> np.ndarray:
    """Array in which 16-bit numbers have become float32, so that the native call needs no master weight.

    Args:
        array: the value of a tensor; bfloat16 comes as uint16, since NumPy does not have it.
        tensor: the tensor, whose dtype tells what the array means.
    """
    if dtype_name(tensor.dtype) == "bfloat16":
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if array.dtype == np.float16 else array


@paddle.no_grad()
def _sum_of_squares(known: list[_Known], inputs: StepInputs) -> float:
    """The square of the norm, by one native call for all parameters that share a device, a weight decay, and having
    master weights.
    """
    calls: dict[tuple, list[_Known]] = {}
    for entry in known:
        decay = id(entry.decay) if is_tensor(entry.decay) else entry.decay
        calls.setdefault((str(entry.m.place), entry.master is None, decay, entry.copies), []).append(entry)
    total = 0.0
    for same in calls.values():
        params, d, m, masters, decays, copies = zip(*same)
        place = m[0].place
        part = paddle.to_tensor([0.0], dtype="float64", place=place)
        native.asgd_norm(
            *(params, d, m, None if masters[0] is None else masters),
            *(inputs.n, inputs.index.in_use, inputs.weights_on(place), decays[0], part),
        )
        total += part.item() / copies[0]
    return total
