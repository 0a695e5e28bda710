# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that do not fit: refused as a whole, by name, with everything as it was. The table is the test."""

from __future__ import annotations

import re
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from refusing import assert_refused, table
from resuming import BY_ORDER, NARROW_SHAPES, STOP, Run, one_warning

from paddle_asgd import ASGD


def key_of(state: dict, run: Run, name: str) -> str:
    """The entry of the third parameter, so that two might have been written before it is looked at."""
    pattern = re.compile(rf"{re.escape(run.params[2].name)}_(.+_)?{name}_\d+")
    (key,) = [key for key in state if pattern.fullmatch(key)]
    return key


def entry(name: str, change: Callable[[Any], Any]) -> Callable:
    def bad(state: dict, run: Run) -> None:
        key = key_of(state, run, name)
        state[key] = change(state[key])

    return bad


def missing(name: str) -> Callable:
    return lambda state, run: state.pop(key_of(state, run, name))


def added(**entries: Any) -> Callable:
    return lambda state, run: state.update({k: v() if callable(v) else v for k, v in entries.items()})


def without(key: str) -> Callable:
    return lambda state, run: state.pop(key)


def master(change: Callable[[dict, str], Any]) -> Callable:
    return lambda state, run: change(state["master_weights"], run.params[2].name)


def scheduled(key: str, value: Any) -> Callable:
    return lambda state, run: state["LR_Scheduler"].update({key: value})


def twice(state: dict, run: Run) -> None:
    state[f"{run.params[2].name}_d_7"] = state[key_of(state, run, "d")]


def parameter_gone(state: dict, run: Run) -> None:
    for name in "dym":
        state.pop(key_of(state, run, name))


def renamed(state: dict, run: Run, keep: int) -> None:
    """All but ``keep`` parameters are unknown."""
    for i, param in enumerate(run.params[keep:]):
        for key in [key for key in state if key.startswith(param.name + "_")]:
            state[key.replace(param.name, f"foreign_{i}.w_0")] = state.pop(key)


def fewer_and_renamed(state: dict, run: Run) -> None:
    parameter_gone(state, run)
    renamed(state, run, keep=0)


def cleared(tensor: paddle.Tensor) -> paddle.Tensor:
    tensor._clear_data()
    return tensor


EXACT = {"shapes": NARROW_SHAPES}
INT8 = {"shapes": NARROW_SHAPES, "history_dtype": "int8"}
INT16 = {"shapes": NARROW_SHAPES, "history_dtype": "int16"}
MASTERS = {"dtype": "float16", "multi_precision": True}
SCHEDULED = {"schedule": True}
BAD: dict[str, tuple] = {}
for label, name, kind in (*((n, n, {}) for n in "dym"), ("narrow_y", "y", INT8), ("narrow_y_scale", "y_scale", INT8)):
    BAD.update(
        {
            f"{label}_missing": (kind, missing(name), f"entry '{name}'", "third", "missing"),
            f"{label}_shape": (
                *(kind, entry(name, lambda v: paddle.zeros([7, 7], v.dtype))),
                *(f"entry '{name}'", "third", "[7, 7]"),
            ),
            f"{label}_bool": (kind, entry(name, lambda v: v.astype("bool")), f"entry '{name}'", "third", "bool"),
            f"{label}_none": (kind, entry(name, lambda v: None), f"entry '{name}'", "third", "None"),
            f"{label}_list": (kind, entry(name, lambda v: v.tolist()), f"entry '{name}'", "third", "list"),
            f"{label}_strings": (kind, entry(name, lambda v: np.array(["a"])), f"entry '{name}'", "third"),
            f"{label}_cleared": (kind, entry(name, cleared), f"entry '{name}'", "third"),
        }
    )
for value in (4, paddle.to_tensor(4), np.int64(4), 3.5, "abc", [3]):
    text = "4" if isinstance(value, (paddle.Tensor, np.integer)) else str(value)
    BAD[f"batch_num_{type(value).__name__}_{text}"] = ({}, added(batch_num=value), "batch_num", text)
for value in ("x", 3, {}, {"last_epoch": 5}, []):
    BAD[f"scheduler_{value!r}"] = (SCHEDULED, added(LR_Scheduler=value), "LR_Scheduler")
