# SPDX-License-Identifier: Apache-2.0
"""What several processes must know together: which ranks share an optimizer's parameters or average its gradients, and
sums over them.

All functions that take a group are collectives: every rank of it must call them, in the same order. Must not know what
is summed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import paddle
from paddle.base.framework import in_dygraph_mode
from paddle.distributed import fleet

from .arguments import refuse_state
from .entries import entry_value, number_entry

#: The entry of a checkpoint that names the rank whose slices it is of.
_SLICES = "slices_of_rank"


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


def whole_group(ranks: int) -> Any | None:
    """All ranks, if they are as many as these, at least two, and run in dygraph; else None."""
    running = in_dygraph_mode() and paddle.distributed.is_initialized()
    return paddle.distributed.get_group(0) if running and paddle.distributed.get_world_size() == ranks > 1 else None


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


def single_holders(held: list[bool], group: Any) -> list[int | None]:
    """Which rank of a group, by its number in it, has each of some things alone; None of what none or several have.

    Args:
        held: of each thing, whether this rank has it; as many on every rank.
        group: the ranks.
    """
    rows = gathered([float(here) for here in held], group)
    ranks = [[rank for rank, here in enumerate(column) if here] for column in zip(*rows)]
    return [having[0] if len(having) == 1 else None for having in ranks]


def send_from(rank: int, tensor: Any, group: Any) -> None:
    """Write one rank's tensor into those of all others.

    Args:
        rank: the number of that rank in the group.
        tensor: of the same shape and dtype on every rank.
        group: the ranks.
    """
    paddle.distributed.broadcast(tensor, src=group.ranks[rank], group=group)


def add_in_place(tensor: Any, group: Any) -> None:
    """Write the sum of the ranks' tensors into each of them."""
    paddle.distributed.all_reduce(tensor, group=group)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def give_memory_to_slices(whole: Iterable[Any], parts: Iterable[Any]) -> None:
    """Give memory to the slices that fleet's ``split_param`` has put in place of parameters: part of that of these.

    The wrapper itself does so with its first step. A slice of which this rank has nothing stays without.

    Args:
        whole: the parameters that the optimizer was made with.
        parts: the list that a wrapper has put in its place.

    Raises:
        RuntimeError: the wrapper's buffers cannot be found.
    """
    named = {param.name: param for param in parts}
    if all(named.get(param.name, param) is param for param in whole):
        return
    buffers = [buffer for buffer in (getattr(param, "comm_buffer_ref", lambda: None)() for param in whole) if buffer]
    for buffer in buffers:
        for param in buffer.params:
            view = buffer._sharding_param_grad_view[param.name]
            if view.has_effective_slice_param:
                view.fill_slice_param(named[param.name])
    if not buffers and not any(param._is_initialized() for param in named.values()):
        raise RuntimeError(
            "sharded_state_dict: received a call before the first step under a wrapper that gives the parameters "
            "memory with it, expected one after; take a step first"
        )


def state_of_part(state_dict: dict[str, Any], names: Iterable[str], whole: list, parts: list) -> dict[str, Any]:
    """The checkpoint of a process to which a wrapper has left a part of the parameters.

    Args:
        state_dict: what its optimizer has collected.
        names: the keys of the numbers that belong to no parameter.
        whole: the parameters that the optimizer was made with.
        parts: the list that the wrapper has put in its place.
    """
    rank = _rank_of_slices(whole, parts)
    slices = {} if rank is None else {_SLICES: number_entry([rank], "int64")}
    return with_copies({**state_dict, **slices}, [*names, _SLICES], parts)


def state_for_part(state_dict: dict[str, Any], names: Iterable[str], whole: list, parts: list) -> dict[str, Any]:
    """A checkpoint as the optimizer itself would have written it, perhaps with more parameters than it has.

    Args:
        state_dict: what a user or a wrapper loads.
        names: the keys of the numbers that belong to no parameter.
        whole: the parameters that the optimizer was made with.
        parts: its list now, which may be a wrapper's.

    Raises:
        ValueError: copies of a number differ, or it is of another rank's slices, which have the same names as this
            rank's and may have the same shapes.
    """
    rest = without_copies(state_dict, [*names, _SLICES])
    entry, own = rest.pop(_SLICES, None), _rank_of_slices(whole, parts)
    rank = None if entry is None else entry_value(entry)
    if rank is not None and rank != own:
        refuse_state(
            f"it is of the slices of parameters that rank {rank} had, expected this rank's own; for others use "
            "sharded_state_dict()"
        )
    if own is not None:
        give_memory_to_slices(whole, parts)
    return rest


def _rank_of_slices(whole: list, parts: list) -> int | None:
    """The rank in its sharding group of a process that has slices of parameters; None if it has whole ones."""
    named = {param.name: param for param in whole}
    group = parts_group()
    return None if group is None or all(named.get(param.name) is param for param in parts) else group.rank


def with_copies(state_dict: dict[str, Any], names: Iterable[str], params: Iterable[Any]) -> dict[str, Any]:
    """A checkpoint in which each parameter has copies of the numbers that belong to none.

    fleet's wrapper loads only those entries whose keys contain the name of a parameter of this rank.

    Args:
        state_dict: what an optimizer has collected.
        names: the keys of the numbers.
        params: the parameters of this rank.

    Examples:
        >>> weight = paddle.zeros([2])
        >>> weight.name = "w"
        >>> with_copies({"batch_num": 3}, ["batch_num"], [weight])
        {'batch_num': 3, 'w_copy_of_batch_num': 3}
    """
    held = [name for name in names if name in state_dict]
    return {**state_dict, **{f"{param.name}_copy_of_{name}": state_dict[name] for param in params for name in held}}


def without_copies(state_dict: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A checkpoint without such copies, in which the numbers have their own keys again.

    Args:
        state_dict: what a user or a wrapper loads.
        names: the keys of the numbers.

    Raises:
        ValueError: two copies of a number differ.

    Examples:
        >>> without_copies({"w_copy_of_batch_num": 3, "b_copy_of_batch_num": 3, "w_m_0": 1}, ["batch_num"])
        {'w_m_0': 1, 'batch_num': 3}
    """
    pattern = re.compile(rf".+_copy_of_({'|'.join(map(re.escape, names))})")
    matches = {key: pattern.fullmatch(key) for key in state_dict if isinstance(key, str)}
    rest = {key: value for key, value in state_dict.items() if not matches.get(key)}
    for key, match in matches.items():
        if match is None:
            continue
        first, copy = rest.setdefault(match[1], state_dict[key]), state_dict[key]
        if first is not copy and not np.array_equal(entry_value(first), entry_value(copy)):
            refuse_state(f"entry {key!r} differs from {match[1]!r}, of which it is a copy")
    return rest


def _topology() -> Any | None:
    """What fleet knows of its groups; None before ``fleet.init``."""
    return getattr(fleet.fleet, "_hcg", None)
