# SPDX-License-Identifier: Apache-2.0
"""Groups that are added or edited after the constructor: trained from the next step on, or refused; never neither."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import Quadratic
from refusing import assert_refused, computed, content, named
from trial import Trial

from paddle_asgd import ASGD

SHAPES = [[257], [3, 2], [5]]


def trial_of_two(as_groups: bool, **options: Any) -> Trial:
    """The optimizer knows the first two parameters, the reference all three."""
    params = Quadratic(3, SHAPES).parameters("float64")
    given = [{"params": [p]} for p in params[:2]] if as_groups else params[:2]
    return Trial(shapes=SHAPES, params=params, parameters=given, **options)


def step_of(trial: Trial, rates: Any = 0.1, grads: Any = None) -> None:
    """One step. Gradients that no optimizer has, it does not clear."""
    trial.step(rates, grads)
    for param in trial.params:
        param.clear_gradient(False)


def by_call(optimizer: ASGD, group: dict) -> None:
    optimizer.add_param_group(group)


def by_paddles_name(optimizer: ASGD, group: dict) -> None:
    optimizer._add_param_group(group)


def by_list_of_groups(optimizer: ASGD, group: dict) -> None:
    optimizer.param_groups.append(group)


WAYS = [by_call, by_paddles_name, by_list_of_groups]


@pytest.mark.parametrize("as_groups", [False, True], ids=["list", "groups"])
@pytest.mark.parametrize("add", WAYS)
@pytest.mark.parametrize("early", [False, True], ids=["after_steps", "before_steps"])
def test_an_added_group_is_trained(add: Callable, as_groups: bool, early: bool) -> None:
    """With its options, and the others go on with theirs."""
    trial = trial_of_two(as_groups)
    for step in range(9):
        if step == (0 if early else 4):
            add(trial.optimizer, {"params": iter(trial.params[2:]), "learning_rate": 0.5, "weight_decay": 0.25})
            trial.sag.weight_decay = [0.1, 0.1, 0.25]
        if early or step >= 4:
            step_of(trial, [0.1, 0.1, 0.05])
        else:
            step_of(trial, grads=[*trial.gradients()[:2], None])
    groups = trial.optimizer.param_groups
    assert [len(group["params"]) for group in groups] == ([1, 1, 1] if as_groups else [2, 1])


def test_parameters_appended_to_and_removed_from_a_group() -> None:
    trial = trial_of_two(as_groups=True)
    group = trial.optimizer._param_groups[1]
    for step in range(12):
        if step == 4:
            group["params"].append(trial.params[2])
        if step == 8:
            group["params"].pop(0)
            trial.sag.m[1] = 0  # a checkpoint has no state of it any more
        present = [True, step < 8, step >= 4]
        step_of(trial, grads=[g if there else None for g, there in zip(trial.gradients(), present)])


def test_minimize_trains_what_was_appended() -> None:
    trial = trial_of_two(as_groups=True)
    trial.optimizer.param_groups[0]["params"].append(trial.params[2])
    before = trial.params[2].numpy()
    loss = paddle.add_n([p.square().sum() for p in trial.params])
    loss.backward()
    _, pairs = trial.optimizer.minimize(loss)
    assert len(pairs) == 3
    assert not np.array_equal(trial.params[2].numpy(), before)


def test_options_edited_between_steps() -> None:
    """Those that were there, new ones, a clip, and a note that is no option."""
    trial = trial_of_two(as_groups=True)
    trial.optimizer.add_param_group({"params": trial.params[2:]})
    groups = trial.optimizer.param_groups
    for step in range(9):
        grads = trial.gradients()
        if step == 3:
            groups[0]["weight_decay"] = 0.5
            groups[1]["learning_rate"] = 0.25
            groups[2]["lr_scale"] = 7.0
            trial.sag.weight_decay = [0.5, 0.1, 0.1]
        if step >= 6:
            groups[2]["grad_clip"] = paddle.nn.ClipGradByValue(0.25)
            grads[2] = np.clip(grads[2], -0.25, 0.25)
        trial.step([0.1, 0.1 if step < 3 else 0.025, 0.1], grads)
    assert groups[2]["lr_scale"] == 7.0


def test_a_learning_rate_in_a_tensor_stands_for_the_whole() -> None:
    """As in Paddle's optimizers, and it is read at every step."""
    trial = trial_of_two(as_groups=True)
    rate = paddle.to_tensor(0.5)
    trial.optimizer.add_param_group({"params": trial.params[2:], "learning_rate": rate})
    param = paddle.create_parameter([1], "float32")
    theirs = paddle.optimizer.SGD(0.1, [{"params": [param], "learning_rate": rate}])
    for step in range(8):
        rate.set_value(np.full([], 0.5 / (step + 1), "float32"))
        trial.step([0.1, 0.1, rate.item()])
        before, param.grad = param.item(), paddle.ones([1])
        theirs.step()
        assert before - param.item() == pytest.approx(rate.item(), abs=1e-6)
    rate.set_value(np.full([], np.nan, "float32"))
    with pytest.raises(ValueError, match="learning_rate"):
        trial.step()


