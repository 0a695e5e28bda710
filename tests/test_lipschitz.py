# SPDX-License-Identifier: Apache-2.0
"""The step size search against the rule written once more, in NumPy; parameters that come back to the bit.

What is refused is test_lipschitz_refusals.py's. Must not test the update (test_asgd.py) nor hold it (reference.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from paddle.regularizer import L1Decay, L2Decay
from problems import VERSION, Quadratic, bits, state_of, term
from reference import Sag
from refusing import INF, NAN, table
from test_half_precision import parameter, rounded, widened

from paddle_asgd import ASGD
from paddle_asgd.sag.lipschitz import LipschitzSearch


class Quadratics(Quadratic):
    """The common problem with its loss as a closure wants it."""

    def tensor_loss(self, step: int, params: Sequence[Any]) -> Any:
        k, wide = step % self.batches, "float64" if params[0].dtype == paddle.float64 else "float32"
        a, c = ([paddle.to_tensor(v.astype(wide)) for v in values[k]] for values in (self.a, self.c))
        return paddle.add_n([term(*numbers, p.astype(wide)) for *numbers, p in zip(a, c, params)])


class Logistic:
    """Batches of unequal size, of the loss log(1 + exp(-z)) in z = (w . sample + b) * label."""

    batches = 5

    def __init__(self) -> None:
        draw = np.random.default_rng(3)
        self.start = [draw.normal(size=[3]), np.array([0.25])]
        self.samples = [2 * draw.normal(size=[rows, 3]) for rows in (4, 7, 2, 5, 9)]
        self.labels = [np.sign(s @ [1.0, -2.0, 0.5] + draw.normal(size=len(s))) for s in self.samples]

    def loss(self, step: int, x: Sequence[np.ndarray]) -> float:
        k = step % self.batches
        return np.logaddexp(0, -self.labels[k] * (self.samples[k] @ x[0] + x[1])).mean()

    def gradients(self, step: int, x: Sequence[np.ndarray]) -> list[np.ndarray]:
        samples, labels = self.samples[step % self.batches], self.labels[step % self.batches]
        slopes = -labels / (1 + np.exp(labels * (samples @ x[0] + x[1]))) / len(labels)
        return [samples.T @ slopes, slopes.sum(keepdims=True)]

    def tensor_loss(self, step: int, params: Sequence[Any]) -> Any:
        samples, labels = (paddle.to_tensor(v[step % self.batches]) for v in (self.samples, self.labels))
        return paddle.log1p(paddle.exp(-labels * (paddle.mv(samples, params[0]) + params[1]))).mean()


PROBLEMS = {"quadratic": lambda: Quadratics(3, [[257], [], [3, 2]]), "logistic": Logistic}


class Rule:
    """Section 4.6 of the paper, with the factor; counts the losses that it asked for."""

    def __init__(self, lipschitz: float, factor: float, n: int) -> None:
        self.lipschitz, self.factor, self.n, self.calls, self.doublings = lipschitz, factor, n, 0, 0

    def rate(self, loss: Callable, x: Sequence[np.ndarray], g: Sequence[np.ndarray], decay: float) -> float:
        squared = sum(np.sum(v**2) for v in g)
        self.calls += 1
        if squared > 1e-8:
            while True:
                self.calls += 1
                if loss([a - b / self.lipschitz for a, b in zip(x, g)]) <= loss(x) - squared / (2 * self.lipschitz):
                    break
                self.lipschitz *= 2
                self.doublings += 1
        rate = self.factor / (self.lipschitz + decay)
        self.lipschitz *= 2 ** (-1 / self.n)
        return rate


def tensors(problem: Any, dtype: str = "float64") -> list:
    return [paddle.to_tensor(v.astype(dtype), stop_gradient=False) for v in problem.start]


def counted(problem: Any, step: int, params: Sequence[Any], calls: list) -> Callable:
    def closure() -> Any:
        calls.append([p.astype("float32").numpy() if p.dtype == paddle.bfloat16 else p.numpy() for p in params])
        return problem.tensor_loss(step, params)

    return closure


# ---- The rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("indexed", [True, False], ids=["random", "cyclic"])
@pytest.mark.parametrize(("initial", "factor"), [(1 / 64, 0.25), (300.0, 0.5)], ids=["too_small", "too_large"])
def test_rule(make: Callable, initial: float, factor: float, indexed: bool) -> None:
    """L, learning rate, losses and parameters of every step, in float64, with groups of different rates and decays."""
    problem, multipliers = make(), (0.5, 1.0, 0.75)
    params, n = tensors(problem), problem.batches
    decays = (0.01, 0.375, 0.0)[: len(params)]
    groups = [{"params": [p], "learning_rate": r, "weight_decay": c} for p, r, c in zip(params, multipliers, decays)]
    optimizer = ASGD(7.0, n, groups)
    search = LipschitzSearch(optimizer, initial, factor)
    sag, rule, calls = Sag(problem.start, n, decays), Rule(initial, factor, n), []
    order = np.random.default_rng(1).integers(0, n, 4 * n + 1) if indexed else np.arange(4 * n + 1)
    for step in map(int, order):
        if indexed:
            optimizer.batch_index = step
        expected_loss, g = problem.loss(step, sag.x), problem.gradients(step, sag.x)
        rate = rule.rate(lambda x, step=step: problem.loss(step, x), sag.x, g, max(decays))
        sag.step(g, [rate * m for m in multipliers[: len(params)]], step if indexed else None)
        loss = search.step(counted(problem, step, params, calls))
        assert loss.stop_gradient
        # Rounding of a few thousand float64 numbers; a doubling too many or too few is a factor of 2.
        np.testing.assert_allclose(loss.item(), expected_loss, rtol=1e-11)
        np.testing.assert_allclose(search.lipschitz, rule.lipschitz, rtol=1e-12)
        np.testing.assert_allclose(optimizer.get_lr(), rate, rtol=1e-12)
        for p, param in enumerate(params):
            sag.check(p, state_of(optimizer, param), 1e-11)
    # And once more for every tenth doubling, where the step began.
    assert len(calls) == rule.calls + rule.doublings // 10


@pytest.mark.parametrize(("x", "calls"), [(0.99e-4, 1), (1.01e-4, 2)], ids=["below", "above"])
def test_small_gradients_are_not_searched(x: float, calls: int) -> None:
    param, seen = paddle.to_tensor([x], dtype="float64", stop_gradient=False), []
    search = LipschitzSearch(ASGD(0.1, 3, [param]), initial=1.5)
    search.step(lambda: seen.append(0) or (param * param).sum() * 0.5)
    assert len(seen) == calls
    np.testing.assert_allclose(search.lipschitz, 1.5 / 2 ** (1 / 3), rtol=1e-15)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF], ids=repr)
def test_losses_that_are_not_finite_violate(wrong: float) -> None:
    """sqrt(x) has no value left of 0, where large steps lead; -inf looks like a decrease."""
    param = paddle.to_tensor([1.0], dtype="float64", stop_gradient=False)

    def closure() -> Any:
        return paddle.sqrt(param).sum() if param.item() > 0 else paddle.to_tensor(wrong, dtype="float64")

    search = LipschitzSearch(ASGD(0.1, 3, [param]), initial=1 / 16)
    search.step(closure)
    # g = 1/2: up to L = 1/2 the points 1 - g / L are not above 0; at L = 1 the loss falls by enough.
    np.testing.assert_allclose(search.lipschitz * 2 ** (1 / 3), 1.0, rtol=1e-15)


def test_estimate_has_a_floor() -> None:
    """No gradient, no violation: for ever halved, 1 / L would be inf in float32, and inf times 0 NaN."""
    param = paddle.to_tensor([1.0, 2.0], stop_gradient=False)
    search = LipschitzSearch(ASGD(0.1, 3, [param]), initial=2.0**-99.9)
    for _ in range(4):
        search.step(lambda: (param * 0.0).sum())
    assert search.lipschitz == 2.0**-100
    assert param.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("dtype", "offset", "scale"), [("float64", -1000.0, 0.01), ("bfloat16", 3.0, 0.25)], ids=["loss", "parameters"]
)
def test_rounding_is_no_violation(dtype: str, offset: float, scale: float) -> None:
    """The decrease is lost beside the offset, or with the parameters' last bits."""
    param = parameter([scale, 1.0], dtype) if dtype == "bfloat16" else paddle.to_tensor([scale, 1.0], dtype=dtype)
    param.stop_gradient = False
    seen: list = []

    def closure() -> Any:
        seen.append(0)
        x = param.astype("float32")
        return x[0] * x[0] / 2 + offset if len(seen) == 1 else paddle.to_tensor(offset + scale**2 / 2)

    search = LipschitzSearch(ASGD(0.1, 3, [param], multi_precision=True), initial=2.0)
    search.step(closure)
    assert len(seen) == 2
    assert search.lipschitz < 2.0


