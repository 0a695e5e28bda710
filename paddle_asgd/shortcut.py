"""The shortcut of a dygraph step: the lists of the last full step serve again while nothing has changed that made them.

Must not compute or decide anything of its own: in the least doubt it steps aside, and the step goes the full way.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

from . import native
from .arguments import is_tensor

if TYPE_CHECKING:
    from .fused import Bucket, FusedOptimizer


class StepPlan(NamedTuple):
    """What one full step found, for all trainable parameters in one bucket."""

    bucket: Bucket
    #: the multipliers of the learning rate that lay on the parameters
    multipliers: list
    multi_precision: bool

    @classmethod
    def of(cls, optimizer: FusedOptimizer, buckets: list[Bucket]) -> StepPlan | None:
        """A plan from the buckets of a full step; None where a shortcut could not be right."""
        if len(buckets) != 1 or not _is_plain(optimizer) or optimizer._options.has_groups:
            return None
        bucket = buckets[0]
        if not _same(bucket.params, _trainable(optimizer)):
            return None
        if is_tensor(bucket.learning_rate) or any(param.is_dist() for param in bucket.params):
            return None
        if any(optimizer._options.of(param).regularizer is not None for param in bucket.params):
            return None
        multipliers = [_multiplier(param) for param in bucket.params]
        return cls(bucket._replace(grads=[]), multipliers, optimizer._multi_precision)

    def run(self, optimizer: FusedOptimizer) -> bool:
        """Take the step; False if the full way must be gone, and then nothing has been done."""
        bucket = self.bucket
        if not _is_plain(optimizer) or self.multi_precision is not optimizer._multi_precision:
            return False
        grads = native.plain_gradients(optimizer._parameter_list, bucket.params, self.multipliers)
        if grads is None:
            return False
        optimizer._begin_step()
        try:
            optimizer._take([bucket._replace(grads=grads)], None, True)
        except ValueError:
            # A strided or ill-fitting gradient, or a sparse one on a GPU. The full way knows what to do or says what is
            # wrong.
            return False
        optimizer._end_step()
        return True


def _multiplier(param: Any) -> Any:
    """What multiplies the learning rate, if anything lies on the parameter; a plain tensor may have no place for it."""
    attributes = getattr(param, "__dict__", {}).get("optimize_attr")
    return (attributes or {}).get("learning_rate")


def _trainable(optimizer: FusedOptimizer) -> list:
    return [param for param in optimizer._parameter_list if not param.stop_gradient]


def _same(left: list, right: list) -> bool:
    """Whether these are the same objects. Comparing tensors with == would compute."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _is_plain(optimizer: FusedOptimizer) -> bool:
    """Nothing stands between the gradients and the native call."""
    found_inf = optimizer._auxiliary_vars.get("found_inf")
    return optimizer._grad_clip is None and (found_inf is None or found_inf is False)
