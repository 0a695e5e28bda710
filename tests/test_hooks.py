# SPDX-License-Identifier: Apache-2.0
"""Hooks around steps and checkpoints, maximize and zero_grad, which every optimizer of this package has."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import Quadratic
from reference import Sag
from refusing import assert_refused

from paddle_asgd import ASGD, AveragedSGD

SHAPES = [[3], [2, 2]]
MAKERS = {
    "ASGD": lambda params, **options: ASGD(0.1, 3, params, **options),
    "AveragedSGD": lambda params, **options: AveragedSGD(0.1, parameters=params, **options),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable:
    return MAKERS[request.param]


class Case:
    """An optimizer with two parameters, and a list of what its hooks have noted."""

    def __init__(self, make: Callable, **options: Any) -> None:
        self.problem = Quadratic(batches=3, shapes=SHAPES)
        self.params = self.problem.parameters()
        self.optimizer = make(self.params, **options)
        self.noted: list = []

    def backward(self, step: int = 0) -> None:
        self.problem.backward(step, self.params)

    def note(self, name: str) -> Callable:
        def hook(optimizer: Any, *given: Any) -> None:
            assert optimizer is self.optimizer
            self.noted.append((name, *given))

        return hook

    def values(self) -> list[bytes]:
        return [param.numpy().tobytes() for param in self.params]


def step(case: Case) -> None:
    case.optimizer.step()


def minimize(case: Case) -> None:
    case.optimizer.apply_gradients([(p, p.grad) for p in case.params])


def of_a_wrapper(case: Case) -> None:
    case.optimizer._apply_optimize(loss=None, startup_program=None, params_grads=[(p, p.grad) for p in case.params])


@pytest.mark.parametrize("way", [step, minimize, of_a_wrapper])
def test_once_for_each_way_to_a_step(make: Callable, way: Callable) -> None:
    case = Case(make)
    case.optimizer.register_step_pre_hook(case.note("pre"))
    case.optimizer.register_step_post_hook(case.note("post"))
    for taken in range(4):
        case.backward(taken)
        way(case)
        assert case.noted == [("pre", (), {}), ("post", (), {})] * (taken + 1)
        case.optimizer.clear_grad()


def test_a_closure_is_passed_on_and_may_be_replaced(make: Callable) -> None:
    case, other = Case(make), Case(make)
    called = []
    case.optimizer.register_step_pre_hook(case.note("pre"))
    case.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((), {"closure": lambda: called.append(1)}))
    case.optimizer.register_step_post_hook(case.note("post"))
    closure = other.backward
    case.backward()
    case.optimizer.step(closure)
    assert called == [1]
    assert case.noted[0] == ("pre", (closure,), {})
    assert case.noted[1][1] == ()
    assert list(case.noted[1][2]) == ["closure"]


def test_a_pre_hook_may_change_gradients(make: Callable) -> None:
    case, other = Case(make), Case(make)

    def double(of: Case) -> None:
        for param in of.params:
            param.grad.scale_(2.0)

    case.optimizer.register_step_pre_hook(lambda *given: double(case))
    for each in (case, other):
        for _ in range(3):
            each.backward()
            if each is other:
                with paddle.no_grad():
                    double(other)
            each.optimizer.step()
            each.optimizer.clear_grad()
    assert case.values() == other.values()


def test_gradients_are_enabled_afterwards_as_before(make: Callable) -> None:
    case = Case(make)
    case.optimizer.register_step_pre_hook(case.note("pre"))
    for _ in range(2):
        case.backward()
        case.optimizer.step()
        assert paddle.is_grad_enabled()


def test_a_skipped_step_calls_no_hook(make: Callable) -> None:
    case = Case(make)
    case.optimizer.register_step_pre_hook(case.note("pre"))
    case.optimizer.register_step_post_hook(case.note("post"))
    for skips in (False, True, False):
        case.noted.clear()
        case.backward()
        case.optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([skips]))
        case.optimizer.step()
        assert case.optimizer._get_auxiliary_var("found_inf") is skips
        assert [note[0] for note in case.noted] == ([] if skips else ["pre", "post"])


def test_a_refused_step_calls_no_post_hook_and_spoils_nothing(make: Callable) -> None:
    case = Case(make)
    case.optimizer.register_step_pre_hook(case.note("pre"))
    case.optimizer.register_step_post_hook(case.note("post"))
    with pytest.raises(ArithmeticError):
        case.optimizer.step(raising)
    assert [note[0] for note in case.noted] == ["pre"]
    case.noted.clear()
    case.backward()
    minimize(case)
    assert [note[0] for note in case.noted] == ["pre", "post"]


def raising(*given: Any) -> None:
    raise ArithmeticError


def test_what_a_post_hook_raises_does_not_undo_the_step(make: Callable) -> None:
    """Nor is a ValueError taken for one of the step, which would be tried a second time."""
    case, other = Case(make), Case(make)

    def refuse(optimizer: Any, args: tuple, kwargs: dict) -> None:
        raise ValueError("a hook's")

    case.optimizer.register_step_post_hook(refuse)
    for taken in range(3):
        for each in (case, other):
            each.backward(taken)
        with pytest.raises(ValueError, match="a hook's"):
            case.optimizer.step()
        other.optimizer.step()
        for each in (case, other):
            each.optimizer.clear_grad()
    assert case.values() == other.values()


def test_handles(make: Callable) -> None:
    case = Case(make)
    first = case.optimizer.register_step_pre_hook(case.note("first"))
    with case.optimizer.register_step_pre_hook(case.note("second")):
        case.backward()
        case.optimizer.step()
        assert [note[0] for note in case.noted] == ["first", "second"]
    first.remove()
    first.remove()
    case.optimizer.step()
    assert len(case.noted) == 2


def test_a_hook_that_removes_itself(make: Callable) -> None:
    case = Case(make)
    handle = case.optimizer.register_step_post_hook(lambda *given: handle.remove())
    case.optimizer.register_step_post_hook(case.note("after it"))
    case.backward()
    case.optimizer.step()
    case.optimizer.step()
    assert len(case.noted) == 2


def test_state_dict_hooks(make: Callable) -> None:
    case = Case(make)
    case.backward()
    case.optimizer.step()
    plain = case.optimizer.state_dict()
    case.optimizer.register_state_dict_pre_hook(case.note("pre"))
    case.optimizer.register_state_dict_post_hook(case.note("second"))
    case.optimizer.register_state_dict_post_hook(lambda optimizer, state: {**state, "note": 7}, prepend=True)
    state = case.optimizer.state_dict()
    assert state.keys() == {*plain, "note"}
    assert [note[0] for note in case.noted] == ["pre", "second"]
    assert "note" in case.noted[1][1]
    # All entries are there, those that a subclass adds included.
    assert plain.keys() < case.noted[1][1].keys()


def test_load_state_dict_hooks(make: Callable) -> None:
    with paddle.utils.unique_name.guard():
        source = Case(make)
    source.backward()
    source.optimizer.step()
    with paddle.utils.unique_name.guard():
        case = Case(make)
    state = {**source.optimizer.state_dict(), "note": 7}
    case.optimizer.register_load_state_dict_pre_hook(case.note("pre"))
    case.optimizer.register_load_state_dict_pre_hook(lambda optimizer, given: given.pop("note") and None)
    case.optimizer.register_load_state_dict_post_hook(case.note("post"))
    case.optimizer.load_state_dict(state)
    assert [note[0] for note in case.noted] == ["pre", "post"]
    assert state["note"] == 7  # the caller's dict stays as it is
    assert len(case.optimizer.state_dict()) == len(state) - 1
    case.noted.clear()
    with pytest.raises(ValueError, match="Nothing has been loaded"):
        case.optimizer.set_state_dict({"note": 7, "other": 8})
    assert [note[0] for note in case.noted] == ["pre"]


@pytest.mark.parametrize(
    "register",
    ["step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"],
)
def test_no_function(make: Callable, register: str) -> None:
    optimizer = Case(make).optimizer
    assert_refused(lambda: getattr(optimizer, f"register_{register}_hook")(3), TypeError, ["hook", "3", "a function"])


def test_what_a_pre_hook_returns(make: Callable) -> None:
    case = Case(make)
    case.optimizer.register_step_pre_hook(lambda *given: {"closure": None})
    before = case.values()
    assert_refused(case.optimizer.step, TypeError, ["step pre hook", "closure", "(args, kwargs)"])
    assert case.values() == before


# ---- maximize, zero_grad ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"theta": 1.0}, {"batch_weights": [1.0, 2.0, 3.0]}], ids=str)
@pytest.mark.parametrize("decay", [0.1, paddle.regularizer.L2Decay(0.1)], ids=["number", "regularizer"])
def test_asgd_maximizes(options: dict[str, Any], decay: Any) -> None:
    """The reference descends along gradients of the other sign, which are what its history then holds."""
    problem = Quadratic(batches=3, shapes=SHAPES)
    params = problem.parameters("float64")
    optimizer = ASGD(0.1, 3, params, weight_decay=decay, maximize=True, **options)
    in_history = isinstance(decay, float)
    sag = Sag(
        problem.start, 3, weight_decay=0.1 if in_history else 0.0,
        weights=options.get("batch_weights"), theta=options.get("theta"),
    )  # fmt: skip
    for taken in range(8):
        problem.backward(taken, params)
        optimizer.step()
        optimizer.clear_grad()
        shrink = [0.0 if in_history else 0.1 * x for x in sag.x]
        sag.step([-g + s for g, s in zip(problem.gradients(taken, sag.x), shrink)], 0.1)
        for param, x in zip(params, sag.x):
            np.testing.assert_allclose(param.numpy(), x, rtol=1e-13)
    if in_history:
        assert optimizer.gradient_norm() == pytest.approx(sag.gradient_norm(), rel=1e-12)
    assert "maximize=True" in repr(optimizer)


@pytest.mark.usefixtures("static_mode")
def test_asgd_maximizes_in_static_graphs() -> None:
    from problems import StaticRun

    problem = Quadratic(batches=3, shapes=SHAPES)
    build = lambda loss, params: ASGD(0.1, 3, weight_decay=0.1, maximize=True).minimize(loss)  # noqa: E731
    run = StaticRun(problem, build, "float64")
    sag = Sag(problem.start, 3, weight_decay=0.1)
    for taken in range(8):
        run.run(taken)
        sag.step([-g for g in problem.gradients(taken, sag.x)], 0.1)
        for name, x in zip(run.names, sag.x):
            np.testing.assert_allclose(run.array(name), x, rtol=1e-13)


def test_maximize_with_rates_in_tensors() -> None:
    problem = Quadratic(batches=3, shapes=SHAPES)
    params = problem.parameters("float64")
    rate, decay = paddle.full([1], 0.1, "float64"), paddle.full([1], 0.1, "float64")
    optimizer = ASGD(rate, 3, params, weight_decay=decay, maximize=True)
    sag = Sag(problem.start, 3, weight_decay=0.1)
    for taken in range(5):
        problem.backward(taken, params)
        optimizer.step()
        optimizer.clear_grad()
        sag.step([-g for g in problem.gradients(taken, sag.x)], 0.1)
        for param, x in zip(params, sag.x):
            np.testing.assert_allclose(param.numpy(), x, rtol=1e-13)


def test_zero_grad(make: Callable) -> None:
    case = Case(make)
    case.backward()
    case.optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.numpy().any() for param in case.params)
    case.optimizer.zero_grad()
    assert all(param.grad is None for param in case.params)
