# SPDX-License-Identifier: Apache-2.0
"""The ground knows no formula: another optimizer of a few lines takes steps on it, in all modes, and resumes.

Must not need the library's own kernels, nor anything of paddle_asgd.sag.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import pytest
from problems import Quadratic, StaticRun

from paddle_asgd.fused import FusedOptimizer
from paddle_asgd.options import Bucket
from paddle_asgd.state import StateTensor


class Averaging(FusedOptimizer):
    """SGD that from its second step on keeps a running average ``ax`` of the weights."""

    def __init__(self, learning_rate: Any, decay: float, parameters: Any = None, **options: Any) -> None:
        layout = (
            StateTensor("ax", "compute", lambda shape: shape, later=True),
            StateTensor("step", "int64", lambda shape: [1], counts_steps=True),
        )
        given = {"weight_decay": None, "grad_clip": None, "multi_precision": False, "name": None, **options}
        super().__init__(learning_rate, parameters, **given, layout=layout, hyperparameters={"decay": decay})
        self.decay = decay

    def _native_call(
        self, bucket: Bucket, rates: tuple[Any, Any], found_inf: Any, leads: bool, check_only: bool = False
    ) -> Callable[[], None]:
        def update() -> None:
            averages, steps = bucket.state
            for i, (x, g) in enumerate(zip(bucket.params, bucket.grads)):
                paddle.assign(x - rates[0] * g, x)
                if averages is not None:
                    paddle.assign(self.decay * averages[i] + (1 - self.decay) * x, averages[i])
                paddle.assign(steps[i] + 1, steps[i])

        if check_only:
            return lambda: None
        if not paddle.in_dynamic_mode():
            update()  # appends the operators
            return lambda: None
        return update

    def _begin_step(self) -> None:
        average = next(entry for entry in self._state.layout if entry.later)
        for param in self._state.created if paddle.in_dynamic_mode() else ():
            if self._state.named(param) is not None and self._state.named(param)["step"].item() == 1:
                self._state.entry_of(param, average, []).set_value(param)


SHAPES = ([3], [2, 2])


def by_hand(steps: int, averaged: bool = True) -> tuple[list[np.ndarray], list[np.ndarray]]:
    problem = Quadratic(batches=3, shapes=SHAPES)
    x = [value.copy() for value in problem.start]
    ax: list[np.ndarray] = []
    for step in range(steps):
        if step == 1 and averaged:
            ax = [value.copy() for value in x]
        x = [value - 0.1 * g for value, g in zip(x, problem.gradients(step, x))]
        ax = [0.9 * average + 0.1 * value for average, value in zip(ax, x)]
    return x, ax


def trained(optimizer: Averaging, problem: Quadratic, params: list, steps: range) -> None:
    for step in steps:
        problem.backward(step, params)
        optimizer.step()
        optimizer.clear_grad()


def averages_of(optimizer: Averaging, params: list) -> list[np.ndarray]:
    state = optimizer.state_dict()
    return [next(v.numpy() for key, v in state.items() if key.startswith(f"{param.name}_ax_")) for param in params]


def test_dygraph_with_state_that_comes_later() -> None:
    problem = Quadratic(batches=3, shapes=SHAPES)
    params = problem.parameters("float64")
    optimizer = Averaging(0.1, 0.9, params)
    trained(optimizer, problem, params, range(1))
    assert not any("_ax_" in name for name in optimizer.state_dict())
    trained(optimizer, problem, params, range(1, 7))
    x, ax = by_hand(7)
    for value, expected in zip([*(p.numpy() for p in params), *averages_of(optimizer, params)], [*x, *ax]):
        np.testing.assert_allclose(value, expected, rtol=1e-13)


@pytest.mark.parametrize("before", [1, 4])
def test_save_and_resume(before: int) -> None:
    """Before and after the later entry came."""
    problem = Quadratic(batches=3, shapes=SHAPES)
    params = problem.parameters("float64")
    optimizer = Averaging(0.1, 0.9, params)
    trained(optimizer, problem, params, range(before))
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    weights = [param.clone() for param in params]
    trained(optimizer, problem, params, range(before, 9))
    expected = [*(p.numpy() for p in params), *averages_of(optimizer, params)]
    for param, weight in zip(params, weights):
        param.set_value(weight)
    resumed = Averaging(0.1, 0.9, params)
    trained(resumed, problem, params, range(2))  # has an average of its own, which must give way
    for param, weight in zip(params, weights):
        param.set_value(weight)
    resumed.set_state_dict(state)
    trained(resumed, problem, params, range(before, 9))
    for value, other in zip([*(p.numpy() for p in params), *averages_of(resumed, params)], expected):
        np.testing.assert_array_equal(value, other)


def test_another_hyperparameter_is_refused() -> None:
    problem = Quadratic(batches=3, shapes=SHAPES)
    params = problem.parameters("float64")
    optimizer = Averaging(0.1, 0.9, params)
    trained(optimizer, problem, params, range(2))
    with pytest.raises(ValueError, match=r"decay is 0\.9, expected 0\.5, with which the optimizer was created"):
        Averaging(0.1, 0.5, params).set_state_dict(optimizer.state_dict())


@pytest.mark.usefixtures("static_mode")
def test_static_graph() -> None:
    problem = Quadratic(batches=3, shapes=SHAPES)
    run = StaticRun(problem, lambda loss, params: Averaging(0.1, 0.9, params).minimize(loss), "float64")
    for step in range(5):
        run.run(step)
    for name, expected in zip(run.names, by_hand(5, averaged=False)[0]):
        np.testing.assert_allclose(run.array(name), expected, rtol=1e-12)


def test_errors_name_no_option_of_the_method() -> None:
    """A remedy that ASGD alone has is added by ASGD."""
    param = paddle.to_tensor([1.0], stop_gradient=False)
    with pytest.raises(TypeError, match=r"^closure: received 3 of type int, expected a function or None$"):
        Averaging(0.1, 0.9, [param]).step(3)
