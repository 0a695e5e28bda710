"""The watch: what variance_ratio is, when it warns and when not, and that it changes nothing. How the kernel samples is
tested in tests/native."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import paddle
import pytest
from problems import Quadratic, StaticRun, bits, state_of
from trial import Trial

from paddle_asgd import ASGD, SlotMismatchWarning
from paddle_asgd.sag.slots import BatchIndex
from paddle_asgd.sag.watch import Watch

WRONG = pytest.warns(SlotMismatchWarning, match="batch_num=5 is not the number of batches")


class Fed:
    """An optimizer of one small parameter, all of whose elements are sampled, that is given its gradients."""

    def __init__(self, n: int = 5, **options: Any) -> None:
        self.param = paddle.create_parameter([16], "float64")
        self.optimizer = ASGD(0.0, n, [self.param], **options)

    def step(self, grad: np.ndarray, index: int | None = None) -> None:
        if index is not None:
            self.optimizer.batch_index = index
        self.param.grad = paddle.to_tensor(grad)
        self.optimizer.step()


def ratio_of(grads: list[np.ndarray], indices: list[int], n: int, begin: int) -> float:
    """Over the steps from ``begin`` on: sum |g - y_i|^2 / sum |g - mean of the slots seen|^2, first visits left out."""
    stored: dict[int, np.ndarray] = {}
    replaced = centred = 0.0
    for step, (g, i) in enumerate(zip(grads, indices)):
        if step >= begin and i in stored:
            replaced += np.sum((g - stored[i]) ** 2)
            centred += np.sum((g - np.mean(list(stored.values()), axis=0)) ** 2)
        stored[i] = g
    return replaced / centred


@pytest.mark.parametrize("indexed", [True, False], ids=["replacement", "cyclic"])
def test_ratio(indexed: bool) -> None:
    """Of the last whole pass; visits to slots never seen before do not count."""
    draw = np.random.default_rng(4)
    fed, grads, indices = Fed(watch=True), [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlotMismatchWarning)
        for step in range(32):
            indices.append(int(draw.integers(0, 5)) if indexed else step % 5)
            grads.append(draw.normal(1.0, 1.0, 16) + indices[-1])
            fed.step(grads[-1], indices[-1] if indexed else None)
            whole = (step + 1) // 5 * 5
            if whole >= 10:
                expected = ratio_of(grads[:whole], indices[:whole], 5, whole - 5)
                assert fed.optimizer.variance_ratio == pytest.approx(expected, rel=1e-12)
            elif whole == 0 or not indexed:
                assert fed.optimizer.variance_ratio is None


def test_wrong_slots_warn_once_within_five_passes() -> None:
    draw = np.random.default_rng(4)
    fed = Fed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5 * 5 - 1):
            fed.step(draw.normal(size=16))
    with WRONG as caught:
        fed.step(draw.normal(size=16))
    assert caught[0].filename == __file__
    for _ in range(50):
        fed.step(draw.normal(size=16))
    assert fed.optimizer.variance_ratio > 1


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_right_slots_do_not_warn(noise: float) -> None:
    draw = np.random.default_rng(4)
    batches = draw.normal(size=(5, 16))
    fed = Fed()
    for step in range(250):
        fed.step(batches[step % 5] + noise * draw.normal(size=16))
    assert fed.optimizer.variance_ratio == pytest.approx(2 * noise**2, abs=0.15)


def found(passes: int, ratio: float) -> np.ndarray:
    """What the kernel leaves at the end of a pass."""
    return np.array([0.0, 0.0, 0.0, ratio, 1.0, passes, 0.0, 0.0])


@pytest.mark.parametrize(
    "ratios",
    [
        pytest.param([9.0, 9.0, 9.0], id="the_first_three_passes"),
        pytest.param([9.0, 9.0, 9.0, 9.0, 1.16, 9.0, 1.16], id="every_other"),
        pytest.param([0.0, 0.0, 0.0, 1.16, 1.16, 1.16], id="below"),
        pytest.param([0.0, 0.0, 0.0, 9.0, math.nan, 9.0], id="not_a_number_between"),
    ],
)
def test_what_does_not_warn(ratios: list[float]) -> None:
    """Two passes in a row do, each above 1.4 n / (n + 1); and looking twice is not two passes."""
    watch = Watch(5, BatchIndex(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for passes, ratio in enumerate(ratios, start=1):
            for _ in range(3):
                watch.look(found(passes, ratio))
    with WRONG:
        for passes in (20, 21):
            watch.look(found(passes, 1.17))


def test_what_is_not_finite_does_not_warn() -> None:
    fed = Fed()
    for _ in range(60):
        fed.step(np.full(16, np.nan))
    assert fed.optimizer.variance_ratio is None


def test_one_batch_has_nothing_to_compare() -> None:
    draw = np.random.default_rng(4)
    fed = Fed(n=1)
    for _ in range(20):
        fed.step(draw.normal(size=16))
    assert fed.optimizer.variance_ratio is None


def test_equal_batches() -> None:
    """Gradients that never change: no ratio of nothing to nothing. One that changes alone: infinite."""
    fed = Fed(n=2)
    for _ in range(6):
        fed.step(np.ones(16))
    assert fed.optimizer.variance_ratio is None


def test_off() -> None:
    draw = np.random.default_rng(4)
    fed = Fed(watch=False)
    for _ in range(60):
        fed.step(draw.normal(size=16))
    assert fed.optimizer.variance_ratio is None
    assert "watch" not in fed.optimizer._accumulators


def test_it_changes_nothing() -> None:
    watched, other = Trial(n=5, dtype="float32"), Trial(n=5, dtype="float32", watch=False)
    for _ in range(17):
        watched.step()
        other.step()
    for left, right in zip(watched.params, other.params):
        assert bits(state_of(watched.optimizer, left)) == bits(state_of(other.optimizer, right))
    assert {k.split("_")[-2] for k in watched.optimizer.state_dict() if "_" in k} == {
        k.split("_")[-2] for k in other.optimizer.state_dict() if "_" in k
    }


def test_a_step_of_two_calls_counts_once() -> None:
    draw = np.random.default_rng(4)
    params = [paddle.create_parameter([16], "float64") for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}]
    optimizer = ASGD(0.0, 5, groups)
    batches = draw.normal(size=(5, 16))
    for step in range(12):
        for param in params:
            param.grad = paddle.to_tensor(batches[step % 5])
        optimizer.step()
        passes = optimizer._inputs.watch.tensor.numpy()[5]
        assert passes == (step + 1) // 5


@pytest.mark.usefixtures("static_mode")
def test_static() -> None:
    """No Python runs in a step, so the warning comes when somebody asks."""

    def build(loss: Any, params: list) -> Any:
        optimizer = ASGD(0.0, 5, watch=True)
        optimizer.minimize(loss)
        return optimizer

    run = StaticRun(Quadratic(batches=7), build)
    with paddle.static.scope_guard(run.scope):
        assert run.built.variance_ratio is None
    for step in range(20):
        run.run(step)
        with paddle.static.scope_guard(run.scope):
            run.built.variance_ratio  # noqa: B018
    for step in range(20, 24):
        run.run(step)
    with paddle.static.scope_guard(run.scope):
        run.built.variance_ratio  # noqa: B018
        run.run(24)
        with WRONG:
            assert run.built.variance_ratio > 1


@pytest.mark.usefixtures("static_mode")
def test_static_without_being_asked() -> None:
    """Files of Paddle's own optimizer hold no such variable, and paddle.static.load demands every one."""

    def build(loss: Any, params: list) -> Any:
        optimizer = ASGD(0.0, 5)
        optimizer.minimize(loss)
        return optimizer

    run = StaticRun(Quadratic(batches=7), build)
    run.run(0)
    assert run.built.variance_ratio is None
    assert "watch" not in run.built._accumulators


