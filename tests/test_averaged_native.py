# SPDX-License-Identifier: Apache-2.0
"""The native call of averaged SGD: what it refuses, naming the parameter, with nothing written.

Must not test what a step computes (test_averaged_sgd.py), nor how a library is found (test_native.py).
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from refusing import assert_refused, content

from paddle_asgd.native import averaged_sgd_update

SHAPES = {"first": [3, 2], "second": [5]}
LISTS = ("params", "grads", "steps", "ax", "t0s", "etas", "masters")


def native_call(dtype: str = "float32", masters: bool = False) -> dict[str, Any]:
    """Valid arguments for the fifth step of two parameters, which have all that can be kept."""
    draw = np.random.default_rng(3)

    def all_of(of: str) -> list[paddle.Tensor]:
        return [paddle.to_tensor(draw.normal(size=shape).astype("float32")).astype(of) for shape in SHAPES.values()]

    call = {
        "params": all_of(dtype),
        "grads": all_of(dtype),
        "steps": [paddle.to_tensor([4]) for _ in SHAPES],
        "ax": all_of("float32"),
        "t0s": [paddle.to_tensor([2.0], "float64") for _ in SHAPES],
        "etas": [paddle.to_tensor([0.1], "float64") for _ in SHAPES],
        "masters": all_of("float32") if masters else None,
        **{"learning_rate": 0.1, "weight_decay": 0.25, "found_inf": None, "check_only": False},
        **{"lambd": 0.3, "alpha": 0.6, "t0": 3.0, "sign": 1.0},
    }
    for param, name in zip(call["params"], SHAPES):
        param.name = name
    return call


def tensors_of(call: dict[str, Any]) -> list[paddle.Tensor]:
    return [t for name in LISTS for t in call[name] or () if isinstance(t, paddle.Tensor)]


def second(key: str, make: Callable[[], Any], **kind: Any) -> Callable[[], dict[str, Any]]:
    """The second item of a list is bad, so that the first might have been written before it is looked at."""

    def call() -> dict[str, Any]:
        arguments = native_call(**kind)
        arguments[key][1] = make()
        return arguments

    return call


def whole(key: str, make: Callable[[], Any], **kind: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**native_call(**kind), key: make()}


def zeros(shape: list[int], dtype: str = "float32") -> Callable[[], paddle.Tensor]:
    return lambda: paddle.zeros(shape, dtype)


REFUSED = {
    "grads None": (second("grads", lambda: None), TypeError, ["grads[1]", "NoneType", "a paddle.Tensor"]),
    "grads shape": (second("grads", zeros([4])), ValueError, ["shape of gradient", "'second'", "[4]", "[5]"]),
    "grads dtype": (second("grads", zeros([5], "float64")), ValueError, ["dtype of gradient", "'second'", "float64"]),
    "grads fewer": (whole("grads", list), ValueError, ["number of gradients", "0", "2"]),
    "params dtype": (second("params", zeros([5], "int64")), ValueError, ["dtype of parameter", "int64", "float16"]),
    "steps dtype": (second("steps", zeros([1], "int32")), ValueError, ["dtype of step", "'second'", "int32", "int64"]),
    "steps shape": (second("steps", zeros([2], "int64")), ValueError, ["shape of step", "'second'", "[2]", "[1]"]),
    "steps fewer": (whole("steps", list), ValueError, ["number of counters step", "0", "2"]),
    "ax shape": (second("ax", zeros([3])), ValueError, ["shape of ax", "'second'", "[3]", "[5]"]),
    "ax dtype": (second("ax", zeros([5], "float64")), ValueError, ["dtype of ax", "'second'", "float64", "float32"]),
    "ax fewer": (whole("ax", list), ValueError, ["number of averages ax", "0", "2"]),
    "ax strided": (
        second("ax", lambda: paddle.zeros([5, 2])[:, 0]),
        ValueError,
        ["layout of ax", "'second'", "a strided view"],
    ),
    "t0s dtype": (second("t0s", zeros([1])), ValueError, ["dtype of t0", "'second'", "float32", "float64"]),
    "t0s fewer": (whole("t0s", list), ValueError, ["number of t0", "0", "2"]),
    "etas mixed": (second("etas", zeros([1])), ValueError, ["dtype of eta", "'second'", "float32", "float64"]),
    "etas shape": (second("etas", zeros([2], "float64")), ValueError, ["shape of eta", "'second'", "[2]", "[1]"]),
    "etas fewer": (whole("etas", list), ValueError, ["number of eta", "0", "2"]),
    "masters beside float32": (
        whole("masters", lambda: [paddle.zeros(shape) for shape in SHAPES.values()]),
        ValueError,
        ["dtype of parameter 'first'", "float32", "beside a master weight"],
    ),
    "masters shape": (
        second("masters", zeros([4]), dtype="bfloat16", masters=True),
        ValueError,
        ["shape of master weight", "'second'", "[4]", "[5]"],
    ),
    "learning_rate": (whole("learning_rate", zeros([2])), ValueError, ["learning_rate", "shape [2]", "one float32"]),
    "weight_decay": (whole("weight_decay", lambda: "0.1"), TypeError, ["weight_decay", "str", "a number"]),
    "found_inf": (whole("found_inf", zeros([1])), ValueError, ["found_inf", "float32", "one bool"]),
}


@pytest.mark.parametrize("check_only", [False, True], ids=["step", "check_only"])
@pytest.mark.parametrize(("make", "error", "pieces"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_written(make: Callable, error: type, pieces: list[str], check_only: bool) -> None:
    call = make()
    before = content(tensors_of(call))
    assert_refused(
        lambda: averaged_sgd_update(**{**call, "check_only": check_only}), error, ["averaged_sgd_update_", *pieces]
    )
    assert content(tensors_of(call)) == before


@pytest.mark.parametrize("kind", [{}, {"dtype": "bfloat16", "masters": True}], ids=["float32", "bfloat16"])
def test_what_is_written(kind: dict[str, Any]) -> None:
    """Everything but gradients and t0 by a step, and nothing by a check, nor where an Inf was found."""
    call = native_call(**kind)
    before = content(tensors_of(call))
    averaged_sgd_update(**{**call, "check_only": True})
    averaged_sgd_update(**{**call, "found_inf": paddle.to_tensor([True])})
    assert content(tensors_of(call)) == before
    averaged_sgd_update(**call)
    kept = [name for name in LISTS for _ in call[name] or ()]
    changed = {name for name, was, now in zip(kept, before, content(tensors_of(call))) if was != now}
    assert changed == {"params", "steps", "ax", "etas", *(["masters"] if kind else [])}


def test_no_parameters() -> None:
    averaged_sgd_update(**{**native_call(), **{name: [] for name in LISTS}})
