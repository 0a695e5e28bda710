# SPDX-License-Identifier: Apache-2.0
"""The door to C++: what it refuses at both of its sides, and how a library that is missing, broken or foreign is named.

Must not test what a step computes (test_asgd.py)."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from refusing import assert_refused, content, table

from paddle_asgd import native
from paddle_asgd.native import asgd_update

SHAPES = {"first": [3, 2], "second": [5]}
LISTS = ("params", "grads", "d", "y", "m")
#: The shape of the second item of each list.
SHAPE = {"params": [5], "grads": [5], "d": [5], "y": [3, 5], "m": [1], "y_scale": [3, 1]}
#: How the texts call the items, and the lists.
ITEM = {"params": "value", "grads": "gradient", "d": "d", "y": "y", "m": "m"}
LIST = {"params": "gradients", "grads": "gradients", "d": "sums d", "y": "histories y", "m": "counters m"}


def native_call(dtype: str = "float32", masters: bool = False, narrow: bool = False) -> dict:
    """Valid arguments for the fifth step of two parameters."""
    draw = np.random.default_rng(3)

    def one(shape: Sequence[int], of: str) -> paddle.Tensor:
        return paddle.to_tensor(draw.normal(size=shape).astype("float32")).astype(of)

    call = {
        "params": [one(shape, dtype) for shape in SHAPES.values()],
        "grads": [one(shape, dtype) for shape in SHAPES.values()],
        "d": [one(shape, "float32") for shape in SHAPES.values()],
        "y": [one([3, *shape], dtype) for shape in SHAPES.values()],
        "m": [paddle.to_tensor([4]) for _ in SHAPES],
        "masters": [one(shape, "float32") for shape in SHAPES.values()] if masters else None,
        "learning_rate": 0.1,
        "weight_decay": 0.25,
    }
    if narrow:
        call["y"] = [y.astype(stored) for y, stored in zip(call["y"], ("int8", "int16"))]
        call["y_scale"] = [paddle.full([3, -(-int(np.prod(shape)) // 128)], 0.5) for shape in SHAPES.values()]
    for param, name in zip(call["params"], SHAPES):
        param.name = name
    return call


def second(key: str, make: Callable[[], Any], **kind: Any) -> Callable:
    """The second item of a list is bad, so that the first might have been written before it is looked at."""

    def call() -> dict:
        arguments = native_call(**kind)
        arguments[key][1] = make()
        if key == "params" and isinstance(arguments[key][1], paddle.Tensor):
            arguments[key][1].name = "second"
        return arguments

    return call


def whole(key: str, make: Callable[[], Any], **kind: Any) -> Callable:
    return lambda: {**native_call(**kind), key: make()}


def tensor(key: str, dtype: str = "", shape: Sequence[int] = ()) -> paddle.Tensor:
    return paddle.ones(shape or SHAPE[key], dtype or ("int64" if key == "m" else "float32"))


def strided(key: str) -> paddle.Tensor:
    return tensor(key, shape=[*SHAPE[key], 2])[..., 0]


def without_memory(key: str) -> paddle.Tensor:
    emptied = tensor(key)
    emptied._clear_data()
    return emptied


def selected_rows() -> paddle.Tensor:
    embedding = paddle.nn.Embedding(5, 1, sparse=True)
    embedding(paddle.to_tensor([0, 1, 1])).sum().backward()
    return embedding.weight.grad


def coo() -> paddle.Tensor:
    return paddle.sparse.sparse_coo_tensor([[0]], [1.0], [5])


def half_masters() -> list[paddle.Tensor]:
    return native_call("float16", masters=True)["masters"]


ROWS = {}
for k in LISTS:
    named = (ITEM[k], "'second'")
    ROWS.update(
        {
            f"{k}_short": (whole(k, lambda k=k: native_call()[k][:1]), ValueError, LIST[k], "1", "2"),
            f"{k}_is_none": (whole(k, lambda: None), TypeError, k, "None"),
            f"{k}_is_a_tensor": (whole(k, lambda: paddle.ones([2, 5])), TypeError, k, "Tensor"),
            f"{k}_with_none": (second(k, lambda: None), TypeError, f"{k}[1]", "None"),
            f"{k}_with_array": (second(k, lambda: np.ones(5)), TypeError, f"{k}[1]", "ndarray"),
            f"{k}_shape": (second(k, lambda k=k: tensor(k, shape=[7, 7])), ValueError, "'second'", "[7, 7]"),
            f"{k}_float64": (second(k, lambda k=k: tensor(k, "float64")), ValueError, "'second'", "float64"),
            f"{k}_int32": (second(k, lambda k=k: tensor(k, "int32")), ValueError, "'second'", "int32"),
            f"{k}_uninitialised": (second(k, paddle.Tensor), ValueError, "'second'"),
            f"{k}_without_memory": (second(k, lambda k=k: without_memory(k)), ValueError, *named, "memory"),
            f"{k}_selected_rows": (second(k, selected_rows), ValueError, *named, "dense"),
            f"{k}_coo": (second(k, coo), ValueError, *named, "dense"),
        }
    )
    if k != "m":  # a counter is one number, which has no stride
        ROWS[f"{k}_strided"] = (second(k, lambda k=k: strided(k)), ValueError, *named, "strided", ".contiguous()")
for k in ("learning_rate", "weight_decay"):
    ROWS.update(
        {
            f"{k}_none": (whole(k, lambda: None), TypeError, k, "None"),
            f"{k}_string": (whole(k, lambda: "x"), TypeError, k, "str"),
            f"{k}_list": (whole(k, lambda: [0.1]), TypeError, k, "list"),
            f"{k}_complex": (whole(k, lambda: 1j), TypeError, k, "complex"),
            f"{k}_int_tensor": (whole(k, lambda: paddle.to_tensor([1])), ValueError, k, "int64"),
            f"{k}_half_tensor": (whole(k, lambda: paddle.ones([1], "float16")), ValueError, k, "float16"),
            f"{k}_two_elements": (whole(k, lambda: paddle.ones([2])), ValueError, k, "[2]"),
        }
    )
HALF = {"dtype": "float16", "masters": True}
ROWS.update(
    {
        "y_no_slots": (second("y", lambda: paddle.ones([0, 5])), ValueError, "y", "'second'", "[0, 5]"),
        "y_0d": (second("y", lambda: paddle.ones([])), ValueError, "y", "'second'", "[]"),
        "y_other_slots": (second("y", lambda: paddle.ones([4, 5])), ValueError, "slots in y", "'second'", "4", "3"),
        "masters_is_a_tensor": (whole("masters", lambda: paddle.ones([2]), dtype="float16"), TypeError, "masters"),
        "masters_beside_float32": (whole("masters", half_masters), ValueError, "'first'", "float32", "master"),
        "masters_short": (whole("masters", lambda: half_masters()[:1], **HALF), ValueError, "master weights", "1", "2"),
        "masters_empty": (whole("masters", lambda: [], **HALF), ValueError, "master weights", "0", "2"),
        "masters_with_none": (second("masters", lambda: None, **HALF), TypeError, "masters[1]", "None"),
        "masters_shape": (second("masters", lambda: tensor("d", shape=[7]), **HALF), ValueError, "'second'", "[7]"),
        "masters_float64": (
            second("masters", lambda: tensor("d", "float64"), **HALF),
            ValueError,
            "'second'",
            "float64",
        ),
        "masters_strided": (second("masters", lambda: strided("d"), **HALF), ValueError, "'second'", "strided"),
        "grads_other_16_bit": (
            second("grads", lambda: tensor("d", "bfloat16"), **HALF),
            ValueError,
            "'second'",
            "bfloat16",
        ),
        "y_other_than_grads": (second("y", lambda: tensor("y"), **HALF), ValueError, "'second'", "float32", "float16"),
    }
)
NARROW = {"narrow": True}
ROWS.update(
    {
        "y_scale_missing": (whole("y_scale", lambda: None, **NARROW), ValueError, "scales y_scale", "0", "2"),
        "y_scale_short": (
            whole("y_scale", lambda: native_call(**NARROW)["y_scale"][:1], **NARROW),
            ValueError,
            *("scales y_scale", "1", "2"),
        ),
        "y_scale_beside_exact": (
            whole("y_scale", lambda: native_call(**NARROW)["y_scale"]),
            ValueError,
            *("scales y_scale", "2", "0"),
        ),
        "y_scale_is_a_tensor": (whole("y_scale", lambda: tensor("y_scale"), **NARROW), TypeError, "y_scale", "Tensor"),
        "y_scale_with_none": (second("y_scale", lambda: None, **NARROW), TypeError, "y_scale[1]", "None"),
        "y_scale_shape": (
            second("y_scale", lambda: tensor("y_scale", shape=[3, 2]), **NARROW),
            ValueError,
            *("y_scale", "'second'", "[3, 2]", "[3, 1]"),
        ),
        "y_scale_float64": (
            second("y_scale", lambda: tensor("y_scale", "float64"), **NARROW),
            ValueError,
            *("y_scale", "'second'", "float64"),
        ),
        "y_scale_strided": (second("y_scale", lambda: strided("y_scale"), **NARROW), ValueError, "'second'", "strided"),
        "y_scale_uninitialised": (second("y_scale", paddle.Tensor, **NARROW), ValueError, "y_scale", "'second'"),
        "y_scale_without_memory": (
            second("y_scale", lambda: without_memory("y_scale"), **NARROW),
            ValueError,
            *("y_scale", "'second'", "memory"),
        ),
    }
)


@table(ROWS)
def test_refused_at_once(row: tuple) -> None:
    make, error, *pieces = row
    call = make()
    lists = [call[key] for key in (*LISTS, "masters", "y_scale") if isinstance(call.get(key), list)]
    tensors = [t for items in lists for t in items if isinstance(t, paddle.Tensor)]
    # Paddle itself dies when it is asked for the numbers of a sparse tensor.
    readable = [t for t in tensors if t.is_dense() and t._is_initialized()]
    before = content(readable)
    assert_refused(lambda: asgd_update(**call), error, pieces)
    assert content(readable) == before


@pytest.mark.parametrize("key", ["params", "grads", "d", "y"])
def test_refused_where_memory_ends_before_the_shape(key: str) -> None:
    """Not in the table, whose check would itself read beyond the end."""
    call = native_call()
    short = paddle.ones([1])
    short.get_tensor()._set_dims(SHAPE[key])
    short.name = "second"
    call[key][1] = short
    pieces = ["memory", "4", str(4 * int(np.prod(SHAPE[key])))]
    assert_refused(lambda: asgd_update(**call), ValueError, [*pieces, ITEM[key], "'second'"])
    assert [m.item() for m in call["m"]] == [4, 4]


def test_valid_calls_step() -> None:
    """The table's arguments are bad only where a row says so; and any sequence will do."""
    for kind in ({}, {"dtype": "bfloat16"}, HALF, NARROW):
        for sequence in (list, tuple):
            call = native_call(**kind)
            call.update({key: sequence(call[key]) for key in (*LISTS, "masters") if call[key] is not None})
            before = content(call["params"])
            asgd_update(**call)
            assert [m.item() for m in call["m"]] == [5, 5]
            assert all(b != a for b, a in zip(before, content(call["params"])))


