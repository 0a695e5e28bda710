# SPDX-License-Identifier: Apache-2.0
"""Static graphs as they are handled: saved, resumed, cloned, pruned, damaged. The numbers are test_static.py's."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import FULL_SHAPES, ON_GPU, PIR, Quadratic, StaticRun, bits

from paddle_asgd import ASGD

pytestmark = pytest.mark.usefixtures("static_mode")
host_memory = pytest.mark.skipif(ON_GPU, reason="reads and writes the host's memory")


def ours(loss: Any, params: list) -> None:
    ASGD(0.1, 3, weight_decay=0.1).minimize(loss)


def narrow(history_dtype: str | None) -> Callable[[Any, list], None]:
    return lambda loss, params: ASGD(0.1, 3, weight_decay=0.1, history_dtype=history_dtype).minimize(loss)


def sgd(loss: Any, params: list) -> None:
    paddle.optimizer.SGD(0.1).minimize(loss)


def saved_and_loaded(source: StaticRun, target: StaticRun, folder: Path) -> None:
    with paddle.static.scope_guard(source.scope):
        paddle.static.save(source.main, str(folder / "half"))
    with paddle.static.scope_guard(target.scope):
        paddle.static.load(target.main, str(folder / "half"), target.executor)


@pytest.mark.parametrize("history_dtype", [None, "int8"])
def test_save_and_resume(history_dtype: str | None, tmp_path: Path) -> None:
    """In another scope, from another build of the program: bit for bit what goes on without a break."""
    runs = [StaticRun(Quadratic(batches=3), narrow(history_dtype)) for _ in range(2)]
    for step in range(5):
        runs[0].run(step)
    saved_and_loaded(*runs, tmp_path)
    for step in range(5, 14):
        assert runs[0].run(step)[0].tobytes() == runs[1].run(step)[0].tobytes()
    for name in runs[0].names:
        assert bits(runs[0].state(name)) == bits(runs[1].state(name))
        assert runs[1].state(name)["m"] == 14
    if history_dtype is not None:
        largest = int(np.argmax([value.size for value in runs[0].problem.start]))
        name = runs[0].names[largest]
        assert len({run.array(f"{name}_y_scale_0").tobytes() for run in runs}) == 1


def test_a_file_of_an_exact_history_has_no_scales(tmp_path: Path) -> None:
    """Which Paddle says, by its own check."""
    exact, int8 = (StaticRun(Quadratic(batches=3), narrow(dtype)) for dtype in (None, "int8"))
    exact.run(0)
    with pytest.raises((AssertionError, RuntimeError, ValueError), match="y_scale_0"):
        saved_and_loaded(exact, int8, tmp_path)


def test_a_file_of_a_narrow_history_for_an_exact_one(tmp_path: Path) -> None:
    """Paddle loads it, and then no step is taken."""
    int8, exact = (StaticRun(Quadratic(batches=3), narrow(dtype)) for dtype in ("int8", None))
    int8.run(0)
    saved_and_loaded(int8, exact, tmp_path)
    before = [exact.array(name).tobytes() for name in exact.names]
    with pytest.raises(ValueError, match="number of scales y_scale: received 0, expected 1"):
        exact.run(1)
    assert [exact.array(name).tobytes() for name in exact.names] == before


def test_a_file_of_another_narrow_history(tmp_path: Path) -> None:
    """The file's integers and scales belong together: the run goes on with them as if it had been made with them."""
    runs = [StaticRun(Quadratic(batches=3), narrow(dtype)) for dtype in ("int8", "int16")]
    for step in range(4):
        runs[0].run(step)
    saved_and_loaded(*runs, tmp_path)
    for step in range(4, 11):
        assert runs[0].run(step)[0].tobytes() == runs[1].run(step)[0].tobytes()
    for name in runs[0].names:
        assert bits(runs[0].state(name)) == bits(runs[1].state(name))


def cloned(run: StaticRun, folder: Path) -> Callable[[int], Any]:
    program = run.main.clone()
    # In a clone PIR finds what to fetch by its place, not by the variable of the original.
    return lambda step: run.run(step, program=program, fetch_list=[])


def cloned_for_test(run: StaticRun, folder: Path) -> Callable[[int], Any]:
    program = run.main.clone(for_test=True)
    return lambda step: run.run(step, program=program, fetch_list=[])


def feeds(run: StaticRun) -> list:
    block = run.main.global_block()
    if not PIR:
        return [block.var(name) for name in run.feed(0)]
    data = {op.attrs()["name"]: op.result(0) for op in block.ops if op.name() == "pd_op.data"}
    return [data[name] for name in run.feed(0)]


