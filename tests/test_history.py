# SPDX-License-Identifier: Apache-2.0
"""``history_dtype``: bad arguments, which parameters have a narrow history, groups, and what becomes of edited groups.

What a narrow history does to the steps is test_narrow_history.py's, checkpoints are test_checkpoint.py's.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import PIR, Network, Quadratic, StaticRun, bits, dtype_name, state_of
from refusing import Row, assert_constructor_refuses, assert_refused, given, named, table

from paddle_asgd import ASGD, LipschitzSearch, native

KEPT = ("d", "y", "y_scale", "m")
#: Narrow and exact ones, two of them of one size.
SHAPES = [[3, 2741], [5], [64, 64], [4095], [64, 64]]
NARROW = [True, False, True, False, True]


def in_group(**options: Any) -> Callable:
    """A second group with a bad option."""
    return lambda p, q: {"parameters": [{"params": [p]}, {"params": [q], **options}]}


EXPECTED = "expected 'int16', 'int8' or None"
BAD = {
    "unknown": ("int4", ValueError, "'int4'", EXPECTED),
    "float": ("float16", ValueError, "'float16'", EXPECTED),
    "empty": ("", ValueError, "''", EXPECTED),
    "upper_case": ("INT8", ValueError, "'INT8'", EXPECTED),
    "bits": (8, TypeError, "8 of type int", EXPECTED, "as a string"),
    "bool": (True, TypeError, "True", EXPECTED),
    "dtype": (paddle.int8, TypeError, "int8", EXPECTED, "as a string"),
    "numpy": (np.int8, TypeError, "int8", EXPECTED),
    "list": (["int8"], TypeError, "['int8']", EXPECTED),
}
CONSTRUCTOR = {
    **{key: (given(history_dtype=v), e, "history_dtype: received", *t) for key, (v, e, *t) in BAD.items()},
    **{
        f"group_{key}": (in_group(history_dtype=v), e, "parameters[1]['history_dtype']: received", *t)
        for key, (v, e, *t) in BAD.items()
    },
    "one_slot": (given(history_dtype="int8", batch_num=1), ValueError, "history_dtype", "'int8'", "batch_num=1"),
    "group_one_slot": (
        lambda p, q: {"parameters": [{"params": [p]}, {"params": [q], "history_dtype": "int16"}], "batch_num": 1},
        *(ValueError, "parameters[1]['history_dtype']", "'int16'", "batch_num=1"),
    ),
    "group_misspelt": (in_group(history_dtyp="int8"), ValueError, "'history_dtyp'", "did you mean 'history_dtype'?"),
}


@table(CONSTRUCTOR)
def test_constructor(row: Row) -> None:
    assert_constructor_refuses(row)


def test_it_is_shown() -> None:
    assert "history_dtype='int8'" in repr(ASGD(0.1, 3, [named("first", [5])], history_dtype="int8"))
    assert "history_dtype" not in repr(ASGD(0.1, 3, [named("first", [5])]))


# ---- Which parameters have one ---------------------------------------------------------------------------------------


def trained(optimizer: ASGD, problem: Quadratic, params: list, steps: range = range(8)) -> list[dict]:
    for step in steps:
        problem.backward(step, params)
        optimizer.step()
        optimizer.clear_grad()
    return [bits(state_of(optimizer, param, KEPT)) for param in params]


def forms(optimizer: ASGD, params: list) -> list[tuple]:
    """The dtype of each history, and the shape of its scales."""
    states = (state_of(optimizer, param, KEPT) for param in params)
    return [(str(state["y"].dtype), state["y_scale"].shape if "y_scale" in state else None) for state in states]


@pytest.mark.parametrize("history_dtype", ["int16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tensors_of_4096_elements_and_more(history_dtype: str, dtype: str) -> None:
    problem = Quadratic(3, [*SHAPES, [4097], [], *[[0, 4096]] * PIR])  # Paddle 2.6 creates no empty parameter
    params = problem.parameters(dtype)
    optimizer = ASGD(0.1, 3, params, history_dtype=history_dtype)
    for param in params:
        param.grad = paddle.ones_like(param)
    optimizer.step()
    blocks = [65, None, 32, None, 32, 33, None, *[None] * PIR]
    expected = [(dtype, None) if count is None else (history_dtype, (3, count)) for count in blocks]
    assert forms(optimizer, params) == expected
    assert {state_of(optimizer, param)["d"].dtype for param in params} == {np.dtype(dtype)}


def test_state_before_the_first_step() -> None:
    """As wrappers and ``fleet`` make it."""
    params = Quadratic(3, SHAPES).parameters()
    optimizer = ASGD(0.1, 3, params, history_dtype="int8")
    optimizer._create_accumulators(None, params)
    assert forms(optimizer, params) == [("int8", (3, -(-p.size // 128))) if n else ("float32", None)
                                        for p, n in zip(params, NARROW)]  # fmt: skip
    assert not any(state_of(optimizer, param, KEPT)[name].any() for param in params for name in ("y", "d", "m"))


class Calls:
    """Counts the native calls of full steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, call = 0, native.asgd_call

        def counted(*arguments: Any) -> Any:
            self.count += not arguments[8]  # check_only
            return call(*arguments)

        monkeypatch.setattr(native, "asgd_call", counted)