def test_no_parameters_are_no_error() -> None:
    asgd_update([], [], [], [], [], None, 0.1, 0.25)


def test_found_inf_is_not_ignored_in_dygraph() -> None:
    call = native_call()
    before = content(call["params"])
    asgd_update(**call, found_inf=paddle.to_tensor([True]))
    assert content(call["params"]) == before
    asgd_update(**call, found_inf=paddle.to_tensor([False]))
    assert content(call["params"]) != before


# ---- Static graphs ---------------------------------------------------------------------------------------------------


def program_that_calls(**bad: Any) -> tuple:
    """A program with one native call; ``bad`` gives its arguments other shapes, and 'float64' another dtype."""
    main, startup = paddle.static.Program(), paddle.static.Program()
    one = paddle.nn.initializer.Constant(1.0)

    def variable(shape: Sequence[int], dtype: str = "float32", name: str | None = None) -> Any:
        made = paddle.create_parameter(list(shape), dtype, name=name, default_initializer=one)
        made.persistable = True
        return made

    with paddle.static.program_guard(main, startup):
        params = [variable(shape, name=name) for name, shape in SHAPES.items()]
        asgd_update(
            params,
            [paddle.full(SHAPES["first"], 0.5), paddle.full(bad.get("grads", [5]), 0.5, bad.get("dtype", "float32"))],
            [variable(shape) for shape in SHAPES.values()],
            [variable([3, 3, 2]), variable(bad.get("y", [3, 5]))],
            [variable([1], "int64") for _ in SHAPES],
            None,
            paddle.full(bad.get("learning_rate", [1]), 0.1),
            paddle.full([1], 0.25),
        )
    return main, startup