def normalized(run: StaticRun, folder: Path) -> Callable[[int], Any]:
    program = paddle.static.normalize_program(run.main, feeds(run), [run.loss])
    return lambda step: run.run(step, program=program, fetch_list=[] if PIR else [run.loss.name])


def saved_for_inference(run: StaticRun, folder: Path) -> Callable[[int], Any]:
    with paddle.static.scope_guard(run.scope):
        paddle.static.save_inference_model(str(folder / "m"), feeds(run), [run.loss], run.executor, program=run.main)
        program, _, fetched = paddle.static.load_inference_model(str(folder / "m"), run.executor)
    return lambda step: run.run(step, program=program, fetch_list=fetched)


def pruned(run: StaticRun, folder: Path) -> Callable[[int], Any]:
    return lambda step: run.run(step, use_prune=True)


def fetching_nothing(run: StaticRun, folder: Path) -> Callable[[int], Any]:
    return lambda step: run.run(step, fetch_list=[])


#: Whether the parameters move when what was made of the program is run; None: Paddle refuses to make it.
DERIVED = {
    cloned: True,
    cloned_for_test: None if PIR else False,
    normalized: False,
    saved_for_inference: False,
    pruned: True,
    fetching_nothing: True,
}


@pytest.mark.parametrize("derive", DERIVED, ids=lambda derive: derive.__name__)
@pytest.mark.parametrize("optimizer", [ours, sgd])
def test_programs_made_of_the_program(optimizer: Callable, derive: Callable, tmp_path: Path) -> None:
    """They keep the update, or drop it, as they do with Paddle's own optimizers."""
    run = StaticRun(Quadratic(batches=3, shapes=FULL_SHAPES), optimizer)
    if DERIVED[derive] is None:
        with pytest.raises(TypeError):
            derive(run, tmp_path)
        return
    step_once = derive(run, tmp_path)
    for step in range(4):
        before = {name: run.array(name) for name in run.names}
        step_once(step)
        assert {not np.array_equal(before[name], run.array(name)) for name in run.names} == {DERIVED[derive]}
    if optimizer is ours:
        assert {run.state(name)["m"].item() for name in run.names} == {4 if DERIVED[derive] else 0}


@pytest.mark.skipif(not PIR, reason="the older graph format has no operators that take lists apart")
@pytest.mark.parametrize("shapes", [[(3,)], FULL_SHAPES], ids=["one parameter", "several"])
@pytest.mark.parametrize("more", [0, 1, 3])
def test_the_program_holds_nothing_that_takes_the_results_apart(shapes: list, more: int) -> None:
    """Nothing reads it, and the executor would print it at every run; with fewer scales than parameters, too."""
    shapes = [*shapes, *[(64, 65)] * more]
    program = StaticRun(Quadratic(batches=3, shapes=shapes), narrow("int8")).main
    names = [op.name() for op in program.global_block().ops]
    assert names[-1] == "custom_op.asgd_update__"
    assert "builtin.split" not in names


@host_memory
def test_the_history_is_written_in_place() -> None:
    """The memory that holds y before a step holds it after, with the step's gradient in its slot."""
    run = StaticRun(Quadratic(batches=3), ours, "float64")
    run.run(0)
    for name in ("x2", "x2_d_0", "x2_y_0", "x2_m_0") if PIR else ("x1", "x1_d_0", "x1_y_0", "x1_m_0"):
        address, before = run.tensor(name)._ptr(), run.array(name)
        memory = (ctypes.c_char * before.nbytes).from_address(address)
        assert bytes(memory) == before.tobytes()
        for step in range(1, 5):
            run.run(step)
            assert run.tensor(name)._ptr() == address
            assert bytes(memory) == run.array(name).tobytes()
        assert bytes(memory) != before.tobytes()


@host_memory
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((3, 77), "float32"), r"shape of y.*\[3, 77\].*257"),
        (np.zeros((3, 257), "float64"), r"dtype.*float32.*float64"),
    ],
    ids=["shape", "dtype"],
)
def test_damaged_state_is_an_exception_that_says_so(value: np.ndarray, message: str) -> None:
    """Raised inside the executor's own threads, it must reach Python with its words, and leave everything usable."""
    run = StaticRun(Quadratic(batches=3, shapes=FULL_SHAPES), ours)
    run.run(0)
    good = run.array("x1_y_0")
    run.tensor("x1_y_0").set(value, paddle.CPUPlace())
    before = {name: run.array(name).tobytes() for p in run.names for name in (p, f"{p}_d_0", f"{p}_y_0", f"{p}_m_0")}
    with pytest.raises((ValueError, RuntimeError, OSError), match=message):
        run.run(1)
    assert before == {name: run.array(name).tobytes() for name in before}
    run.tensor("x1_y_0").set(good, paddle.CPUPlace())
    run.run(1)
    assert run.state("x1")["m"] == 2
