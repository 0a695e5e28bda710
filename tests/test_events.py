# SPDX-License-Identifier: Apache-2.0
"""Random events between steps: the shortcut has the same bits, or the same refusal, as the full way to a step.

``--sequences=N`` sets how many sequences are drawn. What is right is judged elsewhere (test_asgd.py, test_groups.py).
"""

from __future__ import annotations

import re
import warnings
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import Quadratic

from paddle_asgd import ASGD
from paddle_asgd.fused import FusedOptimizer
from paddle_asgd.sag import history
from paddle_asgd.shortcut import Shortcut

pytestmark = pytest.mark.shortcut

SHAPES = [[4], [], [2, 3]]
ROUNDS = 6
Event = Callable[["Run", np.random.Generator], None]


@pytest.fixture(autouse=True)
def _two_can_be_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SMALLEST", 2)


class Run:
    """One optimizer, with what the events leave for the next step."""

    def __init__(self, seed: int, shortcut: bool) -> None:
        draw = np.random.default_rng(seed)
        self.shortcut, self.n, self.steps = shortcut, int(draw.integers(1, 5)), 0
        self.problem = Quadratic(self.n, SHAPES, seed=seed)
        self.dtype = draw.choice(["float32", "float64", "float16"], p=[0.6, 0.2, 0.2])
        self.indexed = self.held_sparse = False
        with paddle.utils.unique_name.guard():
            self.params = self.problem.parameters(self.dtype)
            self.rate: Any = 0.1
            kind = draw.integers(3)
            if kind == 1:
                self.rate = paddle.optimizer.lr.StepDecay(0.1, step_size=2)
            elif kind == 2:
                self.rate = paddle.to_tensor([0.1])
            self.optimizer = ASGD(
                self.rate,
                self.n,
                self.params,
                weight_decay=[None, 0.1, paddle.to_tensor([0.2])][draw.integers(3)],
                multi_precision=bool(draw.integers(2)),
                batch_weights=[None, draw.uniform(0.5, 2.0, self.n)][draw.integers(2)],
                theta=[None, 0.5, lambda step: 1 / (1 + step)][draw.integers(3)],
                watch=[None, False][draw.integers(2)],
                history_dtype=[None, "int16", "int8"][draw.integers(3)] if self.n > 1 else None,
            )
        self.next_step()

    def next_step(self) -> None:
        """Forget what events had laid ready for one step only."""
        self.absent: set[int] = set()
        self.forms: dict[int, Callable[[Any], Any]] = {}
        self.sparse = False
        self.index: int | None = None
        self.take: Callable[[], Any] = self.optimizer.step

    def gradients(self) -> None:
        self.optimizer.clear_grad(set_to_zero=False)
        # Not where x stands, which some events change to another shape.
        grads = self.problem.gradients(self.steps, [value / (1 + self.steps) for value in self.problem.start])
        for i, (param, grad) in enumerate(zip(self.params, grads)):
            if param.stop_gradient or i in self.absent:
                continue
            value = paddle.to_tensor(grad.reshape(param.shape).astype("float32")).astype(param.dtype)
            if self.held_sparse and i == 2:
                (param * 1.0).sum().backward()  # Paddle refuses to put a dense gradient in a sparse one's place
                param.clear_gradient(set_to_zero=False)
                self.held_sparse = False
            form = self.forms.get(i, lambda value: value)
            param.grad = form(value)
        if self.sparse and not self.params[2].stop_gradient and list(self.params[2].shape) == [2, 3]:
            self.params[2].clear_gradient(set_to_zero=False)
            rows = paddle.nn.functional.embedding(paddle.to_tensor([1, 1]), self.params[2], sparse=True)
            (rows * 1.5).sum().backward()
            self.held_sparse = True

    def step(self) -> str:
        """Take it; returns what came of it."""
        outcome = outcome_of(self._step)
        self.steps += 1
        self.next_step()
        return outcome

    def _step(self) -> None:
        if not self.shortcut:
            self.optimizer._shortcut = None
        if self.indexed or self.index is not None:
            self.optimizer.batch_index = self.steps % self.n if self.index is None else self.index
        self.gradients()
        self.take()

    def content(self) -> list[Any]:
        state = [self.optimizer._state.of(param) for param in self.params]
        tensors = [*self.params, *(t for tensors in state for t in tensors or () if t is not None)]
        tensors += list(self.optimizer._master_weights.values())
        found: list[Any] = [(tensor.shape, tensor.numpy().tobytes()) for tensor in tensors]
        inputs = self.optimizer._inputs
        if inputs.watch is not None and inputs.watch.tensor is not None:
            found.append(inputs.watch.tensor.numpy().tobytes())
        return [*found, inputs.steps, self.optimizer.batch_index]


