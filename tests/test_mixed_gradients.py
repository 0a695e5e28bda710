# SPDX-License-Identifier: Apache-2.0
"""Gradients of several batches in one step under several batch indices: who is told, once, and who is not. What a step
computes is tested in test_slots.py."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import state_of

from paddle_asgd import ASGD, LipschitzSearch, SlotMismatchWarning

MIXED = pytest.warns(SlotMismatchWarning, match="received 0 and then 2 before one step.* one index for all gradients")


class Accumulated:
    """A parameter whose gradient is that of several batches; each ``add`` says which, and accumulates."""

    def __init__(self, **options: Any) -> None:
        self.param = paddle.create_parameter([3], "float32")
        self.optimizer = ASGD(0.1, 4, [self.param], **options)

    def add(self, index: Any) -> None:
        self.optimizer.batch_index = index
        (self.param * self.param).sum().backward()

    def finish(self) -> None:
        self.optimizer.step()
        self.optimizer.clear_grad()


@pytest.mark.parametrize("before", [True, False], ids=["before_backward", "behind_backward"])
@pytest.mark.parametrize("watch", [None, False])
def test_two_indices_for_one_step(before: bool, watch: bool | None) -> None:
    """Once: who has read it will not be helped by reading it again."""
    run = Accumulated(watch=watch)
    for index in (0, 2):
        if before:
            run.optimizer.batch_index = index
        (run.param * run.param).sum().backward()
        run.optimizer.batch_index = index
    with MIXED as caught:
        run.optimizer.step()
    assert caught[0].filename == __file__
    run.optimizer.clear_grad()
    for index in (1, 3):
        run.add(index)
    run.finish()


def test_one_index_for_one_step() -> None:
    """Several batches under one index, set once or again for each; NumPy's ints and tensors of the host, too."""
    run = Accumulated()
    for group in ([1, 1, 1], [2, np.int64(2), paddle.to_tensor(2)], [0], [0], [3, 3]):
        for index in group:
            run.add(index)
        run.finish()


def clear_by_hand(run: Accumulated) -> None:
    run.param.clear_grad()


@pytest.mark.parametrize(
    "clear",
    [
        pytest.param(lambda run: run.optimizer.clear_grad(), id="to_zeros"),
        pytest.param(lambda run: run.optimizer.clear_grad(False), id="to_none"),
        pytest.param(lambda run: run.optimizer.clear_gradients(), id="clear_gradients"),
        pytest.param(clear_by_hand, id="of_the_parameter"),
    ],
)
def test_a_batch_that_is_left_out(clear: Callable) -> None:
    """Its loss was not finite, say. What has been cleared mixes with nothing."""
    run = Accumulated()
    run.add(1)
    run.finish()
    run.add(0)
    clear(run)
    run.add(2)
    run.finish()
    run.optimizer.batch_index = 0  # and left out before it had a gradient
    run.add(2)
    run.finish()


def test_gradients_that_are_cleared_late() -> None:
    """Those of the step before are still there when the index is set, as in loops that clear before backward()."""
    run = Accumulated()
    run.add(1)
    run.optimizer.step()
    run.optimizer.batch_index = 0
    run.optimizer.batch_index = 2
    run.optimizer.clear_grad()
    (run.param * run.param).sum().backward()
    run.optimizer.step()


@pytest.mark.parametrize("sparse", [True, False])
def test_a_refused_step_and_another_batch(sparse: bool) -> None:
    """Mixed only if the refused step's gradients are still there."""
    for clears in (True, False):
        table = paddle.nn.Embedding(4, 4, sparse=sparse)
        optimizer = ASGD(0.1, 4, table.parameters())
        for index in (1, 0):
            optimizer.batch_index = index
            table(paddle.arange(4)).sum().backward()
            if index:
                optimizer.step()
                optimizer.clear_grad()
        with pytest.raises(TypeError, match="batch_index"):
            optimizer.batch_index = "2"
        if clears:
            optimizer.clear_grad()
        optimizer.batch_index = 2
        table(paddle.arange(4)).sum().backward()
        with nullcontext() if clears else MIXED:
            optimizer.step()


def test_mixed_gradients_where_warnings_are_errors() -> None:
    """The step is refused before it has done anything, and may be taken afterwards."""
    run = Accumulated()
    run.add(0)
    run.add(2)
    before = run.param.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SlotMismatchWarning):
            run.optimizer.step()
    assert (run.param.numpy() == before).all()
    run.finish()
    assert (run.param.numpy() != before).all()
    assert state_of(run.optimizer, run.param)["m"][:2].tolist() == [1, 1]


def test_a_search_that_is_refused_and_another_batch() -> None:
    """LipschitzSearch clears the gradients of what it refuses, and of what was there before."""
    run = Accumulated()
    search = LipschitzSearch(run.optimizer)
    run.optimizer.batch_index = 0
    with pytest.raises(ValueError, match="finite"):
        search.step(lambda: (run.param * float("nan")).sum())
    run.optimizer.batch_index = 2
    search.step(lambda: (run.param * run.param).sum())
    run.add(0)
    run.optimizer.batch_index = 2
    search.step(lambda: (run.param * run.param).sum())
