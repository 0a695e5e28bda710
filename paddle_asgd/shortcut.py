# SPDX-License-Identifier: Apache-2.0
"""The shortcut of a dygraph step: answers whether this step is like the last one, and with which gradients.

Must not begin, take or end a step (fused.py); in the least doubt the answer is None, and the step goes the full way.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from . import native
from .arguments import is_tensor
from .options import Bucket, ParameterOptions


class Shortcut(NamedTuple):
    """What one full step found, for all trainable parameters in one bucket."""

    bucket: Bucket
    #: the multipliers of the learning rate that lay on the parameters
    multipliers: list
    multi_precision: bool

    @classmethod
    def of(
        cls, parameters: list, buckets: list[Bucket], options: ParameterOptions, multi_precision: bool
    ) -> Shortcut | None:
        """A shortcut from the buckets of a full step; None where it could not be right."""
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
        """The bucket of this step; None if it could be another than the last step's in more than its gradients."""
        if self.multi_precision is not multi_precision:
            return None
        grads = native.plain_gradients(parameters, self.bucket.params, self.multipliers)
        return None if grads is None else self.bucket._replace(grads=grads)


def _multiplier(param: Any) -> Any:
    """What multiplies the learning rate, if anything lies on the parameter; a plain tensor may have no place for it."""
    attributes = getattr(param, "__dict__", {}).get("optimize_attr")
    return (attributes or {}).get("learning_rate")


def _same(left: list, right: list) -> bool:
    """Whether these are the same objects. Comparing tensors with == would compute."""
    return len(left) == len(right) and all(map(operator.is_, left, right))
