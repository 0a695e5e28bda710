# SPDX-License-Identifier: Apache-2.0
"""The forms of a gradient: dense or sparse, in one piece or strided, in the shape of its parameter.

Must not know any optimizer, nor change a value.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import _C_ops

from .distributed_tensors import is_cleared, is_distributed, placed_like


def shaped(param: Any, grad: Any) -> Any:
    """The gradient in its parameter's shape: Paddle's clips return [1] for a parameter of shape []."""
    return grad.reshape([]) if len(param.shape) == 0 and len(grad.shape) == 1 else grad


def native_form(param: Any, grad: Any) -> Any:
    """The gradient as a native call takes it: in one piece, and dense unless it is sparse on the CPU.

    The CPU kernels read the rows of a sparse gradient where they are and take no memory of the parameter's size. On a
    GPU each step makes a dense copy. On a mesh the gradient is placed as its parameter is, which sums partial sums.

    Raises:
        ValueError: the parameter is on a mesh, and the gradient is not, or has no memory.
    """
    if is_distributed(param):
        if not is_distributed(grad) or is_cleared(grad):
            what = "without memory" if is_distributed(grad) else "on no mesh"
            raise ValueError(
                f"gradient of parameter {param.name!r}: received a tensor {what}, expected one on its mesh, "
                "such as backward() leaves"
            )
        return placed_like(grad, param)
    if grad.is_selected_rows() and param.place.is_cpu_place():
        return grad
    return dense(param, grad)


def dense(param: Any, grad: Any) -> Any:
    """The gradient as a dense tensor in one piece; repeated rows of a sparse gradient are added up."""
    if grad.is_selected_rows():
        return _C_ops.add_n([paddle.zeros_like(param, dtype=grad.dtype), grad])
    return grad if grad.is_contiguous() else grad.contiguous()
