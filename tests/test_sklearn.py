# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's ``sag`` solver, step for step: batches of one sample, drawn by its own generator, in float64."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from paddle_asgd import ASGD

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
from sklearn.linear_model._sag import get_auto_step_size, sag_solver

SAMPLES, FEATURES, PASSES, ALPHA, SEED = 15, 5, 7, 1.5, 3


def drawn(count: int) -> list[int]:
    """The samples that its generator, a shift register of 32 bits, draws with replacement."""
    state = int(np.random.RandomState(SEED).randint(1, np.iinfo(np.int32).max))
    indices = []
    for _ in range(count):
        for shift in (13, -17, 5):
            state = (state ^ (state << shift if shift > 0 else state >> -shift)) & 0xFFFFFFFF
        indices.append(state % 2**31 % SAMPLES)
    return indices


@pytest.mark.filterwarnings("ignore:The max_iter was reached")
@pytest.mark.parametrize("loss", ["squared", "log"])
def test_the_same_trajectory(loss: str) -> None:
    draw = np.random.default_rng(7)
    x, y = draw.normal(size=(SAMPLES, FEATURES)), draw.normal(size=SAMPLES)
    y = y if loss == "squared" else np.where(y > 0, 1.0, 0.0)
    rate = get_auto_step_size((x**2).sum(axis=1).max(), ALPHA / SAMPLES, loss, False)
    weights = paddle.zeros([FEATURES], "float64")
    weights.stop_gradient = False
    optimizer = ASGD(rate, SAMPLES, [weights], weight_decay=ALPHA / SAMPLES, watch=False)
    indices = drawn(PASSES * SAMPLES)
    for passes in range(1, PASSES + 1):
        for index in indices[(passes - 1) * SAMPLES : passes * SAMPLES]:
            optimizer.batch_index = index
            score = (paddle.to_tensor(x[index]) * weights).sum()
            cost = (
                (score - y[index]) ** 2 / 2 if loss == "squared" else paddle.log1p(paddle.exp(score)) - y[index] * score
            )
            cost.backward()
            optimizer.step()
            optimizer.clear_grad()
        expected, _, memory = sag_solver(
            x, y, None, loss=loss, alpha=ALPHA, max_iter=passes, tol=0.0, random_state=SEED
        )
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-10, atol=0)
        assert memory["num_seen"] == len(set(indices[: passes * SAMPLES]))
