# SPDX-License-Identifier: Apache-2.0
"""Sparse gradients, as Embedding(sparse=True) has them: to the bit the step of the dense gradient that they stand for.

Must not test Paddle's clips by value (test_edges.py), nor the kernel by itself (tests/native).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import pytest
from problems import ON_GPU, PIR, bits, state_of
from refusing import assert_refused

from paddle_asgd import ASGD, fused, gradients, native

pytestmark = pytest.mark.skipif(ON_GPU, reason="on a GPU, Paddle makes a dense gradient of them before the step")

#: A row shorter than a block of the kernel, one that blocks cut, and one longer than a block.
SHAPES = ([11, 5], [700, 3], [4, 1500])
STEPS = 14
#: Paddle 2.6 cannot take the sum of nothing, through which a gradient of no rows comes here.
NONE = [] if PIR else [0]
#: Which rows each step names: twice, unsorted, none at all, the last, all of them, in another order.
ROWS = (
    lambda height: [3, 1, 3, 0, 3],
    lambda height: NONE,
    lambda height: [height - 1],
    lambda height: [*range(height - 1, -1, -1), 2],
)


def embed(param: paddle.Tensor, rows: Sequence[int], values: np.ndarray, sparse: bool = True) -> None:
    """Leave ``values`` in the gradient of these rows of the parameter."""
    taken = paddle.nn.functional.embedding(paddle.to_tensor(list(rows), "int64"), param, sparse=sparse)
    (taken * paddle.to_tensor(values.astype("float32")).astype(param.dtype)).sum().backward()
    assert param.grad.is_selected_rows() is sparse


def values_of(step: int, rows: Sequence[int], width: int) -> np.ndarray:
    """Numbers whose sum depends on the order of the additions, and the sign of zero."""
    values = np.random.default_rng(step).normal(size=(len(rows), width)) * 10.0 ** (np.arange(len(rows))[:, None] % 5)
    values[..., 0] = -0.0
    return values


def parameter(shape: Sequence[int], dtype: str = "float32") -> paddle.Tensor:
    param = paddle.create_parameter(
        list(shape), dtype, default_initializer=paddle.nn.initializer.Assign(np.zeros(shape, "float32"))
    )
    param.set_value(paddle.to_tensor(np.random.default_rng(9).normal(size=shape).astype("float32")).astype(dtype))
    return param


def step_with_dense_copies(optimizer: ASGD) -> None:
    """Add every sparse gradient up in a dense tensor, by Paddle's add_n, and step."""
    optimizer._shortcut = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "native_form", gradients.dense)
        optimizer.step()


# ---- To the bit ------------------------------------------------------------------------------------------------------


# Paddle 2.6 cuts bfloat16 off where it adds up rows of its dense gradient.
@pytest.mark.parametrize("dtype", ["float32", "float64"] + ["bfloat16"] * PIR)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_a_dense_gradient(shape: list[int], dtype: str) -> None:
    height, width = shape
    params = [parameter(shape, dtype) for _ in range(2)]
    optimizers = [ASGD(0.1, 3, [param], weight_decay=0.1, multi_precision=True) for param in params]
    for step in range(STEPS):
        rows = ROWS[step % len(ROWS)](height)
        for sparse, param, optimizer in zip((True, False), params, optimizers):
            embed(param, rows, values_of(step, rows, width), sparse)
            optimizer.step()
            optimizer.clear_grad()
        states = [bits(state_of(optimizer, param)) for optimizer, param in zip(optimizers, params)]
        assert states[0] == states[1]


OPTIONS = {
    "plain": {},
    "theta": {"theta": 0.5},
    "batch_weights": {"batch_weights": [1.0, 0.5, 0.25]},
    "tensor decay": {"weight_decay": paddle.to_tensor([0.25])},
    "regularizer": {"weight_decay": paddle.regularizer.L2Decay(0.25)},
    "clip by norm": {"grad_clip": paddle.nn.ClipGradByNorm(0.5)},
    "clip by global norm": {"grad_clip": paddle.nn.ClipGradByGlobalNorm(0.5)},
    "clip by value": {"grad_clip": paddle.nn.ClipGradByValue(0.5)},
}


@pytest.mark.parametrize("grouped", [False, True], ids=["one_bucket", "two_buckets"])
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_same_bits_as_a_dense_copy(options: dict[str, Any], grouped: bool) -> None:
    """With every option, a batch index, and a dense parameter between two sparse ones."""
    models = [[parameter(shape) for shape in ([11, 5], [7], [700, 3])] for _ in range(2)]
    optimizers = [
        ASGD(0.1, 3, [{"params": params[:1], "learning_rate": 0.5}, {"params": params[1:]}] if grouped else params,
             **options)
        for params in models
    ]  # fmt: skip
    for step in range(STEPS):
        for copied, params, optimizer in zip((False, True), models, optimizers):
            for param in (params[0], params[2]):
                # Paddle's own clips fail where a gradient has no rows.
                rows = ROWS[step % len(ROWS)](param.shape[0]) or [1] * ("grad_clip" in options)
                embed(param, rows, values_of(step, rows, param.shape[1]))
            (params[1] * (step + 1.0)).sum().backward()
            optimizer.batch_index = step * 2 % 3
            step_with_dense_copies(optimizer) if copied else optimizer.step()
            optimizer.clear_grad()
        for a, b in zip(*models):
            assert bits(state_of(optimizers[0], a)) == bits(state_of(optimizers[1], b))
    assert optimizers[0].variance_ratio == optimizers[1].variance_ratio


