# SPDX-License-Identifier: Apache-2.0
"""The problem that the tests train, in dygraph, in static graphs and in NumPy, and how they read an optimizer's state.

Must not hold the method's formula (reference.py) nor any expectation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
import paddle

ON_GPU = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
VERSION = tuple(int(part) for part in paddle.__version__.split(".")[:2])
#: Whether static graphs are of the format that Paddle 3 began.
PIR = VERSION >= (3, 0)
#: Paddle 3.0's own way from a loss to the gradients (backward, minimize) leaves out parameters without elements.
EMPTY_IN_MINIMIZE = VERSION >= (3, 1)

#: Empty first, in the middle and last; no dimension at all; one element; sizes that leave every later slot of the
#: history at an odd offset; more elements than one block of the GPU kernel takes.
SHAPES = ([0, 3], [], [257], [2, 0], [1], [3, 2741], [0])
FULL_SHAPES = tuple(shape for shape in SHAPES if 0 not in shape)
#: Paddle 2.6 sums no empty tensor, keeps no gradient of one, and creates no empty parameter.
TRAINABLE = SHAPES if PIR else FULL_SHAPES

#: Numbers of five batches, in the order in which they come. The count of distinct ones grows slowly, some come twice in
#: a row, and the last is seen late; more than three passes.
DRAWN = [2, 2, 0, 4, 4, 3, 0, 2, 1, 1, 3, 0, 4, 2, 2, 1, 0, 3]
#: What each of these batches weighs: the last one is short.
WEIGHTS = [16.0, 16.0, 16.0, 16.0, 9.0]


class Quadratic:
    """Batch k has the loss sum(a_k / 2 * x^2 - c_k * x) over all parameters, and the gradients a_k * x - c_k.

    All numbers are float32 values, so that every precision starts from the same problem.
    """

    def __init__(self, batches: int, shapes: Sequence[Sequence[int]] = TRAINABLE, seed: int = 11) -> None:
        draw = np.random.default_rng(seed)

        def single(values: Any) -> np.ndarray:
            return np.asarray(values, dtype=np.float32).astype(np.float64)

        self.batches = batches
        self.start = [single(draw.normal(1.0, 1.0, shape)) for shape in shapes]
        self.a = [[single(draw.uniform(0.25, 1.5, shape)) for shape in shapes] for _ in range(batches)]
        self.c = [[single(draw.normal(0.5, 1.0, shape)) for shape in shapes] for _ in range(batches)]

    def gradients(self, step: int, x: Sequence[np.ndarray]) -> list[np.ndarray]:
        """In the precision of x."""
        k = step % self.batches
        return [a.astype(v.dtype) * v - c.astype(v.dtype) for a, c, v in zip(self.a[k], self.c[k], x)]

    def loss(self, step: int, x: Sequence[np.ndarray]) -> float:
        k = step % self.batches
        return sum(float(np.sum(a / 2 * v * v - c * v)) for a, c, v in zip(self.a[k], self.c[k], x))

    def parameters(self, dtype: str = "float32") -> list[paddle.Tensor]:
        """Dygraph parameters at the start."""
        params = [paddle.create_parameter(list(value.shape), dtype) for value in self.start]
        for param, value in zip(params, self.start):
            param.set_value(value.astype(dtype))
        return params

    def backward(self, step: int, params: Sequence[paddle.Tensor], among: Sequence[int] | None = None) -> float:
        """Put the gradients of all parameters, or of those numbered, into them; returns their part of the loss."""
        k = step % self.batches
        terms = []
        for i in range(len(params)) if among is None else among:
            p = params[i]
            a, c = (paddle.to_tensor(v.astype(dtype_name(p))) for v in (self.a[k][i], self.c[k][i]))
            terms.append(term(a, c, p))
        loss = paddle.add_n(terms)
        loss.backward()
        return loss.item()


def term(a: Any, c: Any, x: Any) -> Any:
    """One parameter's part of the loss, in dygraph and in static graphs."""
    return paddle.sum(0.5 * a * x * x - c * x)


def dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).rsplit(".", 1)[-1]