@pytest.mark.parametrize("times", [0.5, 2])
@pytest.mark.parametrize(
    ("dtype", "of_loss", "epsilon"),
    [
        ("float64", "float64", 2.0**-52),
        ("float32", "float32", 2.0**-23),
        ("float64", "float32", 2.0**-23),
        ("float16", "float32", 2.0**-10),
        ("bfloat16", "float32", 2.0**-7),
    ],
)
def test_rounding_that_is_allowed_for(dtype: str, of_loss: str, epsilon: float, times: float) -> None:
    """Four times the coarser epsilon, relative to the loss: half of that is no violation, and twice that is one."""
    param = parameter([1.0], dtype) if dtype in ("float16", "bfloat16") else paddle.to_tensor([1.0], dtype=dtype)
    param.stop_gradient = False
    # The loss is 1 and the gradient 1/2, and at L = 2 the loss has to fall by 1/16.
    tried = iter([1 - 1 / 16 + times * 4 * epsilon, 0.0])
    seen: list = []

    def closure() -> Any:
        seen.append(0)
        if len(seen) == 1:
            return param.astype(of_loss).sum() / 2 + 0.5
        return paddle.to_tensor(next(tried), dtype=of_loss)

    search = LipschitzSearch(ASGD(0.1, 3, [param], multi_precision=True), initial=2.0)
    search.step(closure)
    assert len(seen) == (2 if times < 1 else 3)
    np.testing.assert_allclose(search.lipschitz * 2 ** (1 / 3), 2.0 if times < 1 else 4.0, rtol=1e-14)


