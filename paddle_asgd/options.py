# SPDX-License-Identifier: Apache-2.0
"""What each parameter is updated with: its group's options, its own, the optimizer's defaults, and which of them wins.

Must not write anything onto a parameter, where the next optimizer would find it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any, Callable, NamedTuple

import paddle
from paddle.base.framework import in_dygraph_mode
from paddle.regularizer import WeightDecayRegularizer

from .arguments import NO_CHECKS, GroupChecks, check_groups, check_number, is_tensor
from .distributed_tensors import is_distributed, is_sharded, local
from .state import ParameterState, state_guard

#: Parameters, each with its gradient.
Pairs = list[tuple[Any, Any]]


class Bucket(NamedTuple):
    """Parameters that one native call updates, in parallel lists."""

    params: list
    grads: list
    #: for each entry of the layout a list of tensors; None if none of these parameters has the entry. The list of a
    #: partial entry is shorter than ``params`` if some of them never have it
    state: tuple[list | None, ...]
    masters: list | None
    #: what these parameters share: the multiplier of the learning rate, and the weight decay
    learning_rate: Any
    weight_decay: Any

    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(math.prod(param.shape) for param in self.params)

    def on_this_rank(self) -> Bucket:
        """The bucket with this rank's part of each tensor that is on a mesh."""
        if not any(map(is_distributed, self.params)):
            return self
        lists = [None if tensors is None else list(map(local, tensors)) for tensors in (*self.state, self.masters)]
        params, grads = ([local(tensor) for tensor in tensors] for tensors in (self.params, self.grads))
        return self._replace(params=params, grads=grads, state=tuple(lists[:-1]), masters=lists[-1])


class Options(NamedTuple):
    """What one parameter is updated with, apart from what all parameters share."""

    #: multiplier of the optimizer's learning rate; a tensor replaces the learning rate altogether, as in Paddle
    learning_rate: Any
    #: decay that is applied outside the gradient: a number or a tensor
    weight_decay: Any
    #: decay that Paddle's own path adds to the gradient
    regularizer: WeightDecayRegularizer | None


class ParameterOptions:
    """The options of each parameter, found by the parameter's name: wrappers that shard an optimizer replace its
    groups.

    Args:
        groups: checked groups (``arguments.check_groups``); None if the user gave a list of parameters. The user may
            edit them in place later.
        weight_decay: the optimizer's: None, a number, a tensor or a regularizer.
        reserved: names of the options of the whole optimizer, which a group cannot have.
        checks: the options that a group of this optimizer has besides those of every optimizer.
    """

    def __init__(
        self,
        groups: list[dict] | None,
        weight_decay: Any,
        reserved: Collection[str] = (),
        checks: GroupChecks = NO_CHECKS,
    ) -> None:
        self._weight_decay = weight_decay
        self._reserved = reserved
        self._checks = checks
        #: None without groups; the user may have edited them since they were checked
        self.groups = groups
        self._checked = [dict(group, params=list(group["params"])) for group in groups or ()]
        self._group_of = {param.name: group for group in groups or () for param in group["params"]}
        self._checked_of = {param.name: group for group in self._checked for param in group["params"]}

    def edited(self) -> ParameterOptions | None:
        """Check the groups again if the user has edited them since they were checked.

        Returns:
            Options by the groups as they are now; None if nobody has edited them.

        Raises:
            TypeError, ValueError: the groups are such as the constructor would refuse.
        """
        if self.groups is None or _same_groups(self.groups, self._checked):
            return None
        checked = check_groups("param_groups", self.groups, self._reserved, self._checks)
        for group, copy in zip(self.groups, checked):
            group.update(copy)
        return self.of_groups(self.groups)

    def of_groups(self, groups: list[dict]) -> ParameterOptions:
        """Options by other groups, which have been checked, with the optimizer's own defaults."""
        return ParameterOptions(groups, self._weight_decay, self._reserved, self._checks)

    @property
    def parameters(self) -> list:
        """All parameters of all groups, as they were when the groups were checked."""
        return [param for group in self._checked for param in group["params"]]

    def of(self, param: Any) -> Options:
        """Options of one parameter. Its own regularizer wins over its group's weight_decay, and that over the
        optimizer's.

        Args:
            param: a parameter. Its group, or else its ``optimize_attr``, has the multiplier of the learning rate.

        Raises:
            TypeError, ValueError: the multiplier that lies on the parameter is not a finite number of at least 0.
        """
        group = self._group_of.get(param.name, {}) if self._group_of else {}
        attributes = getattr(param, "optimize_attr", None) or {}
        multiplier = group.get("learning_rate", attributes.get("learning_rate", 1.0))
        if not is_tensor(multiplier) and multiplier != 1.0:
            multiplier = check_number(f"learning_rate of parameter {param.name!r}", multiplier)
        decay = getattr(param, "regularizer", None)
        if decay is None:
            decay = group.get("weight_decay")
        if decay is None:
            decay = self._weight_decay
        if isinstance(decay, WeightDecayRegularizer):
            return Options(multiplier, 0.0, decay)
        return Options(multiplier, 0.0 if decay is None else decay, None)

    def further(self, param: Any, key: str, default: Any) -> Any:
        """A parameter's value of an option that only this optimizer has: its group's, even if that is None, or else
        the optimizer's. An edit of a group counts once it has been checked, because state may depend on the value.

        Args:
            param: the parameter.
            key: the name of the option.
            default: the optimizer's value.
        """
        return self._checked_of.get(param.name, {}).get(key, default) if self._checked_of else default

    def clip_of(self, param: Any, default: Any) -> tuple[int | None, Any]:
        """Clip that acts on a parameter's gradient, and the group that it belongs to.

        Args:
            param: the parameter.
            default: the optimizer's clip, for groups that have none of their own.

        Returns:
            The identity of the group, or None if the optimizer's clip acts; and the clip, which is None where a group
            has switched clipping off.
        """
        group = self._group_of.get(param.name, {})
        return (id(group), group["grad_clip"]) if "grad_clip" in group else (None, default)

    @property
    def has_groups(self) -> bool:
        """Whether there are groups, which may be edited between two steps."""
        return self.groups is not None

    @property
    def has_clips(self) -> bool:
        """Whether any group has a clip of its own, which may be None to switch clipping off."""
        return any("grad_clip" in group for group in self.groups or ())