STATIC = {
    "slots": ({"y": [4, 5]}, "slots in y", "#1", "4", "3"),
    "shape": ({"grads": [7]}, "gradient", "#1", "[7]", "[5]"),
    "dtype": ({"dtype": "float64"}, "gradient", "#1", "float64", "float32"),
    "learning_rate": ({"learning_rate": [2]}, "learning_rate", "[2]"),
}


@pytest.mark.usefixtures("static_mode")
@table(STATIC)
def test_refused_when_a_program_runs(row: tuple) -> None:
    bad, *pieces = row
    main, startup = program_that_calls(**bad)
    executor, scope = paddle.static.Executor(), paddle.static.Scope()
    with paddle.static.scope_guard(scope):
        executor.run(startup)
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the pieces are below
            executor.run(main)
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
    for name, shape in SHAPES.items():
        np.testing.assert_array_equal(np.array(scope.find_var(name).get_tensor()), np.ones(shape, "float32"))


PRELUDE = """
import warnings
warnings.simplefilter("ignore")
import paddle
from paddle_asgd.native import asgd_update
paddle.enable_static()
def variable(*shape):
    return paddle.create_parameter(list(shape), "float16")
arguments = dict(params=[variable(5)], grads=[variable(5)], d=[variable(5)], y=[variable(3, 5)], m=[variable(1)],
                 masters=None, learning_rate=variable(1), weight_decay=variable(1))
arguments.update({})
try:
    asgd_update(**arguments)
except (TypeError, ValueError) as error:
    print("refused:", error)
"""
BUILDING = {
    "learning_rate_number": ("{'learning_rate': 0.1}", "learning_rate"),
    "weight_decay_number": ("{'weight_decay': 0.1}", "weight_decay"),
    "masters_empty": ("{'masters': []}", "masters"),
}


