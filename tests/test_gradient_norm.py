# SPDX-License-Identifier: Apache-2.0
"""``gradient_norm()`` against the reference, in dygraph and in static graphs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest
from problems import DRAWN, FULL_SHAPES, WEIGHTS, Quadratic, StaticRun
from reference import Sag
from trial import Trial

from paddle_asgd import ASGD


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "cyclic"])
def test_gradient_norm(indexed: bool) -> None:
    trial = Trial(n=5, batch_weights=WEIGHTS)
    assert trial.optimizer.gradient_norm() == math.inf
    for index in DRAWN:
        trial.step(index=index if indexed else None)
        assert trial.optimizer.gradient_norm() == pytest.approx(trial.sag.gradient_norm(), rel=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("masters", [True, False], ids=["masters", "no_masters"])
def test_gradient_norm_of_16_bits(dtype: str, masters: bool, recwarn: Any) -> None:
    param = paddle.to_tensor([1.0, -2.0, 0.5]).astype(dtype)
    param.stop_gradient = False
    optimizer = ASGD(0.1, 3, [param], weight_decay=0.5, multi_precision=masters)
    param.grad = paddle.to_tensor([0.5, 1.0, 0.25]).astype(dtype)
    optimizer.step()
    x = (optimizer._master_weights[param.name] if masters else param).astype("float64").numpy()
    expected = np.linalg.norm(np.array([0.5, 1.0, 0.25]) + 0.5 * x)
    assert optimizer.gradient_norm() == pytest.approx(expected, rel=1e-14)


def test_gradient_norm_leaves_out_what_is_frozen() -> None:
    """Its gradient in the history never changes again, and a loop that waits for 0 would wait for ever."""
    trial = Trial(n=5, shapes=FULL_SHAPES)
    for index in DRAWN:
        trial.step(index=index)
    for param in trial.params[1:]:
        param.stop_gradient = True
    only = Sag(trial.sag.x[:1], 5, 0.1)
    only.d, only.y, only.m, only.seen = trial.sag.d[:1], trial.sag.y[:1], trial.sag.m[:1], trial.sag.seen[:1]
    assert trial.optimizer.gradient_norm() == pytest.approx(only.gradient_norm(), rel=1e-13)
    for param in trial.params[1:]:
        param.stop_gradient = False
    trial.optimizer._parameter_list = trial.params[:1]  # as wrappers that shard an optimizer do
    assert trial.optimizer.gradient_norm() == pytest.approx(only.gradient_norm(), rel=1e-13)


@pytest.mark.usefixtures("static_mode")
def test_static_gradient_norm_before_and_with_a_variable() -> None:
    def build(loss: Any, params: list) -> Any:
        decay = paddle.full([1], 0.1, "float32")
        optimizers = [ASGD(0.1, 5), ASGD(0.1, 5, weight_decay=decay)]
        optimizers[0].minimize(loss)
        optimizers[1].apply_gradients([(params[0], paddle.ones(params[0].shape, "float32"))])
        return optimizers

    run = StaticRun(Quadratic(batches=5), build)
    with paddle.static.scope_guard(run.scope):
        assert run.built[0].gradient_norm() == math.inf
        run.run(0)
        assert 0 < run.built[0].gradient_norm() < math.inf
        with pytest.raises(TypeError, match="gradient_norm: received a variable of the graph as weight_decay"):
            run.built[1].gradient_norm()
