# SPDX-License-Identifier: Apache-2.0
"""Lets parts of Paddle run on CPUs over gloo that ask for a GPU, though they do nothing that needs one.

Must not change what they compute: each stand-in does what the original does, by another collective or on the host.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.distributed import fleet
from paddle.distributed.fleet.utils import tensor_fusion_helper


class _Done:
    """A task that has ended."""

    def wait(self) -> None:
        pass


def _reduce_scatter(part: Any, whole: Any, op: Any = None, group: Any = None, sync_op: bool = True) -> _Done:
    """By a sum that every rank gets, since gloo has no other."""
    total = whole.clone()
    paddle.distributed.all_reduce(total, op=op, group=group)
    length = part.shape[0]
    paddle.assign(total[group.rank * length : (group.rank + 1) * length], part)
    return _Done()


def _with_gradients(reduce: Any) -> Any:
    """Copy the gradients into the buffer that is reduced. From the second step on they lie elsewhere, because
    ``backward`` puts others in the place of those that were cleared; Paddle's own optimizers would miss them, too.
    """

    def reduced(buffer: Any) -> None:
        for param in buffer.params:
            begin = buffer._sharding_param_grad_view[param.name]._index
            place = buffer.grad_storage._slice(begin, begin + param.numel().item())
            if param.grad is not None and not param.grad._is_shared_buffer_with(buffer.grad_storage):
                place.copy_(param.grad.flatten(), True)
        reduce(buffer)

    return reduced


def allow_slices() -> None:
    """Let sharding stage 1 split parameters by elements (``split_param``)."""
    buffers = tensor_fusion_helper.FusedCommBuffer
    buffers._comm_grads = _with_gradients(buffers._comm_grads)
    tensor_fusion_helper.__current_device_type__ = "gpu"
    tensor_fusion_helper._share_tensor_ipc_meta = lambda tensor: None
    paddle.distributed.reduce_scatter = _reduce_scatter


def allow_loading() -> None:
    """Let ``paddle.distributed.load_state_dict`` send tensors of the host, which it copies to a GPU first."""
    paddle.Tensor.cuda = lambda tensor: tensor.detach().clone()


def shard(degree: int, by_elements: bool = False) -> None:
    """Have fleet divide parameters among ranks from now on."""
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 1, "sharding_degree": degree}
    strategy.hybrid_configs["sharding_configs"].split_param = by_elements
    fleet.init(is_collective=True, strategy=strategy)