@table(BUILDING)
def test_refused_when_a_program_is_built(row: tuple) -> None:
    """In a process of its own: Paddle ends the process over each of these."""
    arguments, culprit = row
    code = PRELUDE.replace("update({})", f"update({arguments})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]
    assert "refused:" in done.stdout
    assert culprit in done.stdout


# ---- The library -----------------------------------------------------------------------------------------------------


def test_missing_library(tmp_path: Path) -> None:
    path = tmp_path / "_C.so"
    assert_refused(lambda: native._load(path), ImportError, [str(path), native.REBUILD])


def test_broken_library(tmp_path: Path) -> None:
    path = tmp_path / "_C.so"
    path.write_bytes(b"no library")
    with pytest.raises(ImportError) as caught:
        native._load(path)
    # What Paddle or the loader said stands between.
    assert [p for p in (str(path), paddle.__version__, native.REBUILD) if p not in str(caught.value)] == []


def test_library_that_is_none_of_ours(tmp_path: Path) -> None:
    """A shared library that can be opened, but holds neither the operator nor the module."""
    source, path = tmp_path / "other.c", tmp_path / "_C.so"
    source.write_text("int nothing(void) { return 0; }")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    assert_refused(lambda: native._load(path), ImportError, [str(path), native.REBUILD])


def test_library_for_another_paddle(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read tensors where they do not lie. So it is refused before its operator is registered."""
    monkeypatch.setattr(paddle, "__version__", "1.2.3")
    monkeypatch.setattr(native, "load_op_meta_info_and_register_op", lambda path: pytest.fail("registered"))
    pieces = [native._C.built_for_paddle, "1.2.3", native.REBUILD, str(native._LIBRARY)]
    assert_refused(native._load, ImportError, pieces)


@pytest.mark.parametrize("gpus", [0, 2])
def test_library_without_cuda_under_a_paddle_with(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: gpus)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for with_cuda in (False, True):
            native._warn_without_cuda(types.SimpleNamespace(built_with_cuda=with_cuda))
    # On a machine without a GPU nothing is amiss.
    assert [w.category for w in caught] == [RuntimeWarning] * (gpus > 0)
    assert all("CUDA" in str(w.message) and native.REBUILD in str(w.message) for w in caught)


def test_the_library_in_use_is_ours() -> None:
    assert native._C.built_for_paddle == paddle.__version__