def test_narrow_and_exact_parameters_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    problem = Quadratic(3, SHAPES)
    params = problem.parameters()
    kinds = ["int8", "int8", None, "int16", "int16"]
    groups = [{"params": [param], "history_dtype": kind} for param, kind in zip(params, kinds)]
    optimizer = ASGD(0.1, 3, groups)
    trained(optimizer, problem, params, range(4))
    assert calls.count == 4
    found = [dtype for dtype, _ in forms(optimizer, params)]
    assert found == ["int8", "float32", "float32", "float32", "int16"]


@pytest.mark.shortcut
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_they_share_a_plan(dtype: str) -> None:
    params = [paddle.ones(shape, dtype) for shape in SHAPES]
    optimizer = ASGD(0.1, 3, params, history_dtype="int8", multi_precision=True)
    plans = []
    for _ in range(4):
        for param in params:
            param.stop_gradient = False
            param.grad = paddle.ones_like(param)
        optimizer.step()
        plans.append(optimizer._shortcut.plan)
    assert all(plan is plans[0] for plan in plans)


# ---- Groups ----------------------------------------------------------------------------------------------------------


def test_a_groups_own_wins() -> None:
    params = Quadratic(3, [[64, 64]] * 3).parameters()
    groups = [
        {"params": [params[0]]},
        {"params": [params[1]], "history_dtype": None},
        {"params": [params[2]], "history_dtype": "int8"},
    ]
    optimizer = ASGD(0.1, 3, groups, history_dtype="int16")
    trained(optimizer, Quadratic(3, [[64, 64]] * 3), params, range(1))
    assert [dtype for dtype, _ in forms(optimizer, params)] == ["int16", "float32", "int8"]


def test_a_group_that_is_added_later() -> None:
    problem = Quadratic(3, [[64, 64]] * 3)
    params = problem.parameters()
    optimizer = ASGD(0.1, 3, params[:1], history_dtype="int16")
    problem.backward(0, params[:1], [0])
    optimizer.step()
    optimizer.clear_grad()
    optimizer.add_param_group({"params": params[1:2], "history_dtype": "int8"})
    optimizer.add_param_group({"params": params[2:]})
    trained(optimizer, problem, params, range(1, 3))
    assert [dtype for dtype, _ in forms(optimizer, params)] == ["int16", "int8", "int16"]


def test_a_group_edited_before_its_first_step() -> None:
    params = Quadratic(3, [[64, 64]]).parameters()
    optimizer = ASGD(0.1, 3, [{"params": params, "history_dtype": "int8"}])
    optimizer.param_groups[0]["history_dtype"] = "int16"
    trained(optimizer, Quadratic(3, [[64, 64]]), params, range(1))
    assert forms(optimizer, params) == [("int16", (3, 32))]


@pytest.mark.filterwarnings("ignore:.*matched by their order")
@pytest.mark.parametrize("load", ["set_state_dict", "set_numbers_state_dict"])
@pytest.mark.parametrize(("given", "edited"), [("int8", "int16"), (None, "int8"), ("int8", None)])
def test_an_edit_before_the_first_step_counts_for_a_checkpoint(
    given: str | None, edited: str | None, load: str
) -> None:
    """As a program that edits its groups resumes: the checkpoint of its own run, and no other."""
    problem = Quadratic(3, SHAPES)

    def edited_optimizer() -> tuple[ASGD, list]:
        params = problem.parameters()
        optimizer = ASGD(0.1, 3, [{"params": params, "history_dtype": given}])
        optimizer.param_groups[0]["history_dtype"] = edited
        return optimizer, params

    saved, params = edited_optimizer()
    found = trained(saved, problem, params, range(5))
    whole = load == "set_state_dict"
    state = saved.state_dict() if whole else saved.numbers_state_dict()
    optimizer, params = edited_optimizer()
    getattr(optimizer, load)(state)
    assert [dtype for dtype, _ in forms(optimizer, params)] == [edited if n and edited else "float32" for n in NARROW]
    if whole:
        kept = [bits(state_of(optimizer, param, KEPT)) for param in params]
        assert all(new[name] == old[name] for new, old in zip(kept, found) for name in old if name != "x")
    foreign = ASGD(0.1, 3, params, history_dtype=given)
    with pytest.raises(ValueError, match=r"history_dtype"):
        getattr(foreign, load)(state)


