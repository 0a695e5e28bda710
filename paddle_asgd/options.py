# SPDX-License-Identifier: Apache-2.0
"""What each parameter is updated with: its group's options, its own, the optimizer's defaults, and which of them wins.

Must not write anything onto a parameter, where the next optimizer would find it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import paddle
from paddle.regularizer import WeightDecayRegularizer

from .arguments import check_groups, check_number, is_tensor

Pairs = list[tuple[Any, Any]]


class Bucket(NamedTuple):
    """Parameters that one native call updates: lists that run parallel."""

    params: list
    grads: list
    #: a list for every entry of the layout; None for one that these parameters do not have yet
    state: tuple[list | None, ...]
    masters: list | None
    #: what all of them share: the multiplier of the learning rate, and the decay
    learning_rate: Any
    weight_decay: Any


class Options(NamedTuple):
    """What one parameter is updated with, besides what all share."""

    #: multiplier of the optimizer's learning rate; a tensor stands in place of the whole, as in Paddle
    learning_rate: Any
    #: decay outside of the gradient, a number or a tensor
    weight_decay: Any
    #: decay inside of the gradient, by Paddle's own path
    regularizer: WeightDecayRegularizer | None


class ParameterOptions:
    """Looks up one parameter's options, by its name, for wrappers that shard an optimizer drop its groups."""

    def __init__(self, groups: list[dict] | None, weight_decay: Any, reserved: Collection[str] = ()) -> None:
        self._weight_decay = weight_decay
        self._reserved = reserved
        #: as the user may have edited them since they were checked; None without groups
        self.groups = groups
        self._checked = [dict(group, params=list(group["params"])) for group in groups or ()]
        self._group_of = {param.name: group for group in groups or () for param in group["params"]}

    def edited(self) -> ParameterOptions | None:
        """Options by the groups as they are now, with all checks of new ones; None if nobody has edited them."""
        if self.groups is None or _same_groups(self.groups, self._checked):
            return None
        checked = check_groups("param_groups", self.groups, self._reserved)
        for group, copy in zip(self.groups, checked):
            group.update(copy)
        return self.of_groups(self.groups)

    def of_groups(self, groups: list[dict]) -> ParameterOptions:
        """The same with groups that have been checked."""
        return ParameterOptions(groups, self._weight_decay, self._reserved)

    @property
    def parameters(self) -> list:
        """All parameters of all groups, when they were checked."""
        return [param for group in self._checked for param in group["params"]]

    def of(self, param: Any) -> Options:
        """A parameter's own regularizer wins over its group's weight_decay, and that over the optimizer's."""
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

    def clip_of(self, param: Any, default: Any) -> tuple[int | None, Any]:
        """Whose clip acts on this parameter's gradient, and which; a group's may be None."""
        group = self._group_of.get(param.name, {})
        return (id(group), group["grad_clip"]) if "grad_clip" in group else (None, default)

    @property
    def has_groups(self) -> bool:
        """Whether there are groups, which may be edited between two steps."""
        return self.groups is not None

    @property
    def has_clips(self) -> bool:
        """Whether any group has a clip of its own, None included."""
        return any("grad_clip" in group for group in self.groups or ())


def _same_groups(groups: list[dict], checked: list[dict]) -> bool:
    """Whether all keys and values are the same objects. Comparing tensors with == would compute."""
    return len(groups) == len(checked) and all(map(_same_group, groups, checked))


def _same_group(group: Any, checked: dict) -> bool:
    if not isinstance(group, dict) or group.keys() != checked.keys() or not isinstance(group["params"], list):
        return False
    params, before = group["params"], checked["params"]
    if len(params) != len(before) or not all(map(operator.is_, params, before)):
        return False
    return all(value is checked[key] for key, value in group.items() if key != "params")


class ClipByGroup(paddle.nn.clip.GradientClipBase):
    """Clips each group with its own clip, and all groups without one together, by the optimizer's."""

    def __init__(self, options: ParameterOptions, default: Any) -> None:
        super().__init__()
        self._options = options
        self.default = default

    def __call__(self, params_grads: Pairs) -> Pairs:
        by_owner: dict[int | None, tuple[Any, Pairs]] = {}
        for pair in params_grads:
            owner, clip = self._options.clip_of(pair[0], self.default)
            by_owner.setdefault(owner, (clip, []))[1].append(pair)
        return [pair for clip, pairs in by_owner.values() for pair in (pairs if clip is None else clip(pairs))]