def test_numbers_that_are_not_finite() -> None:
    params = [parameter([11, 5]) for _ in range(2)]
    for sparse, param in zip((True, False), params):
        optimizer = ASGD(0.1, 2, [param])
        embed(param, [4, 8, 4, 9], np.array([[np.inf], [np.nan], [-np.inf], [-np.inf]]) * np.ones(5), sparse)
        optimizer.step()
    a, b = (param.numpy() for param in params)
    np.testing.assert_array_equal(a, b)
    assert np.isnan(a[[4, 8]]).all()
    assert np.isinf(a[9]).all()
    assert np.isfinite(np.delete(a, [4, 8, 9], axis=0)).all()


# ---- From step to step -----------------------------------------------------------------------------------------------


def test_nothing_is_left_of_rows_that_an_earlier_step_named() -> None:
    """With n = 1 and no decay, d is the gradient of this step alone; refused steps between two must leave nothing."""
    param, other = parameter([11, 5]), parameter([2])
    optimizer = ASGD(0.125, 1, [param, other])
    for step, rows in enumerate(([1, 2], [2, 2, 7], NONE, [0], [10, 1])):
        before = param.numpy().copy()
        embed(param, rows, np.full([len(rows), 5], step + 1.0))
        optimizer.step()
        optimizer.clear_grad()
        expected = np.zeros([11, 5], "float32")
        np.add.at(expected, rows, step + 1.0)
        np.testing.assert_array_equal(state_of(optimizer, param)["d"], expected)
        np.testing.assert_array_equal(param.numpy(), before - 0.125 * expected)
        # Named, and never taken.
        embed(param, [5, 6], np.ones([2, 5]))
        with pytest.raises(ValueError, match="shape of gradient"):
            optimizer.apply_gradients([(param, param.grad), (other, paddle.ones([3]))])
        optimizer.clear_grad()
        np.testing.assert_array_equal(state_of(optimizer, param)["d"], expected)


def test_sparse_and_dense_in_turns() -> None:
    """A table that the loss uses as a whole every other time."""
    params = [parameter([11, 5]) for _ in range(2)]
    optimizers = [ASGD(0.1, 3, [param]) for param in params]
    for step in range(STEPS):
        for both, param, optimizer in zip((True, False), params, optimizers):
            embed(param, [step % 11, 3, 3], values_of(step, [0, 1, 2], 5), sparse=both and step % 2 == 0)
            optimizer.step()
            optimizer.clear_grad()
    assert bits(state_of(optimizers[0], params[0])) == bits(state_of(optimizers[1], params[1]))


@pytest.mark.shortcut
def test_the_shortcut_takes_them() -> None:
    param = parameter([11, 5])
    optimizer = ASGD(0.1, 3, [param])
    embed(param, [1], np.ones([1, 5]))
    optimizer.step()
    optimizer._apply_optimize = None
    for _ in range(3):
        optimizer.step()
    assert state_of(optimizer, param)["m"].tolist() == [4]


# ---- Refused ---------------------------------------------------------------------------------------------------------


def rows_of(shape: Sequence[int], rows: Sequence[int], dtype: str = "float32") -> paddle.Tensor:
    param = parameter(shape, dtype)
    embed(param, rows, np.ones([len(rows), shape[1]]))
    return param.grad


@pytest.mark.parametrize(
    ("shape", "gradient", "pieces"),
    [
        ([5, 3], lambda: rows_of([9, 3], [1, 7]), ["row in the gradient", "7", "0 to 4"]),
        ([5, 3], lambda: rows_of([5, 4], [1]), ["gradient", "[1, 4]", "[1, 3]"]),
        ([5, 3], lambda: rows_of([5, 3], [1], "float64"), ["dtype of gradient", "float64", "float32"]),
        ([5], lambda: rows_of([5, 1], [1, 2]), ["gradient", "[2, 1]", "[2]"]),
        ([], lambda: rows_of([1, 1], [0]), ["gradient", "dense", "scalar"]),
    ],
    ids=["row", "width", "dtype", "one dimension", "no dimension"],
)
def test_refused(shape: list[int], gradient: Any, pieces: list[str]) -> None:
    """Before anything is written, although the first parameter's gradient is right."""
    params = [paddle.ones([2]), paddle.ones(shape)]
    params[1].name = "second"
    state = [params, [paddle.ones([2]), gradient()], [paddle.ones(p.shape) for p in params]]
    state += [[paddle.ones([3, *p.shape]) for p in params], [paddle.to_tensor([4]) for _ in params]]
    assert_refused(lambda: native.asgd_update(*state, None, 0.1, 0.25), ValueError, [*pieces, "'second'"])
    for tensors in (state[0], state[2], state[3]):
        assert all((tensor.numpy() == 1).all() for tensor in tensors)