def test_an_edit_before_the_first_step_counts_for_the_bytes() -> None:
    params = Quadratic(3, SHAPES).parameters()
    optimizer = ASGD(0.1, 3, [{"params": params}])
    optimizer.param_groups[0]["history_dtype"] = "int8"
    assert optimizer.state_bytes() == ASGD(0.1, 3, params, history_dtype="int8").state_bytes()
    optimizer.param_groups[0]["history_dtype"] = "int4"
    assert_refused(optimizer.state_bytes, ValueError, ["param_groups[0]['history_dtype']", "'int4'", EXPECTED])


@pytest.mark.parametrize(
    ("began", "change"), [("int8", "int16"), ("int8", None), ("int8", "gone"), (None, "int8"), (None, "int16")]
)
def test_a_group_edited_later_is_refused(began: str | None, change: str | None) -> None:
    """Nothing happens to the history, and the run goes on as it would have once the group is what it was."""
    runs = []
    for edited in (True, False):
        problem = Quadratic(3, SHAPES)
        params = problem.parameters()
        optimizer = ASGD(0.1, 3, [{"params": params, "history_dtype": began}])
        before = trained(optimizer, problem, params, range(4))
        if edited:
            group = optimizer.param_groups[0]
            group.pop("history_dtype") if change == "gone" else group.update(history_dtype=change)
            problem.backward(4, params)
            kind = None if change == "gone" else change
            pieces = [f"param_groups: received history_dtype={kind!r}", repr(params[0].name), f"expected {began!r}"]
            # An edit that has not been checked yet changes nothing.
            assert [bits(state_of(optimizer, param, KEPT)) for param in params] == before
            assert optimizer.gradient_norm() < np.inf
            assert_refused(optimizer.step, ValueError, pieces)
            assert [bits(state_of(optimizer, param, KEPT)) for param in params] == before
            optimizer.clear_grad()
            group["history_dtype"] = began
        runs.append(trained(optimizer, problem, params, range(4, 8)))
    assert runs[0] == runs[1]


def test_a_bad_edit_is_refused() -> None:
    params = Quadratic(3, [[64, 64]]).parameters()
    optimizer = ASGD(0.1, 3, [{"params": params, "history_dtype": "int8"}])
    trained(optimizer, Quadratic(3, [[64, 64]]), params, range(2))
    optimizer.param_groups[0]["history_dtype"] = "int4"
    for param in params:
        param.grad = paddle.ones_like(param)
    assert_refused(optimizer.step, ValueError, ["param_groups[0]['history_dtype']", "'int4'", EXPECTED])


@pytest.mark.parametrize(
    ("default", "own", "back"),
    [(None, "int8", {}), (None, "int8", {"history_dtype": "int16"}), ("int8", None, {}), ("int16", "int8", {})],
)
def test_a_parameter_that_leaves_and_comes_back(default: str | None, own: str | None, back: dict) -> None:
    """As it was, or not at all; while it is gone nobody asks about its history."""
    problem = Quadratic(3, [[64, 64]] * 2)
    params = problem.parameters()
    optimizer = ASGD(0.1, 3, [{"params": list(params), "history_dtype": own}], history_dtype=default)
    trained(optimizer, problem, params, range(2))
    del optimizer.param_groups[0]["params"][1]
    optimizer.param_groups[0]["weight_decay"] = 0.5
    problem.backward(2, params)
    optimizer.step()
    optimizer.clear_grad()
    group = {"params": [params[1]], **back}
    received = back.get("history_dtype", default)
    pieces = [f"history_dtype={received!r}", f"expected {own!r}"]
    assert_refused(lambda: optimizer.add_param_group(group), ValueError, pieces)
    optimizer.add_param_group({**group, "history_dtype": own})
    trained(optimizer, problem, params, range(3, 5))
    assert [state_of(optimizer, param)["m"].item() for param in params] == [5, 4]


# ---- Other ways to a step --------------------------------------------------------------------------------------------


def by_minimize(network: Network, optimizer: ASGD, numbers: Any) -> None:
    loss = network(numbers)
    loss.backward()
    optimizer.minimize(loss)


def by_apply_gradients(network: Network, optimizer: ASGD, numbers: Any) -> None:
    loss = network(numbers)
    loss.backward()
    optimizer.apply_gradients(optimizer.backward(loss))


def by_step(network: Network, optimizer: ASGD, numbers: Any) -> None:
    network(numbers).backward()
    optimizer.step()


