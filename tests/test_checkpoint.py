# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: an interrupted run goes on bit for bit. What does not fit is in test_checkpoint_refusals.py.

Exchange with paddle.optimizer.ASGD is not here, nor are static graphs, whose state Paddle saves."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from refusing import assert_refused
from resuming import BY_ORDER, END, NARROW_SHAPES, SHAPES, STOP, Run, one_warning

from paddle_asgd import ASGD

KINDS = {
    "float32": {},
    "float64": {"dtype": "float64"},
    "scheduled": {"schedule": True},
    "named": {"name": "mine"},
    "float16": {"dtype": "float16"},
    "float16_masters": {"dtype": "float16", "multi_precision": True},
    "bfloat16_masters": {"dtype": "bfloat16", "multi_precision": True, "schedule": True},
    "bfloat16_masters_float32_gradients": {"dtype": "bfloat16", "gradient": "float32", "multi_precision": True},
    "int16_history": {"shapes": NARROW_SHAPES, "history_dtype": "int16", "schedule": True},
    "int8_history_bfloat16_masters": {
        **{"shapes": NARROW_SHAPES, "history_dtype": "int8", "dtype": "bfloat16", "multi_precision": True},
        "gradient": "float32",
    },
}
sixteen_bits = pytest.mark.filterwarnings("ignore:.*is rounded to it after every step")


@sixteen_bits
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("return_numpy", [False, True], ids=["tensors", "arrays"])
@pytest.mark.parametrize("by_order", [False, True], ids=["same_names", "built_again"])
def test_resume(kind: str, return_numpy: bool, by_order: bool, tmp_path: Path) -> None:
    """Interrupted inside a pass, in a process that names its parameters alike, or in the same one, which does not."""
    with paddle.utils.unique_name.guard():
        straight = Run(**KINDS[kind])
        straight.train(range(STOP))
    paddle.save(straight.optimizer.state_dict(), str(tmp_path / "state.pdopt"))
    with paddle.utils.unique_name.guard("again_" if by_order else None):
        resumed = Run(**KINDS[kind])
    resumed.take_parameters(straight)
    with one_warning(BY_ORDER if by_order else None):
        resumed.optimizer.set_state_dict(paddle.load(str(tmp_path / "state.pdopt"), return_numpy=return_numpy))
    assert resumed.history(range(STOP, END)) == straight.history(range(STOP, END))


def resume_and_report(folder: str, kind: str) -> None:
    """The second half of the test below; runs in another process."""
    run = Run(**KINDS[kind])
    for param, saved in zip(run.params, paddle.load(f"{folder}/params")):
        param.set_value(saved)
    run.optimizer.set_state_dict(paddle.load(f"{folder}/state.pdopt"))
    Path(folder, "history").write_bytes(pickle.dumps(run.history(range(STOP, END))))


@pytest.mark.parametrize("kind", ["bfloat16_masters", "int8_history_bfloat16_masters"])
def test_resume_in_another_process(kind: str, tmp_path: Path) -> None:
    run = Run(**KINDS[kind])
    run.train(range(STOP))
    paddle.save(run.optimizer.state_dict(), str(tmp_path / "state.pdopt"))
    paddle.save(run.params, str(tmp_path / "params"))
    code = f"import test_checkpoint; test_checkpoint.resume_and_report({str(tmp_path)!r}, {kind!r})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True)
    assert pickle.loads((tmp_path / "history").read_bytes()) == run.history(range(STOP, END))


def test_names() -> None:
    """Those of paddle.optimizer.ASGD, and the number of batches."""
    run = Run(schedule=True)
    run.train([0])
    names = [f"{p.name}_{s}_0" for p in run.params for s in "dym"]
    assert set(run.optimizer.state_dict()) == {*names, "batch_num", "LR_Scheduler"}
    assert run.optimizer.state_dict()["batch_num"] == 3
    with paddle.utils.unique_name.guard():
        run = Run("float16", multi_precision=True, name="mine")
        run.train([0])
    names = [f"{p.name}_fp32_master_0_mine_{s}_0" for p in run.params for s in "dym"]
    assert set(run.optimizer.state_dict()) == {*names, "batch_num", "master_weights"}
    assert set(run.optimizer.state_dict()["master_weights"]) == {p.name for p in run.params}


