# SPDX-License-Identifier: Apache-2.0
"""What several processes must know together: which ranks share an optimizer's parameters or average its gradients, and
sums over them.

All functions that take a group are collectives: every rank of it must call them, in the same order. Must not know what
is summed.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.distributed import fleet


def parts_group() -> Any | None:
    """The ranks among which fleet divides each optimizer's parameters (sharding); None if it divides none."""
    topology = _topology()
    if topology is None or topology.get_sharding_parallel_world_size() < 2:
        return None
    return topology.get_sharding_parallel_group()


def replicas_group() -> Any | None:
    """The ranks that train the same parameters on parts of each batch (data parallelism); None in a single process."""
    topology = _topology()
    if topology is not None:
        return topology.get_data_parallel_group() if topology.get_data_parallel_world_size() > 1 else None
    return paddle.distributed.get_group(0) if paddle.distributed.get_world_size() > 1 else None


@paddle.no_grad()
def summed(values: Any, group: Any) -> Any:
    """Sum of a tensor over the ranks of a group, the same bits on each. Does not wait for a device.

    Args:
        values: a float64 tensor of the same shape on every rank; it stays as it is.
        group: the ranks.
    """
    total = values.clone()
    paddle.distributed.all_reduce(total, group=group)
    return total


def gathered(numbers: list[float], group: Any | None) -> list[list[float]]:
    """The numbers of every rank of a group, in the order of the ranks; without a group this process's alone.

    Args:
        numbers: as many on every rank.
        group: the ranks, or None.
    """
    if group is None:
        return [numbers]
    rows = [[0.0] * len(numbers) for _ in range(group.nranks)]
    rows[group.rank] = numbers
    return summed(paddle.to_tensor(rows, dtype="float64"), group).tolist()


def _topology() -> Any | None:
    """What fleet knows of its groups; None before ``fleet.init``."""
    return getattr(fleet.fleet, "_hcg", None)
