# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files between dygraph, static graphs, paddle.Model and paddle.distributed, with ours and with Paddle's own
optimizers, which show what Paddle itself can do. What is in a state_dict is test_checkpoint.py's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import PIR, Quadratic, StaticRun
from trial import Trial

from paddle_asgd import ASGD
from paddle_asgd.sag import history

BuiltIn = getattr(paddle.optimizer, "ASGD", None)
Momentum = paddle.optimizer.Momentum
LR = paddle.optimizer.lr
STOP, END = 4, 11
SHAPES = ([], [2, 3])


def in_older_format() -> Any:
    """Static graphs of the format before PIR."""
    if not PIR:
        return nullcontext()
    from paddle.pir_utils import OldIrGuard

    return OldIrGuard()


@pytest.fixture(params=["default", "older"])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    paddle.enable_static()
    if request.param == "older":
        # Paddle 3.3 has a sum of this format no more.
        terms = lambda a, c, x: paddle.mean(0.5 * a * x * x - c * x) * float(np.prod(x.shape))  # noqa: E731
        monkeypatch.setattr("problems.term", terms)
    with in_older_format() if request.param == "older" else nullcontext():
        yield
    paddle.disable_static()


@pytest.fixture(autouse=True)
def _small_tensors_are_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a history_dtype, where else they would be exact."""
    monkeypatch.setattr(history, "SMALLEST", 1)


# ---- Static files ---------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[], Any]] = {
    "fixed": lambda: 0.1,
    "exponential": lambda: LR.ExponentialDecay(0.1, gamma=0.75),
    "step": lambda: LR.StepDecay(0.1, step_size=2, gamma=0.5),
    "cosine": lambda: LR.CosineAnnealingDecay(0.1, T_max=9),
    "warmup": lambda: LR.LinearWarmup(LR.PolynomialDecay(0.1, 20), 3, 0.01, 0.1),
    "piecewise": lambda: LR.PiecewiseDecay([3, 6], [0.1, 0.05, 0.02]),
}


class Scheduled(StaticRun):
    """A program with an optimizer of one kind, whose scheduler takes a step after every run."""

    def __init__(self, kind: Callable, schedule: str = "fixed", dtype: str = "float32", **options: Any) -> None:
        def build(loss: Any, params: list) -> Any:
            rate = SCHEDULES[schedule]()
            listed = {"parameters": params} if options.pop("listed", False) else {}
            kind(rate, **listed, **options).minimize(loss)
            return rate

        super().__init__(Quadratic(3, SHAPES), build, dtype)

    def losses(self, steps: range) -> list[float]:
        found = []
        for step in steps:
            found.append(float(self.run(step)[0]))
            if not isinstance(self.built, float):
                self.built.step()
        return found

    def go_on_from(self, other: Scheduled, folder: Path) -> None:
        with paddle.static.scope_guard(other.scope):
            paddle.static.save(other.main, str(folder / "half"))
        with paddle.static.scope_guard(self.scope):
            paddle.static.load(self.main, str(folder / "half"), self.executor)
        if not isinstance(self.built, float):
            # As users do: the file holds the learning rate, but nothing of the schedule.
            self.built.last_epoch, self.built.last_lr = other.built.last_epoch, other.built.last_lr


@pytest.mark.skipif(BuiltIn is None, reason="this Paddle has no paddle.optimizer.ASGD")
@pytest.mark.usefixtures("static_mode")
@pytest.mark.parametrize(
    ("schedule", "dtype"), [*((name, "float32") for name in SCHEDULES), ("fixed", "float64"), ("warmup", "float64")]
)
def test_static_files_of_the_built_in(schedule: str, dtype: str, tmp_path: Path) -> None:
    """Theirs into ours, and later ours into theirs.

    There is one batch, because with several the built-in's step counter never advances (test_builtin.py).
    """
    theirs, ours = runs = [Scheduled(kind, schedule, dtype) for kind in (BuiltIn, ASGD)]
    for source, target, begin in ((theirs, ours, 0), (ours, theirs, END)):
        source.losses(range(begin, begin + STOP))
        target.go_on_from(source, tmp_path)
        straight, resumed = (run.losses(range(begin + STOP, begin + END)) for run in (source, target))
        assert resumed == pytest.approx(straight, rel=1e-6 if dtype == "float32" else 1e-12)
    assert [run.array("learning_rate_0").dtype for run in runs] == [dtype, dtype]


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("schedule", ["fixed", "warmup"])
@pytest.mark.parametrize("history_dtype", [None, "int8"])
def test_static_files_of_ours(history_dtype: str | None, schedule: str, tmp_path: Path) -> None:
    runs = [Scheduled(ASGD, schedule, batch_num=3, history_dtype=history_dtype) for _ in range(2)]
    runs[0].losses(range(STOP))
    runs[1].go_on_from(runs[0], tmp_path)
    assert runs[1].losses(range(STOP, END)) == runs[0].losses(range(STOP, END))
    if history_dtype is not None:
        assert [runs[1].array(f"{name}_y_0").dtype for name in runs[1].names] == ["int8"] * len(SHAPES)
        scales = [[run.array(f"{name}_y_scale_0").tobytes() for name in run.names] for run in runs]
        assert scales[0] == scales[1]


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("schedule", ["fixed", "exponential"])
@pytest.mark.parametrize("listed", [False, True], ids=["all parameters", "listed"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_learning_rate_has_the_dtype_that_paddle_gives_it(dtype: str, listed: bool, schedule: str) -> None:
    theirs, ours = (Scheduled(kind, schedule, dtype, listed=listed) for kind in (Momentum, ASGD))
    for run in (theirs, ours):
        run.losses(range(1))
    assert ours.array("learning_rate_0").dtype == theirs.array("learning_rate_0").dtype == dtype


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("default", ["float32", "float64", "float16"])
def test_learning_rate_without_a_list_or_a_loss(default: str) -> None:
    """The default dtype then decides, but 16 bits would round the rate."""

    def build(loss: Any, params: list) -> None:
        ASGD(0.1).apply_gradients([(param, paddle.ones(param.shape, "float32")) for param in params])

    before = paddle.get_default_dtype()
    paddle.set_default_dtype(default)
    try:
        run = StaticRun(Quadratic(3, SHAPES), build)
    finally:
        paddle.set_default_dtype(before)
    assert run.array("learning_rate_0").dtype == ("float64" if default == "float64" else "float32")


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("runs_before", [0, 2])
@pytest.mark.parametrize(("dtype", "loaded"), [("float32", "float64"), ("float64", "float32")])
@pytest.mark.parametrize("kind", [Momentum, ASGD])
def test_a_scheduled_rate_of_another_dtype_is_refused(kind: Any, dtype: str, loaded: str, runs_before: int) -> None:
    """The executor would write the bytes of the one where the other is read: 0.1 becomes 1e-23."""
    run = Scheduled(kind, "exponential", dtype)
    run.losses(range(runs_before))
    run.tensor("learning_rate_0").set(np.array(0.1, loaded), paddle.CPUPlace())
    before = {name: run.array(name).tobytes() for name in run.names}
    with pytest.raises((ValueError, RuntimeError, OSError), match="dtype"):
        run.losses(range(1))
    assert before == {name: run.array(name).tobytes() for name in run.names}


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("schedule", ["fixed", "exponential"])
def test_multipliers_of_the_learning_rate(schedule: str, dtype: str) -> None:
    """As attributes of parameters and of groups, in both graph formats."""

    def optimizer(rate: Any, parameters: list) -> Any:
        parameters[0].optimize_attr["learning_rate"] = 0.3
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "learning_rate": 0.7}]
        return ASGD(rate, 1, groups)

    run = Scheduled(optimizer, schedule, dtype, listed=True)
    x = [value.copy() for value in run.problem.start]
    for step in range(5):
        rate = 0.1 * (0.75**step if schedule == "exponential" else 1)
        multipliers = [0.3, 1.0] + [0.7] * (len(x) - 2)
        x = [v - rate * by * g for v, by, g in zip(x, multipliers, run.problem.gradients(step, x))]
        run.losses(range(step, step + 1))
    tolerance = 1e-6 if dtype == "float32" else 1e-13
    for name, value in zip(run.names, x):
        np.testing.assert_allclose(run.array(name), value, rtol=tolerance, atol=tolerance)


# ---- Between dygraph and static graphs ------------------------------------------------------------------------------


def momentum(parameters: list, **options: Any) -> Any:
    return Momentum(0.1, 0.9, parameters, **options)


def ours(parameters: list, **options: Any) -> Any:
    return ASGD(0.1, 3, parameters, weight_decay=0.1, **options)


def ours_narrow(parameters: list, **options: Any) -> Any:
    return ours(parameters, history_dtype="int16", **options)


@contextmanager
def mode(static: bool) -> Iterator[None]:
    """Either mode, with names that begin anew, and programs and variables of its own."""
    with ExitStack() as stack:
        if static:
            paddle.enable_static()
            stack.callback(paddle.disable_static)
            stack.enter_context(paddle.static.scope_guard(paddle.static.Scope()))
            stack.enter_context(paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()))
        # Only now: each mode has its own numbering, and enable_static() switches to the other.
        stack.enter_context(paddle.utils.unique_name.guard())
        yield


def batches() -> list:
    draw = np.random.default_rng(5)
    return [[[draw.normal(size=[4, k]).astype("float32")] for k in (3, 2)] for _ in range(3)]


def model(optimizer: Callable, **options: Any) -> paddle.Model:
    """paddle.Model in the present mode."""
    network = paddle.nn.Linear(3, 2)
    inputs, labels = ([paddle.static.InputSpec([None, k], "float32", name)] for k, name in ((3, "x"), (2, "y")))
    made = paddle.Model(network, inputs, labels)
    made.prepare(optimizer(network.parameters(), **options), paddle.nn.MSELoss())
    return made


def trained(made: paddle.Model, steps: range) -> list[float]:
    return [float(np.squeeze(made.train_batch(*batches()[step % 3])[0])) for step in steps]


@pytest.mark.parametrize("name", [None, "mine"])
@pytest.mark.parametrize("loads", [False, True], ids=["to_dygraph", "to_static"])
@pytest.mark.parametrize("saves", [False, True], ids=["from_dygraph", "from_static"])
@pytest.mark.parametrize("optimizer", [momentum, ours, ours_narrow])
def test_paddles_model(optimizer: Callable, saves: bool, loads: bool, name: str | None, tmp_path: Path) -> None:
    with mode(static=saves):
        source = model(optimizer, name=name)
        trained(source, range(STOP))
        source.save(str(tmp_path / "model"))
        straight = trained(source, range(STOP, END))
    with mode(static=loads):
        target = model(optimizer, name=name)
        target.load(str(tmp_path / "model"))
        assert trained(target, range(STOP, END)) == pytest.approx(straight, rel=1e-6)


def scheduled_momentum(parameters: list) -> Any:
    return Momentum(LR.ExponentialDecay(0.1, 0.9), 0.9, parameters)


def ours_scheduled(parameters: list) -> Any:
    return ASGD(LR.ExponentialDecay(0.1, 0.9), 3, parameters)


@pytest.mark.parametrize("optimizer", [scheduled_momentum, ours_scheduled])
def test_static_files_hold_no_schedule(optimizer: Callable, tmp_path: Path) -> None:
    """Which dygraph asks for; ours says how to give it."""
    with mode(static=True):
        source = model(optimizer)
        trained(source, range(STOP))
        source.save(str(tmp_path / "model"))
    with mode(static=False):
        target = model(optimizer)
        error, text = (
            (ValueError, "add scheduler.state_dict")
            if optimizer is ours_scheduled
            else (AssertionError if PIR else KeyError, "LR_Scheduler")
        )
        with pytest.raises(error, match=text):
            target.load(str(tmp_path / "model"))


def test_a_static_file_with_master_weights_and_a_watch() -> None:
    """They lie beside the state there, as variables among others."""
    with paddle.utils.unique_name.guard():
        params = [paddle.create_parameter([3], "float16") for _ in range(2)]
        first = ASGD(0.1, 3, params, multi_precision=True)
        for param in params:
            param.grad = paddle.full([3], 0.25, "float16")
        first.step()
    state = first.state_dict()
    state.update({master.name: master for master in state.pop("master_weights").values()})
    state.update({"again_learning_rate_0": np.array([0.5]), f"{params[0].name}_watch_0": np.zeros([6])})
    second = ASGD(0.1, 3, params, multi_precision=True)
    second.set_state_dict(state)
    for param in params:
        left, right = (optimizer._master_weights[param.name] for optimizer in (first, second))
        assert left is not right
        assert left.numpy().tobytes() == right.numpy().tobytes()


# ---- What a state_dict is -------------------------------------------------------------------------------------------

TRIALS: dict[str, dict[str, Any]] = {
    "plain": {},
    "indexed": {"index": 1},
    "weights": {"batch_weights": [1.0, 2.0, 3.0]},
    "theta": {"theta": lambda step: 1.0},
}


def trial_of(kind: str, steps: int) -> Trial:
    options = {key: value for key, value in TRIALS[kind].items() if key != "index"}
    trial = Trial(n=3, dtype="float32", shapes=[[3], [2, 2]], **options)
    if kind == "theta":
        trial.sag.theta = 1.0
    for step in range(steps):
        trial.step(**({"index": step % 3} if kind == "indexed" else {}))
    return trial


@pytest.mark.parametrize("kind", TRIALS)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_all_entries_are_tensors(kind: str, steps: int) -> None:
    state = trial_of(kind, steps).optimizer.state_dict()
    assert paddle.framework.io._is_state_dict(state)
    assert all(isinstance(entry.numpy(), np.ndarray) for entry in state.values())


@pytest.mark.parametrize("kind", TRIALS)
def test_checkpoints_with_plain_numbers(kind: str) -> None:
    """An int and a list: what state_dict() returned before its numbers were tensors."""
    trial = trial_of(kind, 4)
    state = trial.optimizer.state_dict()
    plain = {"batch_num": 3, "batch_weights": [1.0, 2.0, 3.0], "theta_step": 4}
    old = {key: plain.get(key, entry) for key, entry in state.items()}
    paired = {key: (entry.name, entry.numpy()) for key, entry in state.items()}
    for checkpoint in (old, paired):
        again = ASGD(0.1, 3, trial.params, **{k: v for k, v in TRIALS[kind].items() if k != "index"})
        again.set_state_dict(checkpoint)
        loaded = again.state_dict()
        for (key, entry), other in zip(sorted(state.items()), (loaded[key] for key in sorted(loaded))):
            assert entry.numpy().tobytes() == other.numpy().tobytes(), key


# With Paddle's own Momentum and without this package's code, too: 2.6.2 and 3.0.0 end the process, 3.1.1 raises.
@pytest.mark.skipif(
    tuple(map(int, paddle.__version__.split(".")[:2])) < (3, 2),
    reason="this Paddle cannot load its own distributed checkpoints on the CPU",
)
@pytest.mark.parametrize("optimizer", [momentum, ours, ours_narrow])
def test_paddles_distributed_checkpoints(optimizer: Callable, tmp_path: Path) -> None:
    """Loading fills the tensors of a state_dict, which is then given to the optimizer."""
    problem = Quadratic(3, SHAPES)

    def train(params: list, made: Any, steps: range) -> list:
        for step in steps:
            problem.backward(step, params)
            made.step()
            made.clear_grad()
        return [param.numpy().tobytes() for param in params]

    def run(steps: int) -> tuple:
        # The first step gives the state its names, by which the file is read.
        with paddle.utils.unique_name.guard():
            params = problem.parameters()
            made = optimizer(params)
            train(params, made, range(steps))
        return params, made

    straight, made = run(STOP)
    paddle.distributed.save_state_dict(made.state_dict(), str(tmp_path))
    resumed, other = run(1)
    for param, value in zip(resumed, straight):
        param.set_value(value)
    template = other.state_dict()
    paddle.distributed.load_state_dict(template, str(tmp_path))
    other.set_state_dict(template)
    assert train(resumed, other, range(STOP, END)) == train(straight, made, range(STOP, END))
