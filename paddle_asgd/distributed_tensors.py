# SPDX-License-Identifier: Apache-2.0
"""Tensors that ``paddle.distributed.shard_tensor`` has put on a mesh of ranks: their local parts, and placing others
like them. Must not know what a tensor is for; outside of a mesh everything here returns what it got.
"""

from __future__ import annotations

import math
from typing import Any

import paddle
from paddle import distributed


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor of dygraph lies on a mesh of ranks."""
    return isinstance(tensor, paddle.Tensor) and tensor.is_dist()


def is_sharded(tensor: Any) -> bool:
    """Whether this rank has only a part of a tensor."""
    return is_distributed(tensor) and any(placement.is_shard() for placement in tensor.placements)


def is_cleared(grad: Any) -> bool:
    """Whether a gradient on a mesh has no memory: ``clear_grad(set_to_zero=False)`` leaves such a tensor, not None."""
    return is_distributed(grad) and not grad._is_initialized()


def local(tensor: Any) -> Any:
    """This rank's part of a tensor, in the same memory and under the same name; any other tensor or None as it is."""
    if not is_distributed(tensor):
        return tensor
    part = tensor._local_value()
    part.name = tensor.name
    return part


def local_shape(tensor: Any) -> list[int]:
    """The shape of this rank's part of a tensor."""
    return list(tensor._local_shape if is_distributed(tensor) else tensor.shape)


def copies_of(param: Any, ranks: int) -> int:
    """How many ranks hold the same part of a parameter as this one.

    Args:
        param: the parameter.
        ranks: the number of all ranks, each of which has a tensor that lies on no mesh.
    """
    if not is_distributed(param):
        return ranks
    lengths = zip(param.process_mesh.shape, param.placements)
    return math.prod(length for length, placement in lengths if not placement.is_shard())


def check_mesh(argument: str, param: Any) -> None:
    """Refuse a parameter of which some rank has nothing, since all ranks must take part in the same sums.

    Args:
        argument: the parameter's place in a list, with which an error begins.
        param: a parameter, on a mesh or not.

    Raises:
        ValueError: its mesh lacks a rank, or its elements are sums over ranks that are still to be made.
    """
    if not is_distributed(param):
        return
    if not hasattr(paddle.base.core, "dtensor_from_local"):
        raise ValueError(f"{argument}, {param.name!r}: received a tensor on a mesh, expected that under Paddle 3 alone")
    here, all_ranks = len(param.process_mesh.process_ids), distributed.get_world_size()
    if here != all_ranks or any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{argument}, {param.name!r}: received {param.placements} on a mesh of {here} ranks, expected Shard and "
            f"Replicate on one of all {all_ranks}"
        )


def placed_beside(part: Any, param: Any, before: int) -> Any:
    """A tensor on the mesh of a parameter, whose local part is given and is not copied.

    Args:
        part: the part, whose last dimensions are those of the parameter's.
        param: the parameter.
        before: the number of dimensions before these.
    """
    placements = [distributed.Shard(p.get_dim() + before) if p.is_shard() else p for p in param.placements]
    return _on_mesh(part, param.process_mesh, placements)


def placed_like(value: Any, target: Any) -> Any:
    """A value as another tensor is placed: on its mesh with its placements, or whole if that is on no mesh.

    If it has to be sent, this is a collective of all ranks of the mesh.

    Args:
        value: a whole tensor, the same on every rank, or one on a mesh.
        target: the other tensor.
    """
    if not is_distributed(target):
        if not is_distributed(value):
            return value
        whole = [distributed.Replicate()] * len(value.placements)
        return distributed.reshard(value, value.process_mesh, whole)._local_value()
    if not is_distributed(value):
        return distributed.shard_tensor(value, target.process_mesh, target.placements)
    same = value.placements == target.placements and value.process_mesh == target.process_mesh
    return value if same else distributed.reshard(value, target.process_mesh, target.placements)


def rebuilt_like(part: Any, target: Any) -> Any:
    """A tensor whose local part is given, on the mesh of another tensor, if that is on one."""
    return _on_mesh(part, target.process_mesh, target.placements) if is_distributed(target) else part


def _on_mesh(part: Any, mesh: Any, placements: list) -> Any:
    tensor = paddle.base.core.dtensor_from_local(part, mesh, placements)
    tensor.name, tensor.persistable, tensor.stop_gradient = part.name, True, True
    return tensor