def outcome_of(call: Callable[..., None], *arguments: Any) -> str:
    """ "done", or how it was refused, less the number that Paddle gives to a tensor without a name."""
    try:
        call(*arguments)
    except (ValueError, TypeError) as error:
        return re.sub(r"tmp_\d+", "tmp", f"{type(error).__name__}: {error}")
    return "done"


EVENTS: list[Event] = []


def event(function: Event) -> Event:
    EVENTS.append(function)
    return function


def any_of(run: Run, draw: np.random.Generator) -> Any:
    return run.params[draw.integers(len(run.params))]


# ---- The learning rate and what lies on parameters -------------------------------------------------------------------


@event
def set_lr(run: Run, draw: np.random.Generator) -> None:
    if isinstance(run.rate, float):
        run.optimizer.set_lr(draw.uniform(0.01, 0.2))


@event
def move_lr(run: Run, draw: np.random.Generator) -> None:
    if isinstance(run.rate, paddle.Tensor):
        run.rate.set_value(paddle.to_tensor([draw.uniform(0.01, 0.2)], dtype="float32"))
    elif not isinstance(run.rate, float):
        run.rate.step()


@event
def freeze(run: Run, draw: np.random.Generator) -> None:
    any_of(run, draw).stop_gradient = True


@event
def thaw(run: Run, draw: np.random.Generator) -> None:
    any_of(run, draw).stop_gradient = False


@event
def thaw_all(run: Run, draw: np.random.Generator) -> None:
    for param in run.params:
        param.stop_gradient = False


@event
def regularizer(run: Run, draw: np.random.Generator) -> None:
    if run.dtype != "float16":
        any_of(run, draw).regularizer = paddle.regularizer.L2Decay(draw.uniform(0.1, 0.5))


@event
def no_regularizer(run: Run, draw: np.random.Generator) -> None:
    for param in run.params:
        param.regularizer = None


@event
def multiplier(run: Run, draw: np.random.Generator) -> None:
    any_of(run, draw).optimize_attr = {"learning_rate": draw.choice([0.5, 1.0, 2.0])}


@event
def same_multiplier(run: Run, draw: np.random.Generator) -> None:
    for param in run.params:
        param.optimize_attr = {"learning_rate": 1.0}


@event
def bad_multiplier(run: Run, draw: np.random.Generator) -> None:
    any_of(run, draw).optimize_attr = {"learning_rate": -1.0}


@event
def main_grad(run: Run, draw: np.random.Generator) -> None:
    param = any_of(run, draw)
    param.main_grad = paddle.full(param.shape, 0.25, "float32" if run.dtype == "float16" else run.dtype)


@event
def wrong_main_grad(run: Run, draw: np.random.Generator) -> None:
    param = any_of(run, draw)
    param.main_grad = paddle.full(param.shape, 0.25, "float32" if run.dtype == "float64" else "float64")


@event
def no_main_grad(run: Run, draw: np.random.Generator) -> None:
    for param in run.params:
        param.main_grad = None


# ---- Parameters themselves -------------------------------------------------------------------------------------------


@event
def set_value(run: Run, draw: np.random.Generator) -> None:
    param = any_of(run, draw)
    param.set_value(paddle.full(param.shape, 0.5, param.dtype))


@event
def data(run: Run, draw: np.random.Generator) -> None:
    param = any_of(run, draw)
    param.data = paddle.full(param.shape, -0.5, param.dtype)


