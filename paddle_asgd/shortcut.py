# SPDX-License-Identifier: Apache-2.0
"""The shortcut of a dygraph step: answers whether this step is like the last one, and with which gradients.

Must not begin, take or end a step (fused.py). In the least doubt the answer is None, and the step goes the full way.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from . import native
from .arguments import is_tensor
from .options import Bucket, ParameterOptions


class Shortcut(NamedTuple):
    """What one full step found out, for an optimizer whose trainable parameters all are in one bucket.

    A step that is like the last one then needs only its gradients, which C++ collects in one pass over the parameters.
    """

    bucket: Bucket
    #: for each parameter the multiplier of the learning rate that lay on it
    multipliers: list
    multi_precision: bool

    @classmethod
    def of(
        cls, parameters: list, buckets: list[Bucket], options: ParameterOptions, multi_precision: bool
    ) -> Shortcut | None:
        """Make a shortcut from a full step; None where it could be wrong.

        Args:
            parameters: all parameters of the optimizer.
            buckets: what the step updated.
            options: the parameters' options. There is no shortcut with groups, which may be edited, or with
                regularizers.
            multi_precision: whether 16-bit parameters have master weights.
        """
        if len(buckets) != 1 or options.has_groups:
            return None
        bucket = buckets[0]
        if not _same(bucket.params, [param for param in parameters if not param.stop_gradient]):
            return None
        if is_tensor(bucket.learning_rate) or any(param.is_dist() for param in bucket.params):
            return None
        if any(options.of(param).regularizer is not None for param in bucket.params):
            return None
        return cls(bucket._replace(grads=[]), [_multiplier(param) for param in bucket.params], multi_precision)

    def bucket_now(self, parameters: list, multi_precision: bool) -> Bucket | None:
        """Bucket of this step, with its gradients; None if anything else might differ from the last step.

        Args:
            parameters: all parameters of the optimizer.
            multi_precision: whether 16-bit parameters have master weights now.
        """
        if self.multi_precision is not multi_precision:
            return None
        grads = native.plain_gradients(parameters, self.bucket.params, self.multipliers)
        return None if grads is None else self.bucket._replace(grads=grads)


def _multiplier(param: Any) -> Any:
    """Multiplier of the learning rate that lies on a parameter; None if it has none, as a plain tensor does."""
    attributes = getattr(param, "__dict__", {}).get("optimize_attr")
    return (attributes or {}).get("learning_rate")


def _same(left: list, right: list) -> bool:
    """Whether two lists hold the same objects; ``==`` between tensors would compute."""
    return len(left) == len(right) and all(map(operator.is_, left, right))