def test_names_of_a_narrow_history() -> None:
    """Scales beside the history, of those parameters alone that have one."""
    with paddle.utils.unique_name.guard():
        run = Run("float16", multi_precision=True, name="mine", shapes=NARROW_SHAPES, history_dtype="int8")
        run.train([0])
    entries = {param.name: ["d", "y", "m", *["y_scale"] * (len(param.shape) == 2)] for param in run.params}
    names = [f"{param}_fp32_master_0_mine_{entry}_0" for param, held in entries.items() for entry in held]
    assert set(run.optimizer.state_dict()) == {*names, "batch_num", "master_weights"}


@pytest.mark.parametrize("reverse", [False, True], ids=["from_second", "from_first"])
def test_second_optimizer_on_the_same_parameters(reverse: bool) -> None:
    """Its entries bear other numbers, for Paddle numbers the names."""
    run, other = Run(), Run()
    run.train(range(2))
    second = ASGD(0.1, 3, run.params, weight_decay=0.1)
    first, run.optimizer = run.optimizer, second
    run.train(range(2, 2 + STOP))
    assert not set(first.state_dict()) & set(second.state_dict()) - {"batch_num"}
    source, target = (first, second) if reverse else (second, first)
    run.optimizer = source
    state = run.copied_state()
    other.take_parameters(run)
    other.optimizer, run.optimizer = target, source
    expected = run.history(range(2, 5))
    run.take_parameters(other)
    run.optimizer = target
    target.set_state_dict(state)
    assert run.history(range(2, 5)) == expected


@pytest.mark.parametrize(("saved", "loading"), [("mine", None), ("mine", "other")])
def test_optimizer_of_another_name(saved: str | None, loading: str | None) -> None:
    """No entry has a name that the optimizer knows, so the order decides, as for a model that was built again."""
    with paddle.utils.unique_name.guard():
        straight = Run(name=saved)
        straight.train(range(STOP))
    with paddle.utils.unique_name.guard():
        resumed = Run(name=loading)
    resumed.take_parameters(straight)
    with one_warning(BY_ORDER):
        resumed.optimizer.set_state_dict(straight.optimizer.state_dict())
    assert resumed.history(range(STOP, END)) == straight.history(range(STOP, END))


@pytest.mark.parametrize("by_order", [False, True], ids=["same_names", "built_again"])
@pytest.mark.parametrize("frozen", [False, True], ids=["no_gradient", "frozen"])
@pytest.mark.parametrize("idle", range(len(SHAPES)))
def test_parameter_that_has_taken_no_step(idle: int, frozen: bool, by_order: bool) -> None:
    busy = [i for i in range(len(SHAPES)) if i != idle]
    with paddle.utils.unique_name.guard():
        straight = Run()
    straight.params[idle].stop_gradient = frozen
    straight.train(range(STOP), among=busy)
    with paddle.utils.unique_name.guard("again_" if by_order else None):
        resumed = Run()
    resumed.params[idle].stop_gradient = frozen
    resumed.take_parameters(straight)
    with one_warning(BY_ORDER if by_order else None):
        resumed.optimizer.set_state_dict(straight.copied_state())
    everything = range(len(SHAPES))
    assert resumed.history(range(STOP, END), everything) == straight.history(range(STOP, END), everything)


def test_before_the_first_step() -> None:
    """A checkpoint without steps says so, and takes back those of the optimizer that loads it."""
    run, fresh = Run(schedule=True), Run(schedule=True)
    state = run.copied_state()
    assert set(state) == {"batch_num", "LR_Scheduler"}
    run.train(range(STOP))
    run.optimizer.set_state_dict(state)
    run.take_parameters(fresh)
    assert run.history(range(END))[1:] == fresh.history(range(END))[1:]


