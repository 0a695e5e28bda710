# SPDX-License-Identifier: Apache-2.0
"""The judge itself: what the narrow history of reference.py keeps of a gradient, by numbers worked out by hand and by
properties. What the optimizer keeps is compared with it in test_narrow_history.py."""

from __future__ import annotations

import numpy as np
import pytest
from reference import BLOCK, SMALLEST, Sag, decode, encode

LARGEST = {"int16": 32767, "int8": 127}
FLOAT_MAX = float(np.finfo(np.float32).max)
narrow = pytest.mark.parametrize("dtype", LARGEST)


def kept(g: np.ndarray, dtype: str) -> np.ndarray:
    return decode(*encode(g, dtype))


def scales_of(g: np.ndarray, dtype: str) -> np.ndarray:
    """Each element's scale."""
    return np.repeat(encode(g, dtype)[1], BLOCK)[: g.size].reshape(g.shape)


def wild(size: int, seed: int = 1) -> np.ndarray:
    """Numbers of both signs, from denormal ones to nearly the largest, those of one block much alike."""
    draw = np.random.default_rng(seed)
    powers = np.repeat(draw.uniform(-149, 127, size // BLOCK + 1), BLOCK)[:size] - draw.exponential(3, size)
    return (draw.choice([-1, 1], size) * 2.0**powers).astype(np.float32)


def test_numbers_by_hand() -> None:
    """A scale of 1: halves go to the even neighbour. A scale of 1/127, and of 1/4."""
    q, scale = encode(np.array([127, 0.5, 1.5, -2.5, -127, 3.4999], np.float32), "int8")
    assert q.tolist() == [127, 0, 2, -2, -127, 3]
    assert scale.tolist() == [1]
    q, scale = encode(np.array([[1, 0.5], [-1, 0.004]]), "int8")
    assert q.tolist() == [[127, 64], [-127, 1]]
    assert scale.tolist() == [np.float32(1) / np.float32(127)]
    q, scale = encode(np.array([32767 / 4, -0.25, 0.1, 0.13, 100.0]), "int16")
    assert q.tolist() == [32767, -1, 0, 1, 400]
    assert scale.tolist() == [0.25]


@narrow
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 44])
def test_blocks_and_their_tail(dtype: str, size: int) -> None:
    """Each block by itself has what it has beside the others."""
    g = np.random.default_rng(2).normal(size=size)
    q, scale = encode(g, dtype)
    assert (q.dtype, scale.dtype, q.shape) == (np.dtype(dtype), np.float32, (size,))
    assert len(scale) == -(-size // BLOCK)
    for block in range(len(scale)):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        alone = encode(g[part], dtype)
        assert np.array_equal(alone[0], q[part])
        assert alone[1] == scale[block]


@narrow
def test_error_is_half_a_scale(dtype: str) -> None:
    """And what rounding of the quotient in float32 adds to it."""
    g = wild(500 * BLOCK + 7)
    g = g[np.abs(g) < 3.4e38]
    assert np.isfinite(kept(g, dtype)).all()
    zero_block = scales_of(g, dtype) == 0
    assert zero_block.any()
    assert np.abs(g[zero_block]).max() < 1e-30
    bound = (0.5 + LARGEST[dtype] * 2.0**-22) * scales_of(g, dtype).astype(np.float64)
    assert (np.abs(kept(g, dtype) - g) <= bound)[~zero_block].all()


@narrow
def test_what_was_kept_is_kept_as_it_is(dtype: str) -> None:
    """Another encoding of it has the same integers, and scales one rounding away."""
    g = wild(500 * BLOCK)
    q, scale = encode(g, dtype)
    again, scale_again = encode(decode(q, scale), dtype)
    apart = scale > np.float32(1e-29)
    assert np.array_equal(again.reshape(-1, BLOCK)[apart], q.reshape(-1, BLOCK)[apart])
    np.testing.assert_allclose(scale_again[apart], scale[apart], rtol=2.0**-22)


@narrow
@pytest.mark.parametrize("size", [0.0, -0.0, 1e-45, 1e-38, 9.99e-31])
def test_blocks_of_nothing(dtype: str, size: float) -> None:
    q, scale = encode(np.full(BLOCK, size, np.float32), dtype)
    assert not q.any()
    assert scale.tolist() == [0]
    assert not np.signbit(scale).any()


@narrow
def test_the_smallest_block_that_is_kept(dtype: str) -> None:
    g = np.full(BLOCK, 1e-30, np.float32)
    assert (encode(g, dtype)[0] == LARGEST[dtype]).all()
    np.testing.assert_allclose(kept(g, dtype), g, rtol=1e-6)


@narrow
@pytest.mark.parametrize("huge", [1e30, -3.3e38, FLOAT_MAX, -FLOAT_MAX, 1e39, 1e300])
def test_one_huge_element(dtype: str, huge: float) -> None:
    """Also one that float32 cannot hold: all are finite, in float32 too, and only this block knows of it."""
    g = np.random.default_rng(3).normal(size=3 * BLOCK)
    others = kept(g, dtype)
    g[BLOCK + 5] = huge
    found = kept(g, dtype)
    q, scale = encode(g, dtype)
    single = q.astype(np.float32) * np.repeat(scale, BLOCK)
    assert np.isfinite(found).all()
    assert np.isfinite(single).all()
    np.testing.assert_allclose(found[BLOCK + 5], np.clip(huge, -FLOAT_MAX, FLOAT_MAX), rtol=1e-3)
    beside = np.delete(np.arange(3 * BLOCK), np.arange(BLOCK, 2 * BLOCK))
    assert np.array_equal(found[beside], others[beside])
    assert not np.delete(found, BLOCK + 5)[BLOCK : 2 * BLOCK - 1].any()


@narrow
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_takes_its_block(dtype: str, bad: float) -> None:
    g = np.random.default_rng(4).normal(size=2 * BLOCK + 9)
    g[BLOCK + 5] = bad
    q, scale = encode(g, dtype)
    assert not q[BLOCK : 2 * BLOCK].any()
    assert np.isnan(scale).tolist() == [False, True, False]
    assert np.isnan(decode(q, scale)).nonzero()[0].tolist() == list(range(BLOCK, 2 * BLOCK))


@narrow
def test_the_sum_is_that_of_what_is_kept(dtype: str) -> None:
    """In one tensor with a narrow history and one that is too small for it, whose gradients are kept as they are."""
    draw = np.random.default_rng(5)
    sag = Sag([np.zeros(SMALLEST), np.zeros(SMALLEST - 1)], 3, weights=[1, 1, 2], theta=0.5, history_dtype=dtype)
    for step in range(10):
        grads = [draw.normal(size=x.shape) for x in sag.x]
        sag.step(grads, 0.1, index=int(draw.integers(3)) if step else 2)
    assert sag.stored[1] is None
    for p in range(2):
        right = np.tensordot(sag.w, sag.y[p], axes=1)
        np.testing.assert_allclose(sag.d[p], right, rtol=0, atol=1e-14 * np.abs(sag.y[p]).sum(axis=0).max())
    q, scale = sag.stored[0]
    for i in range(3):
        assert np.array_equal(sag.y[0][i], decode(q[i], scale[i]))
    last = np.abs(sag.y[0] - grads[0]).max(axis=1).min()
    assert 0 < last <= 0.51 * scale.max()
    assert np.abs(sag.y[1] - grads[1]).max(axis=1).min() == 0
