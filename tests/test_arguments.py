# SPDX-License-Identifier: Apache-2.0
"""Bad arguments of every optimizer on the ground: of the constructor, ``set_lr`` and ``step``. Tables are the tests.

Must not test what is accepted (test_options.py), nor ASGD's own arguments (test_checks.py).
"""

from __future__ import annotations

from typing import Any, Callable

import paddle
from refusing import (
    NAN,
    NUMBER,
    Row,
    assert_constructor_refuses,
    assert_refused,
    computed,
    content,
    given,
    named,
    table,
)

from paddle_asgd import ASGD


def parameters(make: Callable) -> Callable:
    return lambda p, q: {"parameters": make(p, q)}


def option(key: str, value: Any) -> Callable:
    """A second group with one bad option."""
    return parameters(lambda p, q: [{"params": [p]}, {"params": [q], key: value}])


TENSOR = {
    "two_elements": (lambda: paddle.to_tensor([0.5, 0.25]), ValueError, "[2]"),
    "no_element": (lambda: paddle.zeros([0]), ValueError, "[0]"),
    "int_tensor": (lambda: paddle.to_tensor(3), TypeError, "int64"),
    "half_tensor": (lambda: paddle.to_tensor(0.1, dtype="float16"), TypeError, "float16"),
}


CONSTRUCTOR = {
    **{
        f"{name}_{key}": (given(**{name: v}), e, name, t)
        for name in ("learning_rate", "weight_decay")
        for key, (v, e, t) in NUMBER.items()
    },
    **{
        f"{name}_{key}": (lambda p, q, name=name, make=make: {name: make()}, e, name, t)
        for name in ("learning_rate", "weight_decay")
        for key, (make, e, t) in TENSOR.items()
    },
    "learning_rate_none": (given(learning_rate=None), ValueError, "learning_rate", "None"),
    "learning_rate_is_parameters": (lambda p, q: {"learning_rate": [p, q]}, TypeError, "learning_rate", "parameters="),
    "weight_decay_class": (given(weight_decay=paddle.regularizer.L2Decay), TypeError, "weight_decay", "L2Decay"),
    "grad_clip_number": (given(grad_clip=1.0), TypeError, "grad_clip", "1.0"),
    "grad_clip_class": (given(grad_clip=paddle.nn.ClipGradByNorm), TypeError, "grad_clip", "ClipGradByNorm"),
    "multi_precision_int": (given(multi_precision=1), TypeError, "multi_precision", "1"),
    "multi_precision_none": (given(multi_precision=None), TypeError, "multi_precision", "None"),
    "name_int": (given(name=3), TypeError, "name", "3"),
    "name_empty": (given(name=""), TypeError, "name", "''"),
    "parameters_none": (given(parameters=None), ValueError, "parameters", "None", "model.parameters()"),
    "parameters_tensor": (parameters(lambda p, q: p.detach()), TypeError, "parameters", "tensor"),
    "parameters_dict": (parameters(lambda p, q: {"params": [p]}), TypeError, "parameters", "dict"),
    "parameters_set": (parameters(lambda p, q: {p, q}), TypeError, "parameters", "set"),
    "parameters_string": (given(parameters="abc"), TypeError, "parameters", "str"),
    "parameters_int": (given(parameters=5), TypeError, "parameters", "int"),
    "parameters_empty": (given(parameters=[]), ValueError, "parameters", "empty"),
    "parameters_with_none": (parameters(lambda p, q: [p, None]), TypeError, "parameters[1]", "None"),
    "parameters_nested": (parameters(lambda p, q: [[p, q]]), TypeError, "parameters[0]", "list"),
    "parameters_int_tensor": (
        parameters(lambda p, q: [p, paddle.ones([2], "int32")]),
        TypeError,
        "parameters[1]",
        "int32",
    ),
    "parameters_complex": (
        parameters(lambda p, q: [p, paddle.to_tensor([1j])]),
        TypeError,
        "parameters[1]",
        "complex64",
        "as_real",
    ),
    "parameters_computed": (parameters(lambda p, q: [p, computed()]), ValueError, "parameters[1]", "leaf"),
    "parameters_twice": (parameters(lambda p, q: [p, q, p]), ValueError, "parameters[2]", "'first'"),
    "tensor_among_groups": (parameters(lambda p, q: [{"params": [p]}, q]), TypeError, "parameters[1]", "dict"),
    "group_among_tensors": (parameters(lambda p, q: [p, {"params": [q]}]), TypeError, "parameters[1]", "dict"),
    "group_without_params": (parameters(lambda p, q: [{"weight_decay": 0.5}]), ValueError, "parameters[0]", "'params'"),
    "group_params_set": (parameters(lambda p, q: [{"params": {p}}]), TypeError, "parameters[0]['params']", "set"),
    "group_params_none": (parameters(lambda p, q: [{"params": None}]), TypeError, "parameters[0]['params']", "None"),
    "group_params_empty": (parameters(lambda p, q: [{"params": []}]), ValueError, "parameters", "without a tensor"),
    "group_params_with_none": (
        parameters(lambda p, q: [{"params": [p, None]}]),
        TypeError,
        "parameters[0]['params'][1]",
        "None",
    ),
    "group_twice": (
        parameters(lambda p, q: [{"params": [p]}, {"params": [q, p]}]),
        ValueError,
        "parameters[1]['params'][1]",
        "'first'",
    ),
    "group_batch_num": (option("batch_num", 5), ValueError, "parameters[1]", "'batch_num'"),
    "group_lr": (option("lr", 0.5), ValueError, "parameters[1]", "'lr'", "learning_rate"),
    "group_weight_decay": (option("weight_decay", -0.5), ValueError, "parameters[1]['weight_decay']", "-0.5"),
    "group_weight_decay_string": (option("weight_decay", "x"), TypeError, "parameters[1]['weight_decay']", "'x'"),
    "group_grad_clip": (option("grad_clip", 1.0), TypeError, "parameters[1]['grad_clip']", "1.0"),
    "group_learning_rate": (option("learning_rate", NAN), ValueError, "parameters[1]['learning_rate']", "nan"),
    "group_learning_rate_none": (option("learning_rate", None), TypeError, "parameters[1]['learning_rate']", "None"),
}


