# SPDX-License-Identifier: Apache-2.0
"""The shortcut of a dygraph step: the native plan of a step that is like the last one, and what it was made of.

Must not begin, take or end a step (fused.py). What the plan compares at each step is in csrc/paddle_plan.h. In the
least doubt it refuses, and the step goes the full way.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import native
from .arguments import is_tensor
from .options import Bucket, ParameterOptions
from .state import StateTensor


class Shortcut(NamedTuple):
    """What one full step found out, for an optimizer whose trainable parameters all are in one bucket.

    A step that is like the last one then needs only its gradients, which C++ collects in one pass over the parameters.
    """

    bucket: Bucket
    #: the native plan, which finds the gradients and compares everything else
    plan: Any

    @classmethod
    def of(
        cls,
        parameters: list,
        buckets: list[Bucket],
        options: ParameterOptions,
        layout: Sequence[StateTensor],
        dictionaries: list,
    ) -> Shortcut | None:
        """Make a shortcut from a full step; None where it could be wrong.

        Args:
            parameters: all parameters of the optimizer.
            buckets: what the step updated.
            options: the parameters' options. There is no shortcut with groups, which may be edited, or with
                regularizers.
            layout: the entries of a bucket's state.
            dictionaries: what must be as it is at the next step (``native.step_plan``).
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
        whole, partial = ([t for e, t in zip(layout, bucket.state) if e.partial == p] for p in (False, True))
        # The lists that may be shorter come last.
        lists = [tensors for tensors in (bucket.params, *whole, bucket.masters, *partial) if tensors is not None]
        multipliers = [_multiplier(param) for param in bucket.params]
        plan = native.step_plan(parameters, bucket.params, multipliers, lists, dictionaries)
        return None if plan is None else cls(bucket._replace(grads=[]), plan)


def _multiplier(param: Any) -> Any:
    """Multiplier of the learning rate that lies on a parameter; None if it has none, as a plain tensor does."""
    attributes = getattr(param, "__dict__", {}).get("optimize_attr")
    return (attributes or {}).get("learning_rate")


def _same(left: list, right: list) -> bool:
    """Whether two lists hold the same objects; ``==`` between tensors would compute."""
    return len(left) == len(right) and all(map(operator.is_, left, right))
