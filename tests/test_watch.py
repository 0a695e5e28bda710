# SPDX-License-Identifier: Apache-2.0
"""The watch: what variance_ratio is, when it warns and when not, and that it changes nothing. How the kernel samples is
tested in tests/native."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import paddle
import pytest
from least_squares import train
from problems import Quadratic, StaticRun, bits, state_of
from trial import Trial

from paddle_asgd import ASGD, FixedBatchSampler, SlotMismatchWarning
from paddle_asgd.sag.slots import BatchIndex
from paddle_asgd.sag.watch import ENTRIES, PASSES_KEPT, WATCH_SIZE, Watch

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


@pytest.mark.parametrize(("order", "earliest"), [(None, 10), ("sequential", 10), ("reshuffle", 10), ("replacement", 9)])
def test_wrong_slots_warn_once(order: str | None, earliest: int) -> None:
    """Eight passes are compared with the one before them. The first that counts is the first in which slots are met
    again: with replacement that is the first of all."""
    draw = np.random.default_rng(4)
    sampler = FixedBatchSampler(range(5), 1, order or "sequential", seed=0)
    indices = [index for epoch in range(20) for index in sampler.epoch_order(epoch)]
    fed = Fed()

    def step(k: int) -> None:
        fed.step(draw.normal(size=16), indices[k] if order else None)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(5 * earliest - 1):
            step(k)
    with WRONG as caught:
        step(5 * earliest - 1)
    assert caught[0].filename == __file__
    for k in range(5 * earliest, 100):
        step(k)
    assert fed.optimizer.variance_ratio > 1


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_right_slots_do_not_warn(noise: float) -> None:
    draw = np.random.default_rng(4)
    batches = draw.normal(size=(5, 16))
    fed = Fed()
    for step in range(250):
        fed.step(batches[step % 5] + noise * draw.normal(size=16))
    assert fed.optimizer.variance_ratio == pytest.approx(2 * noise**2, abs=0.15)


def at_rate_zero(problem: Quadratic, order: str, scheduled: bool, shift: int) -> float:
    """The ratio after ten passes at 0.1, five at 0 and the rest of those in progress; ``shift`` makes slots wrong."""
    params = problem.parameters("float64")
    rate = paddle.optimizer.lr.StepDecay(0.1, 100) if scheduled else 0.1
    optimizer = ASGD(rate, problem.batches, params)
    sampler = FixedBatchSampler(range(problem.batches), 1, order, seed=1)
    for epoch in range(15):
        if epoch == 10:
            if scheduled:
                optimizer.set_lr_scheduler(paddle.optimizer.lr.LambdaDecay(0.1, lambda _: 0.0))
            else:
                optimizer.set_lr(0)
        for position, batch in enumerate(sampler.epoch_order(epoch)):
            optimizer.batch_index = (position + shift * epoch) % problem.batches if shift else batch
            problem.backward(batch, params)
            optimizer.step()
            optimizer.clear_grad()
    return optimizer.variance_ratio


@pytest.mark.filterwarnings("ignore::paddle_asgd.SlotMismatchWarning")
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("order", ["sequential", "reshuffle", "replacement"])
def test_learning_rate_of_zero_tells_the_causes_apart(order: str, scheduled: bool) -> None:
    """What the warning advises: the ratio is then 0 if every slot has its batch, and stays high if not."""
    problem = Quadratic(batches=8, shapes=[[16]])
    assert at_rate_zero(problem, order, scheduled, 0) == 0
    assert at_rate_zero(problem, order, scheduled, 3) > 1


class Kernel:
    """What the kernel leaves at the end of each pass, as if it had sampled 7 elements, or none for a spread of NaN."""

    def __init__(self, passes: int = 0) -> None:
        self.values = np.zeros(WATCH_SIZE)
        self.values[PASSES] = passes

    def close(self, ratio: float, spread: float = 1.0) -> np.ndarray:
        begin = len(ENTRIES) + 3 * (int(self.values[PASSES]) % PASSES_KEPT)
        self.values[begin : begin + 3] = [0.0] * 3 if math.isnan(spread) else [7 * spread * ratio, 7 * spread, 7]
        self.values[PASSES] += 1
        return self.values.copy()


PASSES, REFUSALS, REFUSED_INDEX = (ENTRIES.index(name) for name in ("passes", "refusals", "refused_index"))
LARGE = [9.0] * 13


@pytest.mark.parametrize(
    ("ratios", "spreads"),
    [
        pytest.param(LARGE[:8], [1.0] * 8, id="the_first_passes"),
        pytest.param([1.16, 9.0] * 8, [1.0] * 16, id="every_other"),
        pytest.param([0.0, 0.0, 0.0, *[1.16] * 9], [1.0] * 12, id="below"),
        pytest.param([*[9.0] * 7, 0.0, 0.0], [1.0] * 9, id="not_in_the_last"),
        pytest.param([9.0] * 9, [*[1.0] * 8, math.nan], id="not_a_number_in_the_last"),
        pytest.param([9.0] * 9, [math.nan, *[1.0] * 8], id="no_slot_met_again_in_the_first"),
        pytest.param(LARGE, [0.49 ** (k / 8) for k in range(13)], id="falling"),
        pytest.param(LARGE, [*[1.0] * 8, *[0.49] * 5], id="falling_in_a_step"),
        pytest.param(LARGE[:10], [*[1.0] * 3, 0.49, *[1.0] * 6], id="low_once"),
        pytest.param(LARGE, [1.0] * 4 + [math.inf] * 9, id="infinite"),
    ],
)
def test_what_does_not_warn(ratios: list[float], spreads: list[float]) -> None:
    """Five passes of eight do, the last among them, each above 1.4 n / (n + 1), if the spread of all eight is above
    half of that of the pass before them."""
    watch, kernel = Watch(5, BatchIndex(5)), Kernel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ratio, spread in zip(ratios, spreads):
            values = kernel.close(ratio, spread)
            for _ in range(3):  # looking twice is not two passes
                watch.look(values)
        for ratio, spread in zip([0.0, 0.0, 0.0, 0.0, 1.17, 1.17, 1.17, 1.17], [1.0, 0.9, 0.8, 0.7, *[0.6] * 4]):
            watch.look(kernel.close(ratio, spread))
    with WRONG:
        watch.look(kernel.close(1.17, 0.51))


@pytest.mark.parametrize("looks", [1, 2, 13])
def test_whoever_looks_seldom_is_warned_all_the_same(looks: int) -> None:
    """A static graph's watch is looked at only when somebody asks, and a busy device's copy may come late."""
    watch, kernel = Watch(5, BatchIndex(5)), Kernel(passes=100)
    values = [kernel.close(9.0) for _ in range(13)]
    with WRONG:
        for value in values[-looks:]:
            watch.look(value)


def test_means_are_compared_where_counts_differ() -> None:
    """With replacement, few visits of the first passes are to slots seen before: sums would grow with their number."""
    watch, kernel = Watch(5, BatchIndex(5)), Kernel()
    kernel.close(9.0, 1.0)
    kernel.values[len(ENTRIES) : len(ENTRIES) + 3] /= 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spread in np.linspace(0.9, 0.4, 8):
            watch.look(kernel.close(9.0, spread))


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
        passes = optimizer._inputs.watch.tensor.numpy()[PASSES]
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
    for step in range(40):
        run.run(step)
        with paddle.static.scope_guard(run.scope):
            run.built.variance_ratio  # noqa: B018
    for step in range(40, 49):
        run.run(step)
    with paddle.static.scope_guard(run.scope):
        run.built.variance_ratio  # noqa: B018
        run.run(49)
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
    assert optimizer._inputs.watch.tensor.numpy()[PASSES] == 2
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
    numbers = dict(zip(ENTRIES, fed.optimizer._inputs.watch.tensor.numpy().tolist()))
    assert (numbers["steps"], numbers["passes"], numbers["sampled"]) == (0.0, 1.0, 0.0)


def test_an_overtaken_copy_of_a_device() -> None:
    """Somebody asked, and waited, for newer numbers than those that were on their way."""
    watch, kernel = Watch(5, BatchIndex(5)), Kernel(passes=2)
    older, old = kernel.close(8.0), kernel.close(9.0)
    refused = old.copy()
    refused[[ENTRIES.index("steps"), REFUSALS, REFUSED_INDEX]] = [3, 1, 40]
    with pytest.raises(ValueError, match="received 40"):
        watch.look(refused)
    assert watch.look(old) == 9.0  # an older copy, without the refusal
    assert watch.look(refused) == 9.0
    assert watch.look(older) == 9.0


def test_the_largest_group_is_watched() -> None:
    draw = np.random.default_rng(4)
    small, large = paddle.create_parameter([3], "float64"), paddle.create_parameter([16], "float64")
    optimizer = ASGD(0.0, 5, [{"params": [small]}, {"params": [large], "weight_decay": 0.1}])
    with WRONG:
        for _ in range(50):
            small.grad, large.grad = paddle.ones([3], "float64"), paddle.to_tensor(draw.normal(size=16))
            optimizer.step()


def test_one_that_changes_alone_is_infinite() -> None:
    """All stored gradients are alike, and equal to this one but for its own: nothing to divide by."""
    watch, kernel = Watch(5, BatchIndex(5)), Kernel()
    kernel.close(1.0)
    kernel.values[len(ENTRIES) : len(ENTRIES) + 3] = [2.0, 0.0, 7.0]
    assert watch.look(kernel.values) == math.inf


def test_an_index_that_a_device_has_refused() -> None:
    """As a GPU leaves it in the watch's numbers: the error comes with the end of the pass."""
    fed = Fed()
    fed.step(np.ones(16))
    values = fed.optimizer._inputs.watch.tensor.numpy()
    values[[REFUSALS, REFUSED_INDEX]] = [1, 40]
    fed.optimizer._inputs.watch.tensor.set_value(values)
    for _ in range(3):
        fed.step(np.ones(16))
    with pytest.raises(
        ValueError, match=r"batch_index: received 40 in an earlier step, expected 0 to 4.*changed nothing: 1"
    ):
        fed.step(np.ones(16))
    fed.step(np.ones(16))


@pytest.mark.parametrize(
    ("n", "noise", "order", "step", "passes"),
    [(8, 0.01, "reshuffle", 0.5, 12), (8, 0.01, "sequential", 0.5, 12), (13, 0.01, "replacement", 0.5, 12)],
)
def test_batches_that_are_much_alike_do_not_warn(n: int, noise: float, order: str, step: float, passes: int) -> None:
    """Right slots: in these runs the ratio exceeds its threshold in pass after pass, and nothing is wrong."""
    assert train(n, noise, order, step, 0, passes).warned_in is None


@pytest.mark.parametrize("n", [5, 8])
def test_shuffled_samples_warn(n: int) -> None:
    assert train(n, 0.1, "shuffled", 1.0, 0).warned_in is not None