FROZEN = "frozen"
DECAYS: dict[str, tuple] = {
    "none": ({}, {}, 0.0),
    "number": ({"weight_decay": 0.25}, {}, 0.25),
    "tensor": ({"weight_decay": [0.25]}, {}, 0.25),
    "L2Decay": ({"weight_decay": L2Decay(0.25)}, {}, 0.25),
    "L1Decay": ({"weight_decay": L1Decay(0.25)}, {}, 0.0),
    "group_above": ({"weight_decay": 0.25}, {"weight_decay": 0.5}, 0.5),
    "group_below": ({"weight_decay": 0.25}, {"weight_decay": 0.125}, 0.25),
    "group_L2Decay": ({"weight_decay": 0.25}, {"weight_decay": L2Decay(0.5)}, 0.5),
    "of_frozen": ({"weight_decay": 0.25}, {"weight_decay": 0.5, FROZEN: True}, 0.25),
}


@table(DECAYS)
def test_decay_that_is_added(row: tuple) -> None:
    options, group, expected = row
    problem = Quadratics(3, [[5], [2]])
    params = tensors(problem)
    params[1].stop_gradient = group.get(FROZEN, False)
    options = {key: paddle.to_tensor(value) if isinstance(value, list) else value for key, value in options.items()}
    groups = [{"params": params[:1]}, {"params": params[1:], **{k: v for k, v in group.items() if k != FROZEN}}]
    optimizer = ASGD(0.1, 3, groups, **options)
    search = LipschitzSearch(optimizer, initial=4.0, factor=0.75)
    search.step(lambda: problem.tensor_loss(0, params))
    assert optimizer.get_lr() == pytest.approx(0.75 / (4.0 + expected), rel=1e-15)