@event
def reshape(run: Run, draw: np.random.Generator) -> None:
    with paddle.no_grad():
        run.params[2].reshape_([3, 2])


@event
def reshape_back(run: Run, draw: np.random.Generator) -> None:
    with paddle.no_grad():
        run.params[2].reshape_([2, 3])


@event
def fewer_parameters(run: Run, draw: np.random.Generator) -> None:
    run.optimizer._parameter_list = run.params[: draw.integers(1, 4)]


@event
def other_order(run: Run, draw: np.random.Generator) -> None:
    run.optimizer._parameter_list = run.params[::-1]


@event
def all_parameters(run: Run, draw: np.random.Generator) -> None:
    run.optimizer._parameter_list = run.params


# ---- Gradients -------------------------------------------------------------------------------------------------------


@event
def absent(run: Run, draw: np.random.Generator) -> None:
    run.absent.add(int(draw.integers(3)))


@event
def all_absent(run: Run, draw: np.random.Generator) -> None:
    run.absent.update(range(3))


@event
def zeros(run: Run, draw: np.random.Generator) -> None:
    run.forms[int(draw.integers(3))] = paddle.zeros_like


@event
def not_finite(run: Run, draw: np.random.Generator) -> None:
    run.forms[int(draw.integers(3))] = lambda value: value * float("nan")


@event
def strided(run: Run, draw: np.random.Generator) -> None:
    run.forms[2] = lambda value: value.t().contiguous().t()


@event
def sparse(run: Run, draw: np.random.Generator) -> None:
    run.sparse = run.dtype != "float16"


# ---- The optimizer ---------------------------------------------------------------------------------------------------


@event
def clip(run: Run, draw: np.random.Generator) -> None:
    if run.dtype != "float16":  # for which Paddle has no clip on the CPU
        run.optimizer._grad_clip = paddle.nn.ClipGradByValue(draw.uniform(0.1, 1.0))


@event
def no_clip(run: Run, draw: np.random.Generator) -> None:
    run.optimizer._grad_clip = None


@event
def inf_found(run: Run, draw: np.random.Generator) -> None:
    run.optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([True]))


@event
def no_inf_found(run: Run, draw: np.random.Generator) -> None:
    run.optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([False]))


@event
def one_index(run: Run, draw: np.random.Generator) -> None:
    run.index = int(draw.integers(run.n))


@event
def index_from_now_on(run: Run, draw: np.random.Generator) -> None:
    run.indexed = True


@event
def no_index(run: Run, draw: np.random.Generator) -> None:
    run.indexed = False


@event
def index_out_of_range(run: Run, draw: np.random.Generator) -> None:
    run.index = run.n


@event
def round_trip(run: Run, draw: np.random.Generator) -> None:
    state = run.optimizer.state_dict()
    copied = {key: value.clone() if isinstance(value, paddle.Tensor) else value for key, value in state.items()}
    run.optimizer.set_state_dict(copied)


@event
def drop(run: Run, draw: np.random.Generator) -> None:
    run.optimizer._state.drop(any_of(run, draw))


@event
def other_precision(run: Run, draw: np.random.Generator) -> None:
    run.optimizer._multi_precision = not run.optimizer._multi_precision


@event
def by_closure(run: Run, draw: np.random.Generator) -> None:
    run.take = lambda: run.optimizer.step(lambda: paddle.to_tensor(1.0))


@event
def by_wrapper(run: Run, draw: np.random.Generator) -> None:
    @paddle.no_grad()
    def take() -> None:
        pairs = [(p, p.grad) for p in run.params if not p.stop_gradient and p.grad is not None]
        run.optimizer._apply_optimize(None, None, pairs)

    run.take = take


@event
def twice(run: Run, draw: np.random.Generator) -> None:
    def take() -> None:
        run.optimizer.step()
        if not run.shortcut:
            run.optimizer._shortcut = None
        run.optimizer.step()

    run.take = take


@event
def look(run: Run, draw: np.random.Generator) -> None:
    run.optimizer.gradient_norm()
    run.optimizer.state_dict()


# ---- State itself ----------------------------------------------------------------------------------------------------