def sort_into_buckets(
    pairs: Pairs, options: ParameterOptions, state: ParameterState, undo: list[Callable[[], Any]]
) -> list[Bucket]:
    """Sort parameters into buckets by what the parameters of one native call must share.

    Args:
        pairs: parameters, each with its gradient in its native form.
        options: of all parameters.
        state: of all parameters; what is missing is made.
        undo: gets the calls that drop state which is made here.
    """
    buckets: dict[tuple, Bucket] = {}
    # What some parameters never have does not divide them: its list is shorter than the others.
    later = [i for i, entry in enumerate(state.layout) if entry.later]
    with state_guard():
        for param, grad in pairs:
            own = options.of(param)
            tensors, master = state.of_step(param, grad.dtype, undo)
            if not in_dygraph_mode() and 0 in param.shape:
                # An executor takes a list with an empty tensor in it for no list, and would leave all masters out.
                master = None
            lacking = tuple(i for i in later if tensors[i] is None) if later else ()
            # The watch samples one bucket, in which it must not count twice what several ranks have whole.
            in_shards = state.in_shards and is_sharded(param)
            key = (*(id(o) if is_tensor(o) else o for o in own[:2]), master is None, lacking, in_shards)
            bucket = buckets.get(key)
            if bucket is None:
                lists = tuple(None if i in lacking else [] for i in range(len(tensors)))
                bucket = Bucket([], [], lists, None if master is None else [], *own[:2])
                buckets[key] = bucket
            bucket.params.append(param)
            bucket.grads.append(state.stored_form(param, tensors, grad))
            for values, value in zip(bucket.state, tensors):
                if value is not None:
                    values.append(value)
            if master is not None:
                bucket.masters.append(master)
    return [bucket._replace(state=tuple(values or None for values in bucket.state)) for bucket in buckets.values()]


def _same_groups(groups: list[dict], checked: list[dict]) -> bool:
    """Whether groups have the keys and the very objects that they had when they were checked.

    Objects are compared by identity, because ``==`` between tensors would compute, and so wait for a device.
    """
    return len(groups) == len(checked) and all(map(_same_group, groups, checked))


def _same_group(group: Any, checked: dict) -> bool:
    """Whether one group is as it was when it was checked, in the sense of ``_same_groups``."""
    if not isinstance(group, dict) or group.keys() != checked.keys() or not isinstance(group["params"], list):
        return False
    params, before = group["params"], checked["params"]
    if len(params) != len(before) or not all(map(operator.is_, params, before)):
        return False
    return all(value is checked[key] for key, value in group.items() if key != "params")


class ClipByGroup(paddle.nn.clip.GradientClipBase):
    """A gradient clip that applies each group's own clip to that group, and the optimizer's to all other groups
    together.

    Args:
        options: tells which clip acts on a parameter.
        default: the optimizer's clip; None if it has none.
    """

    def __init__(self, options: ParameterOptions, default: Any) -> None:
        super().__init__()
        self._options = options
        self.default = default

    def __call__(self, params_grads: Pairs) -> Pairs:
        """Clip gradients.

        Args:
            params_grads: parameters, each with its gradient.

        Returns:
            The same parameters with the clipped gradients, those of one clip after those of another.
        """
        by_owner: dict[int | None, tuple[Any, Pairs]] = {}
        for pair in params_grads:
            owner, clip = self._options.clip_of(pair[0], self.default)
            by_owner.setdefault(owner, (clip, []))[1].append(pair)
        return [pair for clip, pairs in by_owner.values() for pair in (pairs if clip is None else clip(pairs))]