@pytest.mark.parametrize("initial", [1e-3, 1.0, 1e3], ids=repr)
def test_no_tuning(initial: float) -> None:
    """breast_cancer in 35 fixed batches of 16, in order: whatever the start, near the optimum within 30 passes."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    samples, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(samples))[:560]
    samples = np.hstack([StandardScaler().fit_transform(samples[order]), np.ones([560, 1])])
    labels = 2.0 * labels[order] - 1

    def excess(w: np.ndarray) -> float:
        return np.logaddexp(0, -labels * (samples @ w)).mean() + 0.005 * (w @ w) - smallest

    smallest = 0.0
    model = LogisticRegression(C=1 / 5.6, fit_intercept=False, solver="newton-cholesky", tol=1e-12)
    smallest = excess(model.fit(samples, labels).coef_[0])
    batches = [(paddle.to_tensor(samples[i : i + 16]), paddle.to_tensor(labels[i : i + 16])) for i in range(0, 560, 16)]

    def train(searched: bool) -> float:
        w = paddle.zeros([31], "float64")
        w.stop_gradient = False
        optimizer = ASGD(0.01, 35, [w], weight_decay=0.01)
        search = LipschitzSearch(optimizer, initial, factor=0.25)
        for x, y in batches * 30:

            def closure(x: Any = x, y: Any = y) -> Any:
                return paddle.nn.functional.softplus(-y * paddle.mv(x, w)).mean()

            if searched:
                search.step(closure)
            else:
                closure().backward()
                optimizer.step()
                optimizer.clear_grad()
        return excess(w.numpy())

    # Measured: 2e-6 to 6e-6, and 1.6e-2 with a fixed rate of ten times the default.
    assert train(searched=True) < 1e-4 < 1e-2 < train(searched=False)


# ---- What it leaves behind -------------------------------------------------------------------------------------------

DTYPES = ("float64", "float32", "bfloat16", "float16")


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Paddle's own rounding, which is to nearest even; before 3.2 it cuts float16 off, and in 2.6 bfloat16, too."""
    result = paddle.to_tensor(np.asarray(values, dtype=np.float32)).astype(dtype).numpy()
    assert VERSION < (3, 2) or (result == rounded(values, dtype)).all()
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_points_that_are_tried(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x - g / L, rounded once to the parameter's dtype; and x again, to the bit, before the optimizer sees it."""
    problem = Quadratics(3, [[257], [3, 2]])
    problem.start[0][:3] = -0.0, 1e-7, -3e-8  # the sign of zero, and what is subnormal in float16
    half = dtype in ("bfloat16", "float16")
    params = [parameter(v, dtype) for v in problem.start] if half else tensors(problem, dtype)
    optimizer, calls, before = ASGD(0.1, 3, params, multi_precision=True), [], []
    original, start = optimizer.step, [p.numpy() for p in params]
    monkeypatch.setattr(optimizer, "step", lambda: before.append([p.numpy() for p in params]) or original())

    def closure() -> Any:
        calls.append([p.numpy() for p in params])
        return problem.tensor_loss(0, params)

    LipschitzSearch(optimizer, initial=0.3).step(closure)
    assert len(calls) > 3
    wide = [widened(x) if half else x for x in start]
    for i, tried in enumerate(calls[1:]):
        lipschitz = 0.3 * 2**i
        for point, x, g in zip(tried, wide, problem.gradients(0, wide)):
            if half:
                expected = cast(x - widened(cast(g, dtype)) / lipschitz, dtype)
                # All but those next to a tie, on which float32 decides otherwise.
                assert (point != expected).mean() < 0.05
                bound = {"float16": 2**-9, "bfloat16": 2**-6}[dtype] * (np.abs(x) + np.abs(g / lipschitz))
                assert (np.abs(widened(point) - widened(expected)) <= bound + 2**-24).all()
            else:
                rounding = 4 * np.finfo(dtype).eps
                np.testing.assert_allclose(point, x - g / lipschitz, rtol=rounding, atol=20 * rounding)
    assert bits(dict(enumerate(before[0]))) == bits(dict(enumerate(start)))
    assert bits(dict(enumerate(p.numpy() for p in params))) != bits(dict(enumerate(start)))


class Run:
    """A training with the search, in float32, with state."""

    def __init__(self, steps: int = 0) -> None:
        self.problem = Quadratics(3, [[257], [3, 2]])
        self.params = tensors(self.problem, "float32")
        self.optimizer = ASGD(0.1, 3, self.params, weight_decay=0.25)
        self.search = LipschitzSearch(self.optimizer, initial=1 / 16, factor=0.25)
        self.train(range(steps))

    def train(self, steps: Sequence[int]) -> None:
        for step in steps:
            self.search.step(lambda step=step: self.problem.tensor_loss(step, self.params))

    def content(self) -> list:
        return [self.search.lipschitz, *(bits(state_of(self.optimizer, p)) for p in self.params)]


class Stop(BaseException):
    """Such as KeyboardInterrupt."""


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("steps", [0, 4])
def test_closure_that_raises(at: int, error: type, steps: int) -> None:
    """Nothing has changed, and what follows is as if the call had never been."""
    run, calls = Run(steps), []
    run.search.set_state_dict({"lipschitz": 1 / 16})
    before = run.content()

    def closure() -> Any:
        calls.append(0)
        if len(calls) == at:
            raise error("closure")
        return run.problem.tensor_loss(steps, run.params)

    with pytest.raises(error, match="closure"):
        run.search.step(closure)
    assert len(calls) == at
    assert run.content() == before
    assert [p.grad is None or not p.grad.any().item() for p in run.params] == [True, True]
    other = Run(steps)
    other.search.set_state_dict({"lipschitz": 1 / 16})
    for each in (run, other):
        each.train(range(steps, steps + 4))
    assert run.content() == other.content()


def test_gradients_that_were_there_are_dropped() -> None:
    run, other = Run(2), Run(2)
    run.problem.backward(7, run.params)
    for each in (run, other):
        with paddle.no_grad():
            each.train(range(2, 6))
    assert run.content() == other.content()


def test_parameters_without_gradient_stay() -> None:
    """The batch does not reach the second, and the third is frozen."""
    params = tensors(Quadratics(3, [[5], [4], [3]]))
    (params[2].sum() * 10).backward()  # left over from before it was frozen
    params[2].stop_gradient = True
    start = [p.numpy() for p in params]
    search = LipschitzSearch(ASGD(0.1, 3, params, weight_decay=0.25), initial=3 / 64)
    search.step(lambda: (params[0] * params[0]).sum() + params[2].sum() * 10)
    # The curvature is 2, and the first of 3/64, 3/32, ... that is not below it is 3.
    np.testing.assert_allclose(search.lipschitz * 2 ** (1 / 3), 3.0, rtol=1e-14)
    assert [bool((p.numpy() == x).all()) for p, x in zip(params, start)] == [False, True, True]


@pytest.mark.parametrize("fails", [False, True], ids=["", "after_a_failure"])
def test_batches_that_do_not_reach_a_parameter_take_their_slots(fails: bool) -> None:
    """As in any loop with clear_grad(), whose zeros are gradients: the parameter's slots keep to the batches."""
    params = tensors(Quadratics(3, [[5], [4]]))
    optimizer = ASGD(0.1, 3, params)
    search = LipschitzSearch(optimizer, initial=4.0)
    factors = (2.0, 0.0, 3.0)
    gradients = []
    for step in range(8):
        factor = factors[step % 3]

        def closure(factor: float = factor) -> Any:
            loss = (params[0] * params[0]).sum()
            return loss if factor == 0.0 else loss + factor * (params[1] * params[1]).sum() / 8

        if fails and step == 4:
            with pytest.raises(TypeError):
                search.step(lambda: None)
        gradients.append(factor * params[1].numpy() / 4)
        search.step(closure)
    state = state_of(optimizer, params[1])
    assert state["m"].tolist() == [8]
    np.testing.assert_allclose(state["y"], np.array([gradients[6], gradients[7], gradients[5]]), rtol=1e-14)


def test_lasting_search_is_checked() -> None:
    """Ten doublings over several steps call for the loss once more; it is the same, and nothing else changes."""
    param, points = paddle.to_tensor([1.0, -2.0], dtype="float64", stop_gradient=False), []
    search = LipschitzSearch(ASGD(0.1, 3, [param]), initial=1.0)

    def closure(curvature: float) -> Any:
        points.append(param.tolist())
        return curvature / 2 * (param * param).sum()

    counts, again = [], []
    for curvature in (192.0, 768.0, 3072.0, 12288.0, 49152.0, 196608.0, 786432.0):
        search.set_state_dict({"lipschitz": curvature / 6})
        points.clear()
        start = param.tolist()
        search.step(lambda curvature=curvature: closure(curvature))
        counts.append(len(points))
        again.append(points[1:].count(start))
        assert search.lipschitz == pytest.approx(curvature * 4 / 3 / 2 ** (1 / 3), rel=1e-14)
    # A gradient, three doublings and the point that is taken; after the 10th and the 20th once more, at the start.
    assert counts == [5, 5, 5, 6, 5, 5, 6]
    assert again == [0, 0, 0, 1, 0, 0, 1]


def test_sparse_gradients() -> None:
    """Rows that come twice are added up, as in the dense gradient."""
    found = []
    for sparse in (True, False):
        paddle.seed(3)
        table = paddle.nn.Embedding(7, 3, sparse=sparse)
        optimizer = ASGD(0.1, 3, table.parameters())
        search = LipschitzSearch(optimizer, initial=1 / 16)
        rows = paddle.to_tensor([1, 4, 1])
        for _ in range(4):
            search.step(lambda rows=rows, table=table: (table(rows) ** 2).sum())
        found.append((search.lipschitz, table.weight.numpy().tolist()))
    assert found[0] == found[1]


def test_resume(tmp_path: Path) -> None:
    """Through files, in the middle of a pass, to the bit."""
    straight, first, second = Run(11), Run(5), Run()
    for name, part in {"optimizer": first.optimizer, "search": first.search}.items():
        paddle.save(part.state_dict(), str(tmp_path / name))
    for param, saved in zip(second.params, first.params):
        param.set_value(saved)
    second.optimizer.set_state_dict(renamed(paddle.load(str(tmp_path / "optimizer")), first.params, second.params))
    second.search.set_state_dict(paddle.load(str(tmp_path / "search")))
    second.train(range(5, 11))
    assert second.content() == straight.content()
    assert second.optimizer.get_lr() == straight.optimizer.get_lr()


def renamed(state: dict, old: Sequence[Any], new: Sequence[Any]) -> dict:
    names = {a.name: b.name for a, b in zip(old, new)}
    return {next((names[n] + k[len(n) :] for n in names if k.startswith(n + "_")), k): v for k, v in state.items()}
