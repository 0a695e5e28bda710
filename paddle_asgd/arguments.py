# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user passes to an optimizer's constructor and to a step: types, ranges, duplicates.

Each function returns the value in the form the optimizer keeps, or raises TypeError or ValueError with the argument's
name, what was received, what was expected, and the remedy. Must not change what it checks.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import reprlib
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Callable, NoReturn

import numpy as np
import paddle
from paddle.base.framework import Variable, in_dygraph_mode
from paddle.optimizer.lr import LRScheduler
from paddle.regularizer import WeightDecayRegularizer

from .distributed_tensors import check_mesh

try:
    from paddle.pir import Value
except ImportError:  # the name that it has in Paddle 2.6
    from paddle.pir import OpResult as Value

#: The dtypes that a parameter may have, and the bytes of one element.
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
FLOATING = tuple(BYTES)
#: The options of a group of any optimizer.
GROUP_KEYS = ("params", "weight_decay", "learning_rate", "grad_clip")
#: Options of other optimizers and libraries, which a user would expect to have an effect, and their names here if they
#: have one.
FOREIGN_GROUP_KEYS = {
    **{"lr": "learning_rate", "wd": "weight_decay", "decay": "weight_decay", "clip_grad": "grad_clip"},
    **dict.fromkeys(
        ("momentum", "beta1", "beta2", "betas", "epsilon", "eps", "nesterov", "maximize", "lambd", "alpha")
    ),
}

#: Checks of the further options that an optimizer's groups have, by their names: each takes the name with which an
#: error begins and the value, and returns the value in the form the group keeps.
GroupChecks = Mapping[str, Callable[[str, Any], Any]]
NO_CHECKS: GroupChecks = MappingProxyType({})


def dtype_name(dtype: Any) -> str:
    """Name of a dtype, from any of the kinds of dtype objects that Paddle has, or from a string.

    Args:
        dtype: a ``paddle.dtype``, the dtype of a variable in either format of static graphs, or a name of one.

    Examples:
        >>> dtype_name(paddle.float32), dtype_name("paddle.bfloat16"), dtype_name("FP16")
        ('float32', 'bfloat16', 'float16')
    """
    name = str(dtype).rsplit(".", 1)[-1].lower()
    return {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "uint16": "bfloat16"}.get(
        name, name
    )


def is_tensor(value: Any) -> bool:
    """Whether a value is a dygraph tensor or a variable of a static graph, in the older format or in PIR."""
    return isinstance(value, (paddle.Tensor, Variable, Value))


_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxlist, _brief.maxtuple, _brief.maxdict, _brief.maxother = 2, 3, 3, 3, 60


def shown(value: Any) -> str:
    """Describe a value and its type for an error message, in a few words however large the value is.

    Examples:
        >>> shown(paddle.zeros([2, 3]))
        'a tensor of float32 and shape [2, 3]'
        >>> shown("0.1")
        "'0.1' of type str"
    """
    if is_tensor(value):
        return f"a tensor of {dtype_name(value.dtype)} and shape {list(value.shape)}"
    if isinstance(value, (list, tuple)) and value and is_tensor(value[0]):
        return f"a {type(value).__name__} of {len(value)} tensors"
    return f"{_brief.repr(value)} of type {type(value).__name__}"


