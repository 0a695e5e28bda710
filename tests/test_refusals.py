# SPDX-License-Identifier: Apache-2.0
"""Bad input at the constructor and at a step: the promised exception, its text with the culprit and the value, nothing
written. The native call has its own table (test_native.py). Must not test what is accepted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import Quadratic

from paddle_asgd import ASGD
from paddle_asgd.free_memory import free_memory

NAN, INF = float("nan"), float("inf")
Row = tuple


def table(rows: dict[str, Row]) -> Any:
    """The rows as pytest parameters, under their names."""
    return pytest.mark.parametrize("row", list(rows.values()), ids=list(rows))


def assert_refused(call: Callable[[], Any], error: type, pieces: Sequence[str]) -> None:
    """The text holds every piece and can be read: it is no dump of all arguments."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert [piece for piece in pieces if piece not in text] == [], text
    assert len(text) < 500, text[:500]


def content(tensors: Sequence[paddle.Tensor]) -> list:
    return [(str(t.dtype), list(t.shape), hashlib.md5(t.numpy().tobytes()).hexdigest()) for t in tensors]


def named(name: str, shape: Sequence[int]) -> paddle.Tensor:
    """A leaf of this name, so that a text can be held to naming it."""
    value = np.random.default_rng(len(name)).normal(size=shape).astype("float32")
    leaf = paddle.to_tensor(value, stop_gradient=False)
    leaf.name = name
    return leaf


# ---- Constructor -----------------------------------------------------------------------------------------------------


def given(**arguments: Any) -> Callable:
    return lambda p, q: arguments


def parameters(make: Callable) -> Callable:
    return lambda p, q: {"parameters": make(p, q)}


def option(key: str, value: Any) -> Callable:
    """A second group with one bad option."""
    return parameters(lambda p, q: [{"params": [p]}, {"params": [q], key: value}])


def computed() -> paddle.Tensor:
    leaf = paddle.to_tensor([1.0, 2.0], stop_gradient=False)
    return leaf * 2


def cleared() -> paddle.Tensor:
    leaf = paddle.to_tensor([1.0, 2.0], stop_gradient=False)
    leaf._clear_data()
    return leaf