def test_sparse_gradients_are_watched() -> None:
    """Whichever way a step goes; the kernel compares the rows with what they replace."""
    draw = np.random.default_rng(4)
    table = paddle.nn.Embedding(4, 4, sparse=True)
    optimizer = ASGD(0.0, 5, table.parameters())
    for _ in range(11):
        (table(paddle.arange(4)) * paddle.to_tensor(draw.normal(size=(4, 4)), "float32")).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    assert optimizer._inputs.watch.tensor.numpy()[5] == 2
    assert optimizer.variance_ratio > 1


def test_a_refused_step_is_not_counted() -> None:
    fed = Fed()
    for _ in range(3):
        fed.step(np.ones(16))
    fed.param.clear_gradient(False)
    with pytest.raises(ValueError, match="shape of gradient"):
        fed.optimizer.apply_gradients([(fed.param, paddle.ones([3], "float64"))])
    for _ in range(2):
        fed.step(np.ones(16))
    assert fed.optimizer._inputs.watch.tensor.numpy()[2:6].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_an_overtaken_copy_of_a_device() -> None:
    """Somebody asked, and waited, for newer numbers than those that were on their way."""
    watch = Watch(5, BatchIndex(5))
    refused = found(4, 9.0)
    refused[[2, 6, 7]] = [3, 1, 40]
    with pytest.raises(ValueError, match="received 40"):
        watch.look(refused)
    assert watch.look(found(4, 9.0)) == 9.0  # an older copy, without the refusal
    assert watch.look(refused) == 9.0
    assert watch.look(found(3, 8.0)) == 9.0


def test_the_largest_group_is_watched() -> None:
    draw = np.random.default_rng(4)
    small, large = paddle.create_parameter([3], "float64"), paddle.create_parameter([16], "float64")
    optimizer = ASGD(0.0, 5, [{"params": [small]}, {"params": [large], "weight_decay": 0.1}])
    with WRONG:
        for _ in range(25):
            small.grad, large.grad = paddle.ones([3], "float64"), paddle.to_tensor(draw.normal(size=16))
            optimizer.step()


def test_one_that_changes_alone_is_infinite() -> None:
    """All stored gradients are alike, and equal to this one but for its own: nothing to divide by."""
    watch = Watch(5, BatchIndex(5))
    assert watch.look(np.array([0.0, 0.0, 0.0, 2.0, 0.0, 4.0, 0.0, 0.0])) == math.inf


def test_an_index_that_a_device_has_refused() -> None:
    """As a GPU leaves it in the watch's numbers: the error comes with the end of the pass."""
    fed = Fed()
    fed.step(np.ones(16))
    values = fed.optimizer._inputs.watch.tensor.numpy()
    values[6:] = [1, 40]
    fed.optimizer._inputs.watch.tensor.set_value(values)
    for _ in range(3):
        fed.step(np.ones(16))
    with pytest.raises(
        ValueError, match=r"batch_index: received 40 in an earlier step, expected 0 to 4.*changed nothing: 1"
    ):
        fed.step(np.ones(16))
    fed.step(np.ones(16))