for key, values in {
    "last_epoch": (None, 1.5, True, "3", [3], np.nan),
    "last_lr": (None, np.nan, np.inf, -0.1, True, "0.1", [0.1]),
}.items():
    for value in values:
        BAD[f"{key}_{value!r}"] = (SCHEDULED, scheduled(key, value), "LR_Scheduler", key)
for value in (None, [], "x"):
    BAD[f"masters_{value!r}"] = (MASTERS, added(master_weights=value), "master_weights", type(value).__name__)
BAD.update(
    {
        "d_int32": ({}, entry("d", lambda v: v.astype("int32")), "'d'", "third", "int32", "float32"),
        "y_float64": ({}, entry("y", lambda v: v.astype("float64")), "'y'", "third", "float64", "float32"),
        "y_float16": ({}, entry("y", lambda v: v.astype("float16")), "'y'", "third", "float16", "float32"),
        "y_bfloat16_for_float16": (MASTERS, entry("y", lambda v: v.astype("bfloat16")), "'y'", "third", "bfloat16"),
        "y_scale_float64": (INT8, entry("y_scale", lambda v: v.astype("float64")), "'y_scale'", "float64", "float32"),
        "y_scale_of_no_use": (
            *(EXACT, lambda state, run: state.update({f"{run.params[2].name}_y_scale_0": paddle.ones([3, 65])})),
            *("'y_scale'", "third", "no use"),
        ),
        "m_int32": ({}, entry("m", lambda v: v.astype("int32")), "'m'", "third", "int32", "int64"),
        "m_negative": ({}, entry("m", lambda v: v - 5), "'m'", "third", "-1"),
        "twice": ({}, twice, "third", "_d_7"),
        "parameter_missing": ({}, parameter_gone, "third", "missing"),
        "foreign_parameter": ({}, added(**{"foreign.w_0_d_0": lambda: paddle.ones([3, 2])}), "foreign.w_0"),
        "foreign_entry": ({}, added(moment=lambda: paddle.ones([3, 2])), "'moment'"),
        "key_no_string": ({}, lambda state, run: state.update({5: paddle.ones([2])}), "5"),
        "some_renamed": ({}, lambda state, run: renamed(state, run, keep=2), "foreign_0.w_0"),
        "fewer_and_renamed": ({}, fewer_and_renamed, "foreign_0.w_0", "3", "4"),
        "empty": ({}, lambda state, run: state.clear(), "no state"),
        "scheduler_missing": (SCHEDULED, without("LR_Scheduler"), "LR_Scheduler", "missing", "ExponentialDecay"),
        "masters_missing": (MASTERS, without("master_weights"), "master_weights", "missing"),
        "master_missing": (MASTERS, master(lambda m, k: m.pop(k)), "master_weights", "third", "missing"),
        "master_foreign": (MASTERS, master(lambda m, k: m.update(foreign=m[k])), "master_weights", "'foreign'"),
        "master_shape": (MASTERS, master(lambda m, k: m.update({k: paddle.ones([7])})), "third", "[7]", "[3, 2]"),
        "master_int": (MASTERS, master(lambda m, k: m.update({k: m[k].astype("int32")})), "third", "int32"),
        "master_string": (MASTERS, master(lambda m, k: m.update({k: "x"})), "third", "str"),
        "master_of_no_use": (
            {},
            lambda state, run: state.update(master_weights={run.params[2].name: paddle.ones([3, 2])}),
            "third",
            "multi_precision=False",
        ),
    }
)


@table(BAD)
def test_refused(row: tuple) -> None:
    kind, spoil, *pieces = row
    run = Run(**kind)
    run.train(range(STOP))
    state = run.copied_state()
    run.train(range(STOP, STOP + 2))
    spoil(state, run)
    before = run.content(), sorted(run.optimizer.state_dict()), run.scheduler and dict(run.scheduler.state_dict())
    pieces = [run.params[2].name if piece == "third" else piece for piece in pieces]
    assert_refused(lambda: run.optimizer.set_state_dict(state), ValueError, ["set_state_dict", *pieces])
    after = run.content(), sorted(run.optimizer.state_dict()), run.scheduler and dict(run.scheduler.state_dict())
    assert after == before


@pytest.mark.parametrize("value", [None, [], "x", 3], ids=repr)
def test_no_dict(value: Any) -> None:
    run = Run()
    assert_refused(lambda: run.optimizer.set_state_dict(value), TypeError, ["set_state_dict", type(value).__name__])


