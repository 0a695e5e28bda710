# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user hands to an optimizer's constructor: types, ranges, duplicates.

Each function returns the value in the form the optimizer keeps, or raises TypeError or ValueError with the argument's
name, what was received, what was expected, and the remedy. Must not change what it checks.
"""

from __future__ import annotations

import difflib
import math
import numbers
import reprlib
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

import numpy as np
import paddle
from paddle.base.framework import Variable, in_dygraph_mode
from paddle.optimizer.lr import LRScheduler
from paddle.regularizer import WeightDecayRegularizer

try:
    from paddle.pir import Value
except ImportError:  # Paddle 2.6 calls it by another name
    from paddle.pir import OpResult as Value

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
FLOATING = tuple(BYTES)
GROUP_KEYS = ("params", "weight_decay", "learning_rate", "grad_clip")
#: Options of other optimizers and libraries, which would be taken to have an effect, and what they are called here.
FOREIGN_GROUP_KEYS = {
    **{"lr": "learning_rate", "wd": "weight_decay", "decay": "weight_decay", "clip_grad": "grad_clip"},
    **dict.fromkeys(
        ("momentum", "beta1", "beta2", "betas", "epsilon", "eps", "nesterov", "maximize", "lambd", "alpha")
    ),
}


def dtype_name(dtype: Any) -> str:
    """The name of a dtype, whichever of Paddle's three kinds of dtype objects it is: ``"float32"``."""
    name = str(dtype).rsplit(".", 1)[-1].lower()
    return {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "uint16": "bfloat16"}.get(
        name, name
    )


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor of dygraph or a variable of either kind of static graph."""
    return isinstance(value, (paddle.Tensor, Variable, Value))


_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxlist, _brief.maxtuple, _brief.maxdict, _brief.maxother = 2, 3, 3, 3, 60


def shown(value: Any) -> str:
    """A value and its type, in a few words however large it is."""
    if is_tensor(value):
        return f"a tensor of {dtype_name(value.dtype)} and shape {list(value.shape)}"
    if isinstance(value, (list, tuple)) and value and is_tensor(value[0]):
        return f"a {type(value).__name__} of {len(value)} tensors"
    return f"{_brief.repr(value)} of type {type(value).__name__}"


def check_number(argument: str, value: Any) -> float:
    """A finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: received {shown(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{argument}: received {_brief.repr(value)}, expected a finite number of at least 0")
    return number


def _one_element(argument: str, value: Any) -> Any:
    """A tensor that holds one float32 or float64 number."""
    shape = list(value.shape)
    if math.prod(shape) != 1:
        raise ValueError(f"{argument}: received a tensor of shape {shape}, expected one element, shape [] or [1]")
    if dtype_name(value.dtype) not in ("float32", "float64"):
        raise TypeError(f"{argument}: received a tensor of {dtype_name(value.dtype)}, expected float32 or float64")
    if isinstance(value, paddle.Tensor) and not in_dygraph_mode():
        raise TypeError(
            f"{argument}: received a dygraph tensor in static graph mode, expected a number or a variable of the "
            f"program; pass {argument}=float(tensor)"
        )
    return value


def check_learning_rate(value: Any) -> Any:
    """A number of at least 0, an LRScheduler, or a tensor of one element (read at every step)."""
    if isinstance(value, LRScheduler):
        return value
    if is_tensor(value):
        return _one_element("learning_rate", value)
    if isinstance(value, numbers.Real):
        return check_number("learning_rate", value)
    raise (ValueError if value is None else TypeError)(
        f"learning_rate: received {shown(value)}, expected a number, an LRScheduler or a tensor of one "
        "element; the parameters go into parameters=..."
    )


def check_weight_decay(value: Any, argument: str = "weight_decay") -> Any:
    """None, a number of at least 0, a tensor of one element, or a regularizer such as L2Decay."""
    if value is None or isinstance(value, WeightDecayRegularizer):
        return value
    if is_tensor(value):
        return _one_element(argument, value)
    if isinstance(value, numbers.Real):
        return check_number(argument, value)
    raise TypeError(
        f"{argument}: received {shown(value)}, expected a number, a tensor of one element, an "
        "instance of paddle.regularizer.L1Decay or L2Decay, or None"
    )


def check_grad_clip(value: Any, argument: str = "grad_clip") -> Any:
    """None or one of paddle.nn.ClipGradBy..."""
    if value is None or isinstance(value, paddle.nn.clip.GradientClipBase):
        return value
    raise TypeError(
        f"{argument}: received {shown(value)}, expected an instance of paddle.nn.ClipGradByGlobalNorm, "
        "ClipGradByNorm or ClipGradByValue, or None"
    )


def check_closure(value: Any, remedy: str = "") -> None:
    """Refuse a closure that cannot be called.

    Args:
        value: what the user passed to ``step``.
        remedy: what the error adds, if the optimizer knows what is often passed by mistake.
    """
    if not callable(value):
        raise TypeError(f"closure: received {shown(value)}, expected a function or None{remedy and f'; {remedy}'}")


def check_flag(argument: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one: a misplaced argument would pass."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{argument}: received {shown(value)}, expected True or False")


def check_name(value: Any) -> str | None:
    """None or a non-empty string."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise TypeError(f"name: received {shown(value)}, expected a non-empty string or None")


def refuse_state(what: str) -> NoReturn:
    """A state_dict that cannot be loaded."""
    raise ValueError(f"set_state_dict: {what}. Nothing has been loaded.")


def check_parameters(value: Any, reserved: Collection[str] = ()) -> tuple[list | None, list | None]:
    """Returns all parameters in one list, and the groups if the user gave any; None for None in static mode.

    ``reserved`` are the options of the whole optimizer, which a group cannot have.
    """
    if value is None:
        if in_dygraph_mode():
            raise ValueError(
                "parameters: received None, expected a list of tensors; pass parameters=model.parameters()"
            )
        return None, None
    if is_tensor(value) or isinstance(value, (dict, set, str)) or not isinstance(value, Iterable):
        raise TypeError(
            f"parameters: received {shown(value)}, expected a list of tensors or a list of groups (dicts); pass "
            "parameters=model.parameters(), and a single tensor or group within a list"
        )
    items = list(value)
    if not items:
        raise ValueError("parameters: received an empty list, expected at least one tensor or group")
    if not isinstance(items[0], dict):
        _check_tensors("parameters", items, set())
        return items, None
    groups = check_groups("parameters", items, reserved)
    flat = [param for group in groups for param in group["params"]]
    if not flat:
        raise ValueError(f"parameters: received {len(groups)} groups without a tensor, expected at least one tensor")
    return flat, groups


def check_groups(argument: str, groups: Iterable, reserved: Collection[str] = ()) -> list[dict]:
    """Parameter groups, as copies; no tensor is in two of them."""
    seen: set[str] = set()
    return [_check_group(f"{argument}[{i}]", group, seen, reserved) for i, group in enumerate(groups)]


def _check_group_key(argument: str, key: Any, reserved: Collection[str]) -> None:
    """A key that is not an option here may be a note of the user's, as Paddle allows, but no misspelt option."""
    if key in GROUP_KEYS:
        return
    expected = f"expected {', '.join(GROUP_KEYS)}, or a note of your own such as 'name'"
    if not isinstance(key, str):
        raise TypeError(f"{argument}: received key {shown(key)}, {expected}")
    if key in reserved:
        raise ValueError(f"{argument}: received unknown key {key!r}, an option of the whole optimizer, {expected}")
    meant = (
        [FOREIGN_GROUP_KEYS[key]] if key in FOREIGN_GROUP_KEYS else difflib.get_close_matches(key, GROUP_KEYS, 1, 0.75)
    )
    if meant:
        remedy = f"; did you mean {meant[0]!r}?" if meant[0] else ""
        raise ValueError(f"{argument}: received unknown key {key!r}, {expected}{remedy}")


def _check_group(argument: str, group: Any, seen: set[str], reserved: Collection[str]) -> dict:
    """One parameter group, as a copy."""
    if not isinstance(group, dict):
        raise TypeError(f"{argument}: received {type(group).__name__} in a list of groups, expected a dict")
    for key in group:
        _check_group_key(argument, key, reserved)
    if "params" not in group:
        raise ValueError(f"{argument}: received keys {list(group)}, expected 'params' among them")
    params = group["params"]
    if not is_tensor(params) and (isinstance(params, (set, dict, str)) or not isinstance(params, Iterable)):
        raise TypeError(f"{argument}['params']: received {shown(params)}, expected a list of tensors")
    copied = dict(group, params=[params] if is_tensor(params) else list(params))
    _check_tensors(f"{argument}['params']", copied["params"], seen)
    if "weight_decay" in group:
        copied["weight_decay"] = check_weight_decay(group["weight_decay"], f"{argument}['weight_decay']")
    check_grad_clip(group.get("grad_clip"), f"{argument}['grad_clip']")
    if "learning_rate" in group:
        rate, name = group["learning_rate"], f"{argument}['learning_rate']"
        copied["learning_rate"] = _one_element(name, rate) if is_tensor(rate) else check_number(name, rate)
    return copied


def _check_tensors(argument: str, tensors: list, seen: set[str]) -> None:
    """Floating tensors, each once. ``seen`` holds the names of all groups so far and is extended."""
    for i, tensor in enumerate(tensors):
        if not is_tensor(tensor):
            raise TypeError(
                f"{argument}[{i}]: received {type(tensor).__name__}, expected a tensor as in model.parameters()"
            )
        if dtype_name(tensor.dtype) not in FLOATING:
            raise TypeError(
                f"{argument}[{i}], {tensor.name!r}: received dtype {dtype_name(tensor.dtype)}, expected one of "
                f"{', '.join(FLOATING)}; a complex parameter can be kept as two real ones (paddle.as_real)"
            )
        if isinstance(tensor, paddle.Tensor) and not tensor.is_leaf:
            raise ValueError(
                f"{argument}[{i}], {tensor.name!r}: received a tensor that an operation computed, expected a leaf, "
                "which is what gradients are kept for"
            )
        if tensor.name in seen:
            raise ValueError(
                f"{argument}[{i}]: received {tensor.name!r} for the second time, expected each parameter once"
            )
        seen.add(tensor.name)
