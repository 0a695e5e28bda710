# SPDX-License-Identifier: Apache-2.0
"""Saving and loading AveragedSGD: an interrupted run goes on bit for bit, and what does not fit is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from averaged_trial import METHOD, averaged_state_of
from problems import Quadratic, bits
from refusing import assert_refused

from paddle_asgd import AveragedSGD

SHAPES = [[3, 2], [257], [3, 2], []]
#: Before the first step, before there is an average, as it begins, and within.
STOPS, END = (0, 2, 4, 5, 7), 14


class Run:
    """A training of four parameters."""

    def __init__(self, dtype: str = "float32", **options: Any) -> None:
        self.problem = Quadratic(batches=3, shapes=SHAPES)
        self.dtype = dtype
        zero = paddle.nn.initializer.Constant(0.0)
        self.params = [paddle.create_parameter(shape, dtype, default_initializer=zero) for shape in SHAPES]
        for param, value in zip(self.params, self.problem.start):
            param.set_value(paddle.to_tensor(value).astype(dtype))
        self.optimizer = AveragedSGD(0.1, parameters=self.params, weight_decay=0.1, **{**METHOD, **options})

    def train(self, steps: Sequence[int], start_at: int | None = None) -> None:
        for step in steps:
            if step == start_at:
                self.optimizer.start_averaging()
            grads = self.problem.gradients(step, [p.astype("float32").numpy() for p in self.params])
            for param, grad in zip(self.params, grads):
                param.grad = paddle.to_tensor(grad).astype(self.dtype)
            self.optimizer.step()

    def content(self) -> list:
        states = [averaged_state_of(self.optimizer, param) for param in self.params]
        masters = self.optimizer.state_dict().get("master_weights", {})
        # In the order of the parameters: names differ.
        return [*(bits(state) for state in states), *(master.numpy().tobytes() for master in masters.values())]

    def take_parameters(self, other: Run) -> None:
        for param, value in zip(self.params, other.params):
            param.set_value(value.clone())


KINDS = {
    "float32": {},
    "float64": {"dtype": "float64"},
    "compatible": {"torch_compatible": True},
    "masters": {"dtype": "bfloat16", "multi_precision": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", STOPS)
def test_resume(kind: str, stop: int, tmp_path: Path) -> None:
    straight = Run(**KINDS[kind])
    straight.train(range(stop))
    paddle.save(straight.optimizer.state_dict(), str(tmp_path / "state.pdopt"))
    with paddle.utils.unique_name.guard():
        resumed = Run(**KINDS[kind])
    resumed.take_parameters(straight)
    resumed.optimizer.set_state_dict(paddle.load(str(tmp_path / "state.pdopt")))
    straight.train(range(stop, END))
    resumed.train(range(stop, END))
    assert resumed.content() == straight.content()


@pytest.mark.parametrize("began", [0, 1, 6])
def test_start_averaging_is_kept(began: int) -> None:
    """Also where the loading optimizer has averages of its own, or had begun otherwise."""
    straight = Run(t0=1e6)
    straight.train(range(7), start_at=began)
    with paddle.utils.unique_name.guard():
        resumed = Run(t0=1e6)
    resumed.train(range(9), start_at=4)
    resumed.take_parameters(straight)
    resumed.optimizer.set_state_dict(straight.optimizer.state_dict())
    straight.train(range(7, END))
    resumed.train(range(7, END))
    assert resumed.content() == straight.content()
    assert resumed.optimizer.has_averages


def test_not_started_is_kept() -> None:
    straight = Run(t0=1e6)
    straight.train(range(3))
    with paddle.utils.unique_name.guard():
        resumed = Run(t0=1e6)
    resumed.train(range(9), start_at=4)
    resumed.take_parameters(straight)
    resumed.optimizer.set_state_dict(straight.optimizer.state_dict())
    resumed.train(range(3, END))
    assert not resumed.optimizer.has_averages
    assert not any("_ax_" in key for key in resumed.optimizer.state_dict())


def resume_and_report(folder: str) -> None:
    """The second half of the test below; runs in another process."""
    run = Run(**KINDS["masters"])
    for param, saved in zip(run.params, paddle.load(f"{folder}/params")):
        param.set_value(saved)
    run.optimizer.set_state_dict(paddle.load(f"{folder}/state.pdopt"))
    run.train(range(7, END))
    Path(folder, "content").write_bytes(pickle.dumps(run.content()))


def test_resume_in_another_process(tmp_path: Path) -> None:
    run = Run(**KINDS["masters"])
    run.train(range(7))
    paddle.save(run.optimizer.state_dict(), str(tmp_path / "state.pdopt"))
    paddle.save(run.params, str(tmp_path / "params"))
    code = f"import test_averaged_checkpoint; test_averaged_checkpoint.resume_and_report({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True)
    run.train(range(7, END))
    assert pickle.loads((tmp_path / "content").read_bytes()) == run.content()


def test_averages_do_not_wait_for_a_second_warm_up() -> None:
    """The count of steps comes from the checkpoint: a young optimizer averages what an old one has averaged."""
    old = Run()
    old.train(range(4))
    with paddle.utils.unique_name.guard():
        young = Run()
    young.optimizer.set_state_dict(old.optimizer.state_dict())
    young.train(range(4, 6))
    assert young.optimizer.has_averages


# ---- Refusals --------------------------------------------------------------------------------------------------------


def without(piece: str) -> Callable[[dict], dict]:
    return lambda state: {key: value for key, value in state.items() if piece not in key}


def changed(name: str, value: Any) -> Callable[[dict], dict]:
    return lambda state: {**state, name: value}


REFUSED = {
    "no average": (without("_ax_"), ["'ax'", "averaging has begun"]),
    "no count": (without("_step_"), ["'step'", "missing"]),
    "another lambd": (changed("lambd", paddle.to_tensor([0.5], "float64")), ["lambd is 0.5", "expected 0.3"]),
    "another alpha": (changed("alpha", 0.75), ["alpha is 0.75", "expected 0.6"]),
    "another t0": (changed("t0", 4.0), ["t0 is 4.0", "expected 3.0"]),
    "torch's": (changed("torch_compatible", paddle.to_tensor([1])), ["torch_compatible is 1", "expected False"]),
    "started": (changed("averaging_started", paddle.to_tensor([0.5])), ["averaging_started", "0.5", "expected 1"]),
}


@pytest.mark.parametrize(("change", "pieces"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_loaded(change: Callable[[dict], dict], pieces: list[str]) -> None:
    with paddle.utils.unique_name.guard():
        source = Run()
        source.train(range(8))
    run, twin = (Run() for _ in range(2))
    for each in (run, twin):
        each.train(range(3))
    state = change(source.optimizer.state_dict())
    with paddle.utils.unique_name.guard():
        run = Run()
    run.train(range(3))
    assert_refused(lambda: run.optimizer.set_state_dict(state), ValueError, [*pieces, "Nothing has been loaded"])
    run.train(range(3, END))
    twin.train(range(3, END))
    assert run.content() == twin.content()


def test_a_refused_load_leaves_averaging_as_it_was() -> None:
    with paddle.utils.unique_name.guard():
        source = Run(t0=1e6)
        source.train(range(8))
    run, twin = (Run(t0=1e6) for _ in range(2))
    for each in (run, twin):
        each.train(range(3), start_at=0)
    state = changed("lambd", 0.5)(source.optimizer.state_dict())
    with pytest.raises(ValueError, match="Nothing has been loaded"):
        run.optimizer.set_state_dict(state)
    for each in (run, twin):
        # One that comes later averages from its beginning.
        each.late = paddle.create_parameter([3], "float32", default_initializer=paddle.nn.initializer.Constant(1.0))
        each.optimizer.add_param_group({"params": [each.late]})
        for _ in range(4):
            each.late.grad = each.late * 0.5
            each.train(range(3, 4))
    assert run.content() == twin.content()
    states = [averaged_state_of(each.optimizer, each.late) for each in (run, twin)]
    assert "ax" in states[0]
    assert bits(states[0]) == bits(states[1])


def test_averages_are_the_optimizers_own() -> None:
    """A checkpoint that was loaded stays as it is."""
    with paddle.utils.unique_name.guard():
        source = Run()
        source.train(range(8))
    state = {key: value.clone() for key, value in source.optimizer.state_dict().items()}
    before = {key: value.numpy().tobytes() for key, value in state.items()}
    with paddle.utils.unique_name.guard():
        run = Run()
    run.optimizer.set_state_dict(state)
    run.train(range(8, END))
    assert {key: value.numpy().tobytes() for key, value in state.items()} == before
    assert np.isfinite(run.params[0].numpy()).all()