def state_of(run: Run, draw: np.random.Generator) -> tuple[dict[str, Any], str] | None:
    """One of Paddle's dictionaries of state and a key in it; None before the first step."""
    held = [h for name, h in run.optimizer._accumulators.items() if h and not name.endswith("watch")]
    held += [run.optimizer._master_weights] if run.optimizer._master_weights else []
    if not held:
        return None
    chosen = held[draw.integers(len(held))]
    return chosen, list(chosen)[draw.integers(len(chosen))]


@event
def replaced_state(run: Run, draw: np.random.Generator) -> None:
    """A tensor of the same values, where it was: only the dictionary tells."""
    found = state_of(run, draw)
    if found is not None:
        held, key = found
        held[key] = held[key].clone()


@event
def lost_state(run: Run, draw: np.random.Generator) -> None:
    found = state_of(run, draw)
    if found is not None:
        found[0].pop(found[1])


@event
def other_dictionary(run: Run, draw: np.random.Generator) -> None:
    for name, held in list(run.optimizer._accumulators.items()):
        run.optimizer._accumulators[name] = {key: tensor.clone() for key, tensor in held.items()}


@event
def other_masters(run: Run, draw: np.random.Generator) -> None:
    run.optimizer._master_weights = {key: t.clone() for key, t in run.optimizer._master_weights.items()}


@event
def state_data(run: Run, draw: np.random.Generator) -> None:
    found = state_of(run, draw)
    if found is not None:
        tensor = found[0][found[1]]
        tensor.data = tensor.clone()


@event
def reshaped_state(run: Run, draw: np.random.Generator) -> None:
    """As many elements in another shape, which both ways refuse until it is as it was."""
    found = state_of(run, draw)
    if found is not None:
        tensor = found[0][found[1]]
        with paddle.no_grad():
            tensor.reshape_(
                [1, *tensor.shape] if tensor.shape[:1] != [1] or len(tensor.shape) < 2 else tensor.shape[1:]
            )


@event
def shared_memory(run: Run, draw: np.random.Generator) -> None:
    """The same tensor with the memory of another one."""
    param = any_of(run, draw)
    paddle.full(param.shape, 0.25, param.dtype)._share_buffer_to(param)


@event
def strided_parameter(run: Run, draw: np.random.Generator) -> None:
    with paddle.no_grad():
        run.params[2].t_()


# ---- The test --------------------------------------------------------------------------------------------------------


def test_shortcut_and_full_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("ignore")  # of 16 bits, of wrong slots, of what a checkpoint lacks
    shortcuts, outcomes, happened = [], [], set()
    step_by_shortcut = FusedOptimizer._step_by_shortcut

    def counted(optimizer: ASGD, shortcut: Shortcut) -> bool:
        shortcuts.append(step_by_shortcut(optimizer, shortcut))
        return shortcuts[-1]

    monkeypatch.setattr(FusedOptimizer, "_step_by_shortcut", counted)
    for seed in range(request.config.getoption("--sequences")):
        runs = [Run(seed, shortcut) for shortcut in (True, False)]
        said: list[str] = []
        draw = np.random.default_rng([seed, 1])
        often = draw.uniform(0.1, 0.9)
        for _ in range(ROUNDS):
            while draw.random() < often:
                number, own = int(draw.integers(len(EVENTS))), int(draw.integers(2**31))
                said.append(EVENTS[number].__name__)
                results = [outcome_of(EVENTS[number], run, np.random.default_rng(own)) for run in runs]
                assert results[0] == results[1], f"sequence {seed}: {said}"
            said.append("step")
            results = [run.step() for run in runs]
            assert results[0] == results[1], f"sequence {seed}: {said}"
            assert runs[0].content() == runs[1].content(), f"sequence {seed}: {said}"
            outcomes.append(results[0] == "done")
        happened.update(said)
    assert len(EVENTS) >= 43
    assert happened >= {function.__name__ for function in EVENTS}
    # Both the events and the shortcut came to something.
    assert sum(shortcuts) > len(outcomes) / 10
    assert len(outcomes) / 2 < sum(outcomes) < len(outcomes)