NOTES = ["name", "group_name", "lr_scale", "lr_mult", "initial_lr", "param_names"]


@pytest.mark.parametrize("key", NOTES)
def test_notes_of_the_users(key: str) -> None:
    param = named("first", [5])
    optimizer = ASGD(0.1, 3, [{"params": [param], key: "mine"}])
    assert optimizer.param_groups == [{"params": [param], key: "mine"}]


MISTAKES = {
    "weight_deacy": "'weight_decay'",
    "weightdecay": "'weight_decay'",
    "learningrate": "'learning_rate'",
    "param": "'params'",
    "lr": "'learning_rate'",
    "momentum": "own",
    "batch_num": "whole optimizer",
    "theta": "whole optimizer",
    "gradclip": "'grad_clip'",
}
REFUSED = {
    **{key: ({key: 0.5}, ValueError, repr(key), text) for key, text in MISTAKES.items()},
    "key": ({3: 0.5}, TypeError, "key", "3"),
    "weight_decay": ({"weight_decay": -1.0}, ValueError, "-1.0"),
    "learning_rate": ({"learning_rate": "x"}, TypeError, "'x'"),
    "dtype": ({"params": [paddle.ones([2], "int32")]}, TypeError, "int32"),
    "computed": ({"params": [computed()]}, ValueError, "leaf"),
    "none": ({"params": None}, TypeError, "None"),
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("as_groups", [False, True], ids=["list", "groups"])
def test_refused(row: tuple, as_groups: bool) -> None:
    """As by the constructor, and nothing has changed: the next step is as if the call had never been."""
    options, error, *pieces = row
    trial = trial_of_two(as_groups)
    step_of(trial, grads=[*trial.gradients()[:2], None])
    before = content(trial.params)
    group = {"params": [trial.params[2]], **options}
    assert_refused(lambda: trial.optimizer.add_param_group(group), error, ["param_groups", *pieces])
    assert content(trial.params) == before
    assert len(trial.optimizer.param_groups) == 1 + as_groups
    for _ in range(4):
        step_of(trial, grads=[*trial.gradients()[:2], None])
    trial.optimizer.add_param_group({"params": [trial.params[2]]})
    trial.step()


def test_a_parameter_of_another_group_is_refused() -> None:
    params = [named("first", [5]), named("second", [3])]
    optimizer = ASGD(0.1, 3, params)
    assert_refused(lambda: optimizer.add_param_group({"params": [params[1]]}), ValueError, ["'second'", "once"])
    optimizer.param_groups[0]["params"].append(params[0])
    before = content(params)
    for param in params:
        param.grad = paddle.ones(param.shape)
    assert_refused(optimizer.step, ValueError, ["'first'", "once"])
    assert content(params) == before
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert content(params) != before


def test_after_a_wrapper_has_divided_the_parameters() -> None:
    params = [named("first", [5]), named("second", [3])]
    for given in (params[:1], [{"params": params[:1]}]):
        optimizer = ASGD(0.1, 3, given)
        optimizer._parameter_list = []
        assert_refused(lambda o=optimizer: o.add_param_group({"params": params[1:]}), ValueError, ["sharded"])


@pytest.mark.usefixtures("static_mode")
def test_static_graphs() -> None:
    """Before the step is built; afterwards a group could not enter it."""
    main = paddle.static.Program()
    with paddle.static.program_guard(main, paddle.static.Program()):
        params = [paddle.create_parameter([3], "float32", name=name) for name in ("a", "b", "c")]
        loss = paddle.add_n([p.sum() for p in params])
        optimizer = ASGD(0.1, 3, params[:1])
        optimizer.add_param_group({"params": params[1:2], "learning_rate": 0.5})
        _, pairs = optimizer.minimize(loss)
        assert [pair[0].name for pair in pairs] == ["a", "b"]
        with pytest.raises(RuntimeError, match="minimize"):
            optimizer.add_param_group({"params": params[2:]})
        everything = ASGD(0.1, 3)
        with pytest.raises(ValueError, match="parameters=None"):
            everything.add_param_group({"params": params[2:]})
