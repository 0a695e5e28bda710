# SPDX-License-Identifier: Apache-2.0
"""The native calls of averages: what they compute from Paddle's tensors, and what they refuse with nothing written.

Must not test how AveragedModel uses them; the kernels' own test is tests/native/test_average.cc.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import dtype_name
from reference import average
from test_refusals import assert_refused, content, table

from paddle_asgd.native import average_swap, average_update

SHAPES = ([3, 2], [], [257], [3, 2741])
FOLLOWED = [("float32", "float32"), ("float32", "float16"), ("float32", "bfloat16"), ("float64", "float64")]
FOLLOWED += [("float64", "float32"), ("float64", "float16"), ("float64", "bfloat16")]


def tensors(dtype: str, seed: int, shapes: Sequence[Sequence[int]] = SHAPES) -> list[paddle.Tensor]:
    draw = np.random.default_rng(seed)
    found = [paddle.to_tensor(draw.normal(size=shape).astype("float32")).astype(dtype) for shape in shapes]
    for number, tensor in enumerate(found):
        tensor.name = f"value_{dtype}_{number}"
    return found


def wide(tensor: paddle.Tensor) -> np.ndarray:
    return (tensor.astype("float32") if dtype_name(tensor) == "bfloat16" else tensor).numpy().copy()


@pytest.mark.parametrize("weight", [0.0, 0.001, 0.75, 1.0])
@pytest.mark.parametrize(("held", "followed"), FOLLOWED)
def test_update(held: str, followed: str, weight: float) -> None:
    averages, values = tensors(held, 1), tensors(followed, 2)
    copies = [paddle.zeros([4], "int64"), paddle.to_tensor([True, False, True])]
    originals = [paddle.arange(4), paddle.to_tensor([False, False, True])]
    expected = [average(wide(a), wide(x), weight) for a, x in zip(averages, values)]
    unchanged = content([*values, *originals])
    average_update(averages, values, weight, copies, originals)
    for received, wanted, value in zip(averages, expected, values):
        if weight == 1:
            wanted = wide(value).astype(wanted.dtype)
        assert received.numpy().tobytes() == wanted.tobytes()
    assert content(copies) == content(originals)
    assert content([*values, *originals]) == unchanged


def test_swap() -> None:
    mixed = ("float32", "bfloat16", "int64", "bool", "complex64", "uint8")
    first, second = ([tensors(dtype, seed)[k % 4] for k, dtype in enumerate(mixed)] for seed in (1, 1))
    second = [paddle.zeros_like(t) for t in second]
    targets = [*tensors("float16", 3), *tensors("float32", 3), *tensors("bfloat16", 3)]
    sources = [*tensors("float64", 4), *tensors("float32", 5), *tensors("float32", 6)]
    before = content(first), content(second), content(sources)
    average_swap(first, second, targets, sources)
    assert (content(second), content(first), content(sources)) == before
    for target, source in zip(targets, sources):
        if dtype_name(target) == "float16":
            assert target.numpy().tobytes() == source.numpy().astype("float16").tobytes()
        elif dtype_name(target) == "float32":
            assert target.numpy().tobytes() == source.numpy().tobytes()
        else:
            assert np.abs(wide(target) - source.numpy()).max() <= 2**-8 * np.abs(source.numpy()).max()


def test_float64_is_rounded_once() -> None:
    """Of numbers next to the middle between two float16, float32 is on the middle."""
    middle = 1 + (2 * np.arange(500) + 1) * 2.0**-11
    source = np.concatenate([middle * (1 + s) for s in (0, 1e-12, -1e-12)])
    (target,) = tensors("float16", 1, [[1500]])
    average_swap([], [], [target], [paddle.to_tensor(source)])
    assert target.numpy().tobytes() == source.astype("float16").tobytes()
    assert (source.astype("float16") != source.astype("float32").astype("float16")).any()


# ---- What is refused -------------------------------------------------------------------------------------------------


def update_arguments() -> dict[str, Any]:
    shapes = [[3, 2], [5]]
    return {
        "averages": tensors("float32", 1, shapes),
        "values": tensors("float32", 2, shapes),
        "weight": 0.5,
        "copies": tensors("int64", 3, shapes),
        "originals": tensors("int64", 4, shapes),
    }


def swap_arguments() -> dict[str, Any]:
    shapes = [[3, 2], [5]]
    return {
        "averages": tensors("float32", 1, shapes),
        "values": tensors("float32", 2, shapes),
        "targets": tensors("float16", 3, shapes),
        "sources": tensors("float32", 4, shapes),
    }


def without_memory(like: paddle.Tensor) -> paddle.Tensor:
    emptied = like.clone()
    emptied._clear_data()
    return emptied


def second(spoil: Callable[[Any], Any], found: list) -> list:
    return [found[0], spoil(found[1])]


def coo(like: paddle.Tensor) -> paddle.Tensor:
    return paddle.sparse.sparse_coo_tensor([[0]], [1.0], [5])


#: What is made of the second item of a list, and what is said of it; of the shape, either of two may be said.
BAD: dict[str, tuple] = {
    "strided": (lambda t: paddle.ones([5, 2]).astype(t.dtype)[:, 0], "a strided view, expected a contiguous tensor"),
    "without_memory": (without_memory, "memory"),
    "shape": (lambda t: paddle.ones([6]).astype(t.dtype), "[6]", "[5]"),
    "coo": (coo, "no dense tensor, expected a dense tensor"),
}
ROWS: dict[str, tuple] = {}
for call, make in ((average_update, update_arguments), (average_swap, swap_arguments)):
    for key in sorted(make().keys() - {"weight"}):
        at = f"{call.__name__}_{key}"
        ROWS[f"{at}_none"] = (call, make, key, lambda _: None, TypeError, f"{key}: received NoneType")
        ROWS[f"{at}_number"] = (call, make, key, lambda found: [found[0], 1], TypeError, f"{key}[1]: received int")
        ROWS[f"{at}_short"] = (
            call,
            make,
            key,
            lambda found: found[:1],
            ValueError,
            "number of ",
            "received ",
            "1",
            "2",
        )
        for name, (spoil, *pieces) in BAD.items():
            spoiled = partial(second, spoil)
            ROWS[f"{at}_{name}"] = (call, make, key, spoiled, ValueError, *pieces)
ROWS.update(
    {
        "weight_above": (average_update, update_arguments, "weight", lambda _: 1.5, ValueError, "weight: received 1.5"),
        "weight_below": (average_update, update_arguments, "weight", lambda _: -1e-9, ValueError, "weight: received"),
        "weight_nan": (
            average_update,
            update_arguments,
            "weight",
            lambda _: float("nan"),
            ValueError,
            "weight: received",
        ),
        "weight_text": (average_update, update_arguments, "weight", lambda _: "1", TypeError, "weight: received str"),
        "average_16": (
            *(average_update, update_arguments, "averages", lambda found: [found[0], found[1].astype("float16")]),
            *(ValueError, "dtype of the average of parameter 'value_float32_1'", "float16", "float32 or float64"),
        ),
        "value_64": (
            *(average_update, update_arguments, "values", lambda found: [found[0], found[1].astype("float64")]),
            *(ValueError, "dtype of the average", "received float32, expected float64"),
        ),
        "value_int": (
            *(average_update, update_arguments, "values", lambda found: [found[0], found[1].astype("int32")]),
            *(ValueError, "int32", "float16, bfloat16, float32 or float64"),
        ),
        "copy_dtype": (
            *(average_update, update_arguments, "copies", lambda found: [found[0], found[1].astype("int32")]),
            *(ValueError, "dtype of copy of parameter 'value_int64_1'", "int32", "int64"),
        ),
        "exchanged_dtype": (
            *(average_swap, swap_arguments, "averages", lambda found: [found[0], found[1].astype("float64")]),
            *(ValueError, "dtype of average of parameter 'value_float32_1'", "float64", "float32"),
        ),
        "source_16": (
            *(average_swap, swap_arguments, "sources", lambda found: [found[0], found[1].astype("bfloat16")]),
            *(
                ValueError,
                "dtype of the source of parameter 'value_float16_1'",
                "bfloat16",
                "float32, float64 or float16",
            ),
        ),
        "target_int": (
            *(average_swap, swap_arguments, "targets", lambda found: [found[0], found[1].astype("int32")]),
            *(ValueError, "int32", "float16, bfloat16, float32 or float64"),
        ),
    }
)


@table(ROWS)
def test_refused_and_nothing_written(row: Any) -> None:
    """The second of each list is bad, so that the first might have been written before it is looked at."""
    call, make, key, spoil, error, *pieces = row
    arguments = make()
    whole = [tensor for found in arguments.values() if isinstance(found, list) for tensor in found]
    arguments[key] = spoil(arguments[key])
    before = content(whole)
    assert_refused(lambda: call(**arguments), error, pieces)
    assert content(whole) == before