COUNT = {
    "none": (None, ValueError, "None"),
    "zero": (0, ValueError, "0"),
    "negative": (-1, ValueError, "-1"),
    "bool": (True, TypeError, "True"),
    "whole_float": (3.0, TypeError, "3.0"),
    "float": (2.5, TypeError, "2.5"),
    "string": ("3", TypeError, "'3'"),
    "nan": (NAN, TypeError, "nan"),
    "inf": (INF, TypeError, "inf"),
    "numpy_float": (np.float32(3), TypeError, "3.0"),
    "numpy_zero": (np.int64(0), ValueError, "0"),
    "no_memory_for_it": (2**42, ValueError, str(2**42)),
    "no_address_for_it": (2**61, ValueError, str(2**61)),
    "no_int64_for_it": (2**70, ValueError, str(2**70)),
}
NUMBER = {
    "string": ("0.1", TypeError, "'0.1'"),
    "list": ([0.1], TypeError, "[0.1]"),
    "negative": (-0.5, ValueError, "-0.5"),
    "nan": (NAN, ValueError, "nan"),
    "inf": (INF, ValueError, "inf"),
    "bool": (True, TypeError, "True"),
    "complex": (1j, TypeError, "1j"),
    "beyond_float": (10**400, ValueError, "received"),
    "array": (np.array([0.25]), TypeError, "0.25"),
}
TENSOR = {
    "two_elements": (lambda: paddle.to_tensor([0.5, 0.25]), ValueError, "[2]"),
    "no_element": (lambda: paddle.zeros([0]), ValueError, "[0]"),
    "int_tensor": (lambda: paddle.to_tensor(3), TypeError, "int64"),
    "half_tensor": (lambda: paddle.to_tensor(0.1, dtype="float16"), TypeError, "float16"),
}
CONSTRUCTOR = {
    **{f"batch_num_{key}": (given(batch_num=v), e, "batch_num", t) for key, (v, e, t) in COUNT.items()},
    "batch_num_float_tensor": (lambda p, q: {"batch_num": paddle.to_tensor(3.0)}, TypeError, "batch_num", "float32"),
    "batch_num_bool_tensor": (lambda p, q: {"batch_num": paddle.to_tensor(True)}, TypeError, "batch_num", "bool"),
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
    make, error, *pieces = row
    params = [named("first", [3, 2]), named("second", [257])]
    before = content(params)
    arguments = {"learning_rate": 0.1, "batch_num": 3, "parameters": params, **make(*params)}
    assert_refused(lambda: ASGD(**arguments), error, pieces)
    assert content(params) == before


@pytest.mark.parametrize("multiplier", [-1.0, NAN, INF, "x", None], ids=repr)
def test_learning_rate_of_a_parameter(multiplier: Any) -> None:
    """ParamAttr takes anything; the optimizer must not."""
    param = paddle.create_parameter([5], "float32", name="first")
    param.optimize_attr = {"learning_rate": multiplier}
    before = content([param])

    def train() -> None:
        optimizer = ASGD(0.1, 3, [param])
        optimizer.apply_gradients([(param, paddle.ones([5]))])

    assert_refused(train, (TypeError, ValueError), ["learning_rate", "'first'", repr(multiplier)])
    assert content([param]) == before


# ---- A step ----------------------------------------------------------------------------------------------------------


class Training:
    """Two parameters that have taken some steps, in one bucket or, as groups, in two."""

    def __init__(self, steps: int, as_groups: bool, options: dict | None = None) -> None:
        self.problem = Quadratic(batches=3, shapes=[[3, 2], [257]])
        self.params = [named("first", [3, 2]), named("second", [257])]
        groups = [{"params": [p], "learning_rate": r} for p, r in zip(self.params, (0.5, 1.0))]
        arguments = {"learning_rate": 0.1, "batch_num": 3, "weight_decay": 0.25, **(options or {})}
        self.optimizer = ASGD(parameters=groups if as_groups else self.params, **arguments)
        self.train(range(steps))

    def train(self, steps: Sequence[int]) -> None:
        for step in steps:
            self.problem.backward(step, self.params)
            self.optimizer.step()
            self.optimizer.clear_grad()

    def content(self) -> list:
        state = {k: v for k, v in self.optimizer.state_dict().items() if isinstance(v, paddle.Tensor)}
        return [content(self.params), content([state[key] for key in sorted(state)])]


def assert_step_refused(make: Callable, error: type, pieces: Sequence[str], steps: int, as_groups: bool) -> None:
    """Refused, nothing written, and what follows is as if the call had never been."""
    runs = []
    for spoilt in (True, False):
        options, spoil, mend, call = make()
        training = Training(steps, as_groups, options)
        if spoilt:
            before = training.content()
            spoil()
            assert_refused(lambda call=call, training=training: call(training), error, pieces)
            mend()
            if steps:
                assert training.content() == before
            assert content(training.params) == before[0]
        training.train(range(steps, steps + 5))
        runs.append(training.content())
    assert runs[0] == runs[1]


def gradient(make: Callable[[], paddle.Tensor]) -> Callable:
    """The second parameter's gradient is bad, the first one's is good."""

    def call(training: Training) -> None:
        good = paddle.full([3, 2], 0.5)
        training.optimizer.apply_gradients(list(zip(training.params, (good, make()))))

    return lambda: ({}, lambda: None, lambda: None, call)


def one_step(training: Training) -> None:
    try:
        training.train([7])
    finally:
        training.optimizer.clear_grad()


def scheduled(value: Any) -> Callable:
    """A scheduler that gives a bad rate."""

    def make() -> tuple:
        scheduler = paddle.optimizer.lr.LambdaDecay(0.1, lr_lambda=lambda epoch: 1.0)

        def give(rate: Any) -> Callable:
            return lambda: setattr(scheduler, "last_lr", rate)

        return {"learning_rate": scheduler}, give(value), give(0.1), one_step

    return make


def in_tensor(argument: str, value: float) -> Callable:
    """A tensor that the user overwrites with a bad number."""

    def make() -> tuple:
        tensor = paddle.full([1], 0.25)

        def put(number: float) -> Callable:
            return lambda: tensor.set_value(np.array([number], "float32"))

        return {argument: tensor}, put(value), put(0.25), one_step

    return make


STEP = {
    "gradient_shape": (gradient(lambda: paddle.ones([7])), ValueError, "gradient", "'second'", "[7]", "[257]"),
    "gradient_float64": (gradient(lambda: paddle.ones([257], "float64")), ValueError, "'second'", "float64", "float32"),
    "gradient_int": (gradient(lambda: paddle.ones([257], "int32")), ValueError, "'second'", "int32", "float32"),
    "gradient_uninitialised": (gradient(paddle.Tensor), ValueError, "gradient", "'second'"),
    "gradient_coo": (
        gradient(lambda: paddle.sparse.sparse_coo_tensor([[0]], [1.0], [257])),
        ValueError,
        "gradient",
        "'second'",
    ),
    **{
        f"scheduler_{value!r}": (scheduled(value), error, "learning_rate", repr(value))
        for value, error in ((NAN, ValueError), (-0.5, ValueError), (INF, ValueError), ("x", TypeError))
    },
    **{
        f"{argument}_tensor_{value!r}": (in_tensor(argument, value), ValueError, argument, repr(value))
        for argument in ("learning_rate", "weight_decay")
        for value in (NAN, -0.5, INF)
    },
}


@table(STEP)
@pytest.mark.parametrize("as_groups", [False, True], ids=["one_bucket", "two_buckets"])
@pytest.mark.parametrize("steps", [0, 4], ids=["first_step", "fifth_step"])
def test_step(row: Row, as_groups: bool, steps: int) -> None:
    make, error, *pieces = row
    assert_step_refused(make, error, pieces, steps, as_groups)


def test_strided_parameter() -> None:
    """What a kernel writes to Paddle's contiguous copy of it would be lost."""
    strided = paddle.ones([2, 3]).transpose([1, 0]).detach()
    strided.stop_gradient, strided.name = False, "second"
    params = [named("first", [3, 2]), strided]
    optimizer = ASGD(0.1, 3, params)
    before = content(params)
    pairs = [(p, paddle.ones(p.shape)) for p in params]
    assert_refused(lambda: optimizer.apply_gradients(pairs), ValueError, ["'second'", "strided", ".contiguous()"])
    assert content(params) == before


def test_parameter_of_another_dtype_since_its_first_step() -> None:
    linear = paddle.nn.Linear(3, 2)
    optimizer = ASGD(0.1, 3, linear.parameters())

    def step() -> None:
        optimizer.apply_gradients([(p, paddle.ones(p.shape, p.dtype)) for p in linear.parameters()])

    step()
    linear.to(dtype="float64")
    before = content([*linear.parameters(), *list(optimizer.state_dict().values())[:6]])
    assert_refused(step, ValueError, [linear.bias.name, "float32", "float64"])
    assert content([*linear.parameters(), *list(optimizer.state_dict().values())[:6]]) == before


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


def test_a_history_larger_than_the_free_memory() -> None:
    """Just above what is free, where the machine as a whole could hold it: the step would end the process."""
    param = named("first", [1024, 1024])
    free = free_memory()
    slots = int(free * 1.05) // (4 * 1024 * 1024)
    assert_refused(lambda: ASGD(0.1, slots, [param]), ValueError, ["batch_num", str(slots), "GiB"])
    ASGD(0.1, slots // 2, [param])