@sixteen_bits
@pytest.mark.parametrize("kind", KINDS)
def test_into_an_optimizer_that_has_state(kind: str) -> None:
    run = Run(**KINDS[kind])
    run.train(range(STOP))
    state, params = run.copied_state(), [p.clone() for p in run.params]
    expected = run.history(range(STOP, END))
    run.optimizer.set_state_dict(state)
    for param, saved in zip(run.params, params):
        param.set_value(saved)
    assert run.history(range(STOP, END)) == expected


@pytest.mark.parametrize(("saved", "replaced"), [("float16", "float32"), ("float32", "float16")])
def test_history_of_another_dtype(saved: str, replaced: str) -> None:
    """Gradients of a 16-bit parameter come in 16 or, as main_grad, in 32 bits; the loaded history decides."""
    with paddle.utils.unique_name.guard():
        straight = Run("float16", gradient=saved, multi_precision=True)
        straight.train(range(STOP))
    with paddle.utils.unique_name.guard():
        resumed = Run("float16", gradient=replaced, multi_precision=True)
        resumed.train(range(2))
        resumed.optimizer.set_state_dict(straight.copied_state())
        resumed.take_parameters(straight)
        resumed.gradient = saved
        assert resumed.history(range(STOP, END)) == straight.history(range(STOP, END))


@sixteen_bits
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_state_is_a_copy(kind: str) -> None:
    """From one optimizer's live state to another: each goes on alone, and the dict stays as it was."""
    with paddle.utils.unique_name.guard():
        source = Run(**KINDS[kind])
        source.train(range(STOP))
    with paddle.utils.unique_name.guard():
        target = Run(**KINDS[kind])
    target.take_parameters(source)
    state = source.optimizer.state_dict()
    keys = {key: list(value) if isinstance(value, dict) else id(value) for key, value in state.items()}
    target.optimizer.set_state_dict(state)
    assert {key: list(value) if isinstance(value, dict) else id(value) for key, value in state.items()} == keys
    before = target.content()
    source.train(range(STOP, STOP + 3))
    assert target.content()[0] == before[0]
    assert target.content()[1] == before[1]
    after = source.content()
    target.train(range(STOP, STOP + 2))
    assert source.content() == after
    target.train([STOP + 2])
    assert target.content() == after


def test_paddles_hapi_model_resumes(tmp_path: Path) -> None:
    """paddle.Model adds entries of its own making to what it read."""

    def model() -> tuple:
        with paddle.utils.unique_name.guard():
            network = paddle.nn.Linear(3, 2)
            made = paddle.Model(network)
            made.prepare(ASGD(0.1, 3, network.parameters(), weight_decay=0.1), paddle.nn.MSELoss())
        return made, network

    draw = np.random.default_rng(5)
    batches = [[[draw.normal(size=[4, k]).astype("float32")] for k in (3, 2)] for _ in range(3)]
    (straight, first), (resumed, second) = model(), model()
    for step in range(STOP):
        straight.train_batch(*batches[step % 3])
    straight.save(str(tmp_path / "model"))
    resumed.load(str(tmp_path / "model"))
    for step in range(STOP, END):
        straight.train_batch(*batches[step % 3])
        resumed.train_batch(*batches[step % 3])
    for p, q in zip(first.parameters(), second.parameters()):
        assert p.numpy().tobytes() == q.numpy().tobytes()


@pytest.mark.usefixtures("static_mode")
@pytest.mark.parametrize("call", ["state_dict", "set_state_dict"])
def test_static_graphs_are_sent_to_paddles_functions(call: str) -> None:
    optimizer = ASGD(0.1, 3)
    arguments = [{}] if call == "set_state_dict" else []
    assert_refused(lambda: getattr(optimizer, call)(*arguments), RuntimeError, [call, "paddle.static.save"])
