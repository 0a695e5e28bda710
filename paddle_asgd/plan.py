"""The shortcut of a dygraph step: the lists of the last full step serve again while nothing has changed that made them.

Must not compute or decide anything of its own: in the least doubt it steps aside, and the step goes the full way.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

from .arguments import is_tensor

if TYPE_CHECKING:
    from .fused import Bucket, FusedOptimizer

_NOTHING: dict = {}


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
        multipliers = _multipliers([_own_attributes(param) for param in bucket.params])
        return cls(bucket._replace(grads=[]), multipliers, optimizer._multi_precision)

    def run(self, optimizer: FusedOptimizer) -> bool:
        """Take the step; False if the full way must be gone, and then nothing has been done."""
        bucket = self.bucket
        if not _is_plain(optimizer) or self.multi_precision is not optimizer._multi_precision:
            return False
        if not _same(bucket.params, _trainable(optimizer)):
            return False
        # Lists, for they are built faster than any() asks a generator for its next.
        own = [_own_attributes(param) for param in bucket.params]
        if any([a.get("regularizer") is not None or a.get("main_grad") is not None for a in own]):
            return False
        if not _same(_multipliers(own), self.multipliers):
            return False
        grads = [param.grad for param in bucket.params]
        if any([grad is None for grad in grads]):
            return False
        rate = optimizer._learning_rate_of_step(bucket.learning_rate)
        try:
            optimizer._update(bucket._replace(grads=grads), rate, optimizer._decay_of_step(bucket.weight_decay), None)
        except ValueError:
            # A sparse, strided or ill-fitting gradient. The full way knows what to do or says what is wrong.
            return False
        return True


def _own_attributes(param: Any) -> dict:
    """What users and Paddle have set on a parameter; a plain tensor may have nothing to keep it in."""
    return getattr(param, "__dict__", _NOTHING)


def _multipliers(own: list[dict]) -> list:
    return [(a.get("optimize_attr") or _NOTHING).get("learning_rate") for a in own]


def _trainable(optimizer: FusedOptimizer) -> list:
    return [param for param in optimizer._parameter_list if not param.stop_gradient]


def _same(left: list, right: list) -> bool:
    """Whether these are the same objects. Comparing tensors with == would compute."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _is_plain(optimizer: FusedOptimizer) -> bool:
    """Nothing stands between the gradients and the native call."""
    found_inf = optimizer._auxiliary_vars.get("found_inf")
    return optimizer._grad_clip is None and (found_inf is None or found_inf is False)