def by_to_static(network: Network, optimizer: ASGD, numbers: Any) -> None:
    """A whole step, where the tracer follows Python."""

    def whole(numbers: Any) -> None:
        by_step(network, optimizer, numbers)

    paddle.jit.to_static(whole)(numbers)


DOORS = [by_minimize, by_apply_gradients, *[by_to_static] * PIR]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door_takes_the_same_step(door: Callable) -> None:
    problem = Quadratic(3, SHAPES)
    runs = []
    for way in (by_step, door):
        network = Network(problem)
        optimizer = ASGD(0.1, 3, network.parameters(), weight_decay=0.1, history_dtype="int8")
        for step in range(7):
            way(network, optimizer, paddle.to_tensor(Network.numbers(problem, step)))
            optimizer.clear_grad()
        runs.append([bits(state_of(optimizer, param, KEPT)) for param in network.parameters()])
    assert runs[0] == runs[1]


@pytest.mark.filterwarnings("ignore:.*is rounded to it after every step")
@pytest.mark.parametrize("steps_before", [0, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_master_weights_switched_on_later(dtype: str, steps_before: int) -> None:
    """What paddle.amp.decorate does to an optimizer that exists; the history goes on."""
    param = paddle.ones([64, 64], dtype)
    param.stop_gradient = False
    optimizer = ASGD(0.0, 3, [param], history_dtype="int16")
    draw, grads = np.random.default_rng(3), []
    for step in range(7):
        optimizer._multi_precision = step >= steps_before
        param.grad = paddle.to_tensor(draw.normal(size=[64, 64])).astype(dtype)
        grads.append(param.grad.astype("float32").numpy())
        optimizer.step()
    assert set(optimizer._master_weights) == {param.name}
    state = state_of(optimizer, param, KEPT)
    for slot, grad in ((6 % 3, grads[6]), (5 % 3, grads[5]), (4 % 3, grads[4])):
        decoded = state["y"][slot] * np.repeat(state["y_scale"][slot], 128).reshape([64, 64])
        np.testing.assert_allclose(decoded, grad, rtol=0, atol=np.abs(grad).max() / 2**15)


@pytest.mark.filterwarnings("ignore:.*is rounded to it after every step")
def test_gradients_may_change_their_dtype() -> None:
    """A model that is cast to 16 bits, with its gradients; an exact history must keep the dtype that it began with."""
    param = paddle.create_parameter([64, 64], "float32")
    optimizer = ASGD(0.1, 3, [param], history_dtype="int8")
    for dtype in ("float32", "float32", "float16", "float16", "bfloat16"):
        if dtype_name(param) != dtype:
            param._clear_data()
            paddle.zeros([64, 64], dtype)._share_buffer_to(param)
        param.grad = paddle.ones([64, 64], dtype)
        optimizer.step()
        param.clear_gradient(False)
    assert state_of(optimizer, param)["m"] == 5
    assert forms(optimizer, [param]) == [("int8", (3, 32))]


def test_a_search_for_the_learning_rate() -> None:
    """The points that it tries touch no history, so the trial steps of both end at nearly the same L."""
    found = []
    for history_dtype in (None, "int16"):
        problem = Quadratic(3, [[64, 64]])
        params = problem.parameters()
        optimizer = ASGD(0.1, 3, params, theta=0.3, history_dtype=history_dtype)
        search = LipschitzSearch(optimizer, 0.01)
        a, c = ([paddle.to_tensor(v[0].astype("float32")) for v in numbers] for numbers in (problem.a, problem.c))
        for step in range(30):
            k = optimizer.batch_index = step % 3
            search.step(lambda k=k, p=params[0]: paddle.sum(0.5 * a[k] * p * p - c[k] * p))  # noqa: B023
        found.append((search.lipschitz, params[0].numpy(), state_of(optimizer, params[0])["m"][0]))
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2] == 30
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-4)


# ---- Static graphs ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("static_mode")
def test_static_state(tmp_path: Any) -> None:
    """Made by the startup program, of zeros."""
    run = StaticRun(Quadratic(3, SHAPES), lambda loss, params: ASGD(0.1, 3, history_dtype="int8").minimize(loss))
    for name, shape, narrow in zip(run.names, SHAPES, NARROW):
        state = run.state(name, kept=KEPT if narrow else ("d", "y", "m"))
        assert not any(state[kept].any() for kept in state if kept != "x")
        assert state["y"].dtype == ("int8" if narrow else "float32")
        assert not narrow or state["y_scale"].shape == (3, -(-int(np.prod(shape)) // 128))
        assert narrow or run.scope.find_var(f"{name}_y_scale_0") is None
