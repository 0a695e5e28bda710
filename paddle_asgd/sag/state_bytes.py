# SPDX-License-Identifier: Apache-2.0
"""What an ASGD's state takes of the memory, counted by its purposes. Must not look at the machine (free_memory.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..arguments import BYTES
from ..distributed_tensors import local_shape
from ..state import ParameterState


class StateBytes(NamedTuple):
    """Bytes of an optimizer's state, as ``ASGD.state_bytes`` counts them.

    Examples:
        >>> StateBytes(history=6000, scales=0, sums=2000, master_weights=2000).total
        10000
    """

    #: the stored gradients y
    history: int
    #: the scales of narrow histories, y_scale
    scales: int
    #: the sums d
    sums: int
    #: the float32 copies of 16-bit parameters
    master_weights: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self)


def state_bytes(params: Iterable[Any], state: ParameterState) -> StateBytes:
    """Count the bytes of the parameters' state, whether it has been made or not.

    Args:
        params: the parameters; frozen ones count only if they have state.
        state: their state.
    """
    history = scales = sums = masters = 0
    for param in params:
        if param.stop_gradient and state.of(param) is None:
            continue
        held = state.bytes_of(param)
        history, scales, sums = history + held["y"], scales + held.get("y_scale", 0), sums + held["d"]
        if state.has_master(param):
            masters += math.prod(local_shape(param)) * BYTES["float32"]
    return StateBytes(history, scales, sums, masters)