class Network(paddle.nn.Layer):
    """The problem as a layer, from the numbers of a batch, in one tensor, to its loss."""

    def __init__(self, problem: Quadratic) -> None:
        super().__init__()
        self.x = paddle.nn.ParameterList(
            [
                self.create_parameter(list(value.shape), default_initializer=paddle.nn.initializer.Assign(value))
                for value in problem.start
            ]
        )
        self.in_order = list(self.x)  # to_static of Paddle 3.0 cannot go through the ParameterList itself

    @staticmethod
    def numbers(problem: Quadratic, step: int) -> np.ndarray:
        k = step % problem.batches
        return np.array([np.concatenate([v.ravel() for v in part]) for part in (problem.a[k], problem.c[k])], "float32")

    def forward(self, numbers: Any) -> Any:
        terms, begin = [], 0
        for x in self.in_order:
            size = int(np.prod(x.shape))
            a, c = (paddle.reshape(numbers[row, begin : begin + size], list(x.shape)) for row in range(2))
            terms.append(term(a, c, x))
            begin += size
        return paddle.add_n(terms)


class StaticRun:
    """The problem as a program with its own scope and executor.

    Args:
        build: given the loss and the parameters, appends an optimizer, and returns what it likes (``self.built``).
    """

    def __init__(self, problem: Quadratic, build: Callable[[Any, list], Any], dtype: str = "float32") -> None:
        self.problem, self.dtype = problem, dtype
        self.main, self.startup, self.scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
        self.names = [f"x{i}" for i in range(len(problem.start))]
        with paddle.utils.unique_name.guard(), paddle.static.program_guard(self.main, self.startup):
            self.params = [
                paddle.create_parameter(
                    list(value.shape),
                    dtype,
                    name=name,
                    default_initializer=paddle.nn.initializer.Assign(value.astype(dtype)),
                )
                for name, value in zip(self.names, problem.start)
            ]
            fed = [
                [paddle.static.data(f"{kind}{i}", list(value.shape), dtype) for i, value in enumerate(problem.start)]
                for kind in "ac"
            ]
            self.loss = paddle.add_n([term(a, c, x) for a, c, x in zip(*fed, self.params)])
            self.built = build(self.loss, self.params)
        self.executor = paddle.static.Executor()
        with paddle.static.scope_guard(self.scope):
            self.executor.run(self.startup)

    def feed(self, step: int) -> dict[str, np.ndarray]:
        k = step % self.problem.batches
        numbers = {"a": self.problem.a[k], "c": self.problem.c[k]}
        return {f"{kind}{i}": v.astype(self.dtype) for kind, values in numbers.items() for i, v in enumerate(values)}

    def run(self, step: int, **options: Any) -> list:
        """One run; by default fetches the loss."""
        options.setdefault("fetch_list", [self.loss])
        feed = {**self.feed(step), **options.pop("more", {})}
        with paddle.static.scope_guard(self.scope):
            return self.executor.run(options.pop("program", self.main), feed=feed, **options)

    def tensor(self, name: str) -> Any:
        return self.scope.find_var(name).get_tensor()

    def array(self, name: str) -> np.ndarray:
        return np.array(self.tensor(name))

    def state(self, name: str, number: int = 0, kept: Sequence[str] = ("d", "y", "m")) -> dict[str, np.ndarray]:
        return {"x": self.array(name), **{s: self.array(f"{name}_{s}_{number}") for s in kept}}


def state_of(optimizer: Any, param: paddle.Tensor, kept: Sequence[str] = ("d", "y", "m")) -> dict[str, np.ndarray]:
    """Copies of x, and of what is kept of a parameter that has taken a step; x alone before."""
    pattern = re.compile(rf"{re.escape(param.name)}(_fp32_master_\d+)?(_.+)?_({'|'.join(kept)})_\d+")
    found = {"x": param.numpy().copy()}
    for key, value in optimizer.state_dict().items():
        match = pattern.fullmatch(key)
        if match:
            found[match[3]] = value.numpy().copy()
    return found


def bits(state: dict[str, np.ndarray]) -> dict[str, bytes]:
    """What two states must have in common to be the same to the last bit, NaN and the sign of zero included."""
    return {name: (str(v.dtype), v.shape, v.tobytes()) for name, v in state.items()}


def constant(value: float, dtype: str = "float32", shape: tuple = (1,)) -> Any:
    """A parameter whose elements all have one value."""
    return paddle.create_parameter(list(shape), dtype, default_initializer=paddle.nn.initializer.Constant(value))


def step_with(optimizer: Any, *grads: float) -> list[float]:
    """One step with a constant gradient for each parameter; returns the parameters' first elements."""
    for param, grad in zip(optimizer._parameter_list, grads):
        param.grad = paddle.full_like(param, grad).detach()
    optimizer.step()
    optimizer.clear_grad(False)
    return [param.astype("float32").flatten()[0].item() for param in optimizer._parameter_list]