def check_number(argument: str, value: Any) -> float:
    """Check a finite number of at least 0 and return it as a float.

    Args:
        argument: the name with which an error begins.
        value: a real number of Python or NumPy. A bool is refused, because it is probably a misplaced argument.

    Raises:
        TypeError: the value is not a real number.
        ValueError: it is negative, NaN, infinite, or too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: received {shown(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{argument}: received {_brief.repr(value)}, expected a finite number of at least 0")
    return number


def check_positive(argument: str, value: Any) -> float:
    """Check a finite number above 0 and return it as a float.

    Args:
        argument: the name with which an error begins.
        value: what the user passed.
    """
    number = check_number(argument, value)
    if number == 0:
        raise ValueError(f"{argument}: received {shown(value)}, expected a number above 0")
    return number


def check_int(argument: str, value: Any, least: int) -> int:
    """Check an int and return it.

    Args:
        argument: the name with which an error begins.
        value: an int of Python or NumPy. A bool is refused, because it is probably a misplaced argument.
        least: the smallest int that is accepted.

    Raises:
        TypeError: the value is not an int.
        ValueError: it is below ``least``.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) or is_tensor(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{argument}: received {shown(value)}, expected an int of at least {least}")
    if number < least:
        raise ValueError(f"{argument}: received {number}, expected an int of at least {least}")
    return number


def _one_element(argument: str, value: Any) -> Any:
    """Check a tensor of one float32 or float64 number and return it as it is, since every step reads it.

    Args:
        argument: the name with which an error begins.
        value: a tensor or a variable whose shape has one element, ``[]`` or ``[1]``.

    Raises:
        ValueError: the tensor does not have exactly one element.
        TypeError: its dtype is another one, or it is a dygraph tensor in static graph mode.
    """
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
    """Check the learning rate of a whole optimizer.

    Args:
        value: a number of at least 0, an ``LRScheduler``, or a tensor of one float32 or float64.

    Returns:
        The number as a float; a scheduler or a tensor itself, which every step reads.

    Raises:
        TypeError: the value is of another kind; a list of parameters in its place is the usual mistake.
        ValueError: it is None, negative or not finite, or a tensor of more or fewer than one element.
    """
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
    """Check the weight decay of an optimizer or of a group.

    Args:
        value: None, a number of at least 0, a tensor of one float32 or float64, or a regularizer such as
            ``L2Decay(0.1)``.
        argument: the name with which an error begins.

    Returns:
        A number as a float, anything else itself.

    Raises:
        TypeError: the value is of another kind, for example a regularizer's class.
        ValueError: it is negative or not finite, or a tensor of more or fewer than one element.
    """
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
    """Check the gradient clip of an optimizer or of a group and return it: None or an instance of Paddle's clips.

    Args:
        value: None, or an instance of ``paddle.nn.ClipGradByGlobalNorm``, ``ClipGradByNorm`` or ``ClipGradByValue``.
        argument: the name with which an error begins.

    Raises:
        TypeError: the value is of another kind, for example a number or a clip's class.
    """
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
    """Check a bool and return it; 0, 1 and None are refused, because they are probably misplaced arguments.

    Args:
        argument: the name with which an error begins.
        value: a bool of Python or NumPy.

    Raises:
        TypeError: the value is anything else.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{argument}: received {shown(value)}, expected True or False")


def check_name(value: Any) -> str | None:
    """Check the ``name`` of an optimizer and return it: None or a string that is not empty; otherwise TypeError."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise TypeError(f"name: received {shown(value)}, expected a non-empty string or None")


def refuse_state(what: str) -> NoReturn:
    """Refuse a state_dict that cannot be loaded, before anything has been written.

    Args:
        what: what is wrong with it, as a clause that follows ``set_state_dict:``.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"set_state_dict: {what}. Nothing has been loaded.")


def check_parameters(
    value: Any, reserved: Collection[str] = (), checks: GroupChecks = NO_CHECKS
) -> tuple[list | None, list | None]:
    """Check the ``parameters`` of a constructor: a list of tensors, or a list of groups.

    Args:
        value: any iterable except a dict, a set or a string; None in static graph mode.
        reserved: options of the whole optimizer, which a group cannot have.
        checks: the options that a group has besides ``GROUP_KEYS``.

    Returns:
        All parameters in one list, and checked copies of the groups, or None if there are no groups. Both are None if
        the value is None, which in static graph mode stands for all parameters of a program.

    Raises:
        TypeError: the value, or something in it, is of the wrong kind, or a parameter is not real floating point.
        ValueError: there is no parameter, one comes twice or is not a leaf, or a group has a bad key or option.

    Examples:
        >>> weight, bias = paddle.create_parameter([3, 2], "float32"), paddle.create_parameter([2], "float32")
        >>> parameters, groups = check_parameters([{"params": [weight], "weight_decay": 1}, {"params": bias}])
        >>> len(parameters), groups[0]["weight_decay"], len(groups[1]["params"])
        (2, 1.0, 1)
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
    groups = check_groups("parameters", items, reserved, checks)
    flat = [param for group in groups for param in group["params"]]
    if not flat:
        raise ValueError(f"parameters: received {len(groups)} groups without a tensor, expected at least one tensor")
    return flat, groups


def check_groups(
    argument: str, groups: Iterable, reserved: Collection[str] = (), checks: GroupChecks = NO_CHECKS
) -> list[dict]:
    """Check parameter groups and return copies of them, in which ``params`` is a list and numbers are floats.

    Args:
        argument: the name of the list, such as ``param_groups``; an error begins with the place in it.
        groups: dicts with ``params`` and options.
        reserved: options of the whole optimizer, which a group cannot have.
        checks: the options that a group has besides ``GROUP_KEYS``.

    Raises:
        TypeError: a group or something in it is of the wrong kind.
        ValueError: a parameter is in two groups, or a group has a bad key or option.
    """
    seen: set[str] = set()
    return [_check_group(f"{argument}[{i}]", group, seen, reserved, checks) for i, group in enumerate(groups)]


def _check_group_key(argument: str, key: Any, known: Collection[str], reserved: Collection[str]) -> None:
    """Refuse a key of a group that the user probably takes for an option.

    Paddle ignores unknown keys, so users keep notes of their own in groups. Refused are options of the whole optimizer,
    options that other optimizers have, and what is spelt almost like one of the options in ``known``.

    Raises:
        TypeError: the key is not a string.
        ValueError: the key would be taken for an option; the error suggests the one that is meant, if it can be told.
    """
    if key in known:
        return
    expected = f"expected {', '.join(known)}, or a note of your own such as 'name'"
    if not isinstance(key, str):
        raise TypeError(f"{argument}: received key {shown(key)}, {expected}")
    if key in reserved:
        raise ValueError(f"{argument}: received unknown key {key!r}, an option of the whole optimizer, {expected}")
    meant = [FOREIGN_GROUP_KEYS[key]] if key in FOREIGN_GROUP_KEYS else difflib.get_close_matches(key, known, 1, 0.75)
    if meant:
        remedy = f"; did you mean {meant[0]!r}?" if meant[0] else ""
        raise ValueError(f"{argument}: received unknown key {key!r}, {expected}{remedy}")


def _check_group(argument: str, group: Any, seen: set[str], reserved: Collection[str], checks: GroupChecks) -> dict:
    """Check one parameter group and return a copy.

    Args:
        argument: the place of the group, such as ``parameters[1]``, with which an error begins.
        group: what the user passed in that place.
        seen: names of the parameters of the groups before this one; this group's are added.
        reserved: options of the whole optimizer, which a group cannot have.
        checks: the options that a group has besides ``GROUP_KEYS``.
    """
    if not isinstance(group, dict):
        raise TypeError(f"{argument}: received {type(group).__name__} in a list of groups, expected a dict")
    for key in group:
        _check_group_key(argument, key, (*GROUP_KEYS, *checks), reserved)
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
    for key, check in checks.items():
        if key in group:
            copied[key] = check(f"{argument}[{key!r}]", group[key])
    return copied


def _check_tensors(argument: str, tensors: list, seen: set[str]) -> None:
    """Check that all are floating-point leaves, each there once.

    Args:
        argument: the name of the list; an error begins with the place in it.
        tensors: the parameters of one list or group.
        seen: names of the parameters that came before these; their names are added.

    Raises:
        TypeError: something is not a tensor, or is not real floating point.
        ValueError: a tensor was computed by an operation, its name has been seen, or it is on a mesh that lacks a rank.
    """
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
        check_mesh(f"{argument}[{i}]", tensor)
        seen.add(tensor.name)
