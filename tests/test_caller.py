# SPDX-License-Identifier: Apache-2.0
"""Warnings name the user's line, however many calls of Paddle and of the package lie between."""

from __future__ import annotations

import warnings

import paddle
import pytest
from resuming import BY_ORDER, Run

from paddle_asgd.caller import warn


@pytest.mark.parametrize("text", [BY_ORDER, "'LR_Scheduler' is not used"])
def test_warnings_point_to_the_caller(text: str) -> None:
    with paddle.utils.unique_name.guard():
        saved = Run(schedule=text != BY_ORDER)
        saved.train([0])
    with paddle.utils.unique_name.guard("again_" if text == BY_ORDER else None):
        loading = Run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loading.optimizer.set_state_dict(saved.copied_state())
    assert [w.filename for w in caught if text in str(w.message)] == [__file__]


def line_of(depth: int, own: str) -> str:
    """Where a warning points that code of a module of this name gives, after ``depth`` calls within it."""
    code = "def call(depth):\n    call(depth - 1) if depth else warn('a warning')\n"
    module = {"__name__": own, "warn": warn}
    exec(compile(code, "within", "exec"), module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module["call"](depth)
    (warning,) = caught
    assert warning.category is UserWarning
    return warning.filename


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("own", ["paddle_asgd", "paddle_asgd.sag.watch", "paddle.hapi.model"])
def test_own_and_paddles_calls_are_passed_over(own: str, depth: int) -> None:
    assert line_of(depth, own) == __file__


@pytest.mark.parametrize("own", ["paddle_asgd_tools", "paddlenlp.trainer", "__main__"])
def test_calls_of_others_are_not(own: str) -> None:
    """A name that only begins alike is another package's."""
    assert line_of(2, own) == "within"