@table(CONSTRUCTOR)
def test_constructor(row: Row) -> None:
    assert_constructor_refuses(row)


SET_LR = {
    **{key: row for key, row in NUMBER.items() if key != "array"},
    "none": (None, TypeError, "None"),
    "tensor": (lambda: paddle.to_tensor([0.5, 0.25]), TypeError, "tensor"),
    "scheduler": (lambda: paddle.optimizer.lr.ExponentialDecay(0.1, 0.9), TypeError, "ExponentialDecay"),
}


@table(SET_LR)
def test_set_lr(row: Row) -> None:
    value, error, text = row
    optimizer = ASGD(0.1, 3, [named("first", [5])])
    assert_refused(lambda: optimizer.set_lr(value() if callable(value) else value), error, ["learning_rate", text])
    assert optimizer.get_lr() == 0.1


CLOSURE = {
    "int": (3, TypeError, "3 of type int"),
    "loss": (lambda: paddle.to_tensor(0.5), TypeError, "a tensor of float32"),
    "string": ("loss", TypeError, "'loss'"),
}


@table(CLOSURE)
def test_closure(row: Row) -> None:
    value, error, text = row
    param = named("first", [5])
    param.grad = paddle.ones([5])
    before = content([param])
    pieces = ["closure", text, "expected a function or None; the number of a batch goes into optimizer.batch_index"]
    assert_refused(lambda: ASGD(0.1, 3, [param]).step(value() if callable(value) else value), error, pieces)
    assert content([param]) == before