def test_misshapen_by_order() -> None:
    """The order is trusted only as far as the shapes agree."""
    run = Run()
    run.train(range(STOP))
    state = run.copied_state()
    params = list(reversed([paddle.to_tensor(p.numpy(), stop_gradient=False) for p in run.params]))
    optimizer = ASGD(0.1, 3, params)
    with one_warning(BY_ORDER):
        assert_refused(lambda: optimizer.set_state_dict(state), ValueError, [params[0].name, "[3, 2]", "[]"])
    assert set(optimizer.state_dict()) == {"batch_num"}


def test_a_warning_that_is_an_error_leaves_no_state() -> None:
    """The first parameter would have been written before the second warns."""
    params = [paddle.create_parameter([3], dtype) for dtype in ("float32", "float16")]
    first, second = ASGD(0.1, 3, params), ASGD(0.1, 3, params)
    for param in params:
        param.grad = paddle.ones([3], param.dtype)
    with one_warning(None):
        first.step()
    with pytest.raises(UserWarning, match="is rounded to it after every step"):
        second.set_state_dict(first.state_dict())
    assert set(second.state_dict()) == {"batch_num"}


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, 0.0, 2.0], "x"], ids=repr)
def test_wrong_weights_are_the_checkpoints(weights: Any) -> None:
    run = Run(batch_weights=[1.0, 2.0, 3.0])
    state = {**run.copied_state(), "batch_weights": weights}
    with pytest.raises(ValueError, match="set_state_dict: the checkpoint's batch_weights"):
        run.optimizer.set_state_dict(state)


@pytest.mark.parametrize("loading", [EXACT, INT8, INT16], ids=["exact", "int8", "int16"])
@pytest.mark.parametrize("saved", [EXACT, INT8, INT16], ids=["from_exact", "from_int8", "from_int16"])
@pytest.mark.parametrize("by_order", [False, True], ids=["same_names", "built_again"])
def test_a_history_of_another_dtype(saved: dict, loading: dict, by_order: bool) -> None:
    """The reason and the remedy; and with that, what the remedy says."""
    with paddle.utils.unique_name.guard():
        source = Run(**saved)
    with paddle.utils.unique_name.guard("again_" if by_order else None):
        target = Run(**loading)
    source.train(range(STOP))
    target.train(range(2))
    before = target.content()
    received, expected = (kind.get("history_dtype") for kind in (saved, loading))
    with one_warning(BY_ORDER if by_order else None):
        if received != expected:
            pieces = [f"'y' of parameter {target.params[0].name!r} is {received or 'float32'}"]
            pieces += [f"expected {expected or 'float32'}, for the optimizer has history_dtype={expected!r}"]
            pieces += [f"create it with history_dtype={received!r}", "Nothing has been loaded"]
            assert_refused(lambda: target.optimizer.set_state_dict(source.copied_state()), ValueError, pieces)
            assert target.content() == before
        else:
            target.optimizer.set_state_dict(source.copied_state())
            assert target.content()[0][0]["y"] == source.content()[0][0]["y"]


@pytest.mark.skipif(not hasattr(paddle.optimizer, "ASGD"), reason="this Paddle has no paddle.optimizer.ASGD")
def test_a_state_of_the_built_in_for_a_narrow_history() -> None:
    run = Run(**INT16)
    theirs = paddle.optimizer.ASGD(0.1, 3, run.params)
    for param in run.params:
        param.grad = paddle.ones_like(param)
    theirs.step()
    pieces = ["'y' of parameter", "is float32, expected int16", "create it with history_dtype=None"]
    assert_refused(lambda: run.optimizer.set_state_dict(theirs.state_dict()), ValueError, pieces)
    assert set(run.optimizer.state_dict()) == {"batch_num"}


def test_a_group_of_another_history_dtype() -> None:
    """Each parameter counts by itself, and those of fewer elements have no other form."""
    source, target = Run(**INT8), Run(**EXACT)
    source.train(range(STOP))
    pairs = zip(("int8", None, "int16", None), target.params)
    groups = [{"params": [param], "history_dtype": history_dtype} for history_dtype, param in pairs]
    target.optimizer = ASGD(0.1, 3, groups, weight_decay=0.1)
    pieces = [f"'y' of parameter {target.params[2].name!r} is int8, expected int16"]
    with one_warning(BY_ORDER):
        assert_refused(lambda: target.optimizer.set_state_dict(source.copied_state()), ValueError, pieces)
    assert set(target.optimizer.state_dict()) == {"batch_num"}
