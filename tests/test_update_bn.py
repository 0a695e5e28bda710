# SPDX-License-Identifier: Apache-2.0
"""update_bn: the statistics of all batches, and a model that is otherwise as it was, however it ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from paddle import nn

import paddle_asgd
from paddle_asgd import update_bn

# What batch normalisation of Paddle says in every training step.
pytestmark = pytest.mark.filterwarnings("ignore:When training, we now always track")

#: Of unequal size: the last batch of a loader is.
SIZES = (8, 8, 8, 3)


def model_of(kind: Any = nn.BatchNorm1D, **options: Any) -> nn.Sequential:
    """Trained a little, so that its statistics are neither those of the batches nor those of the beginning."""
    model = nn.Sequential(nn.Linear(3, 4), kind(4, **options), nn.Dropout(0.5), nn.Linear(4, 2))
    for _ in range(3):
        model(paddle.randn([8, 3]))
    return model


def batches() -> list[paddle.Tensor]:
    draw = np.random.RandomState(2)
    return [paddle.to_tensor((3 * draw.standard_normal((size, 3)) + 1).astype("float32")) for size in SIZES]


def expected(model: nn.Sequential) -> tuple[np.ndarray, np.ndarray]:
    """In float64: the mean over all samples, and that of the batches' biased variances, by their samples."""
    weight, bias = (p.numpy().astype("float64") for p in (model[0].weight, model[0].bias))
    inputs = [batch.numpy().astype("float64") @ weight + bias for batch in batches()]
    return np.concatenate(inputs).mean(axis=0), np.average([x.var(axis=0) for x in inputs], axis=0, weights=SIZES)


def statistics(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    return layer._mean.numpy(), layer._variance.numpy()


def everything(model: Any) -> list[Any]:
    """What must not change: modes, momenta, hooks, and all numbers."""
    layers = model.sublayers(include_self=True)
    state = [value.numpy().tobytes() for value in model.state_dict().values()]
    hooks = [(len(layer._forward_post_hooks), len(layer._forward_pre_hooks)) for layer in layers]
    return [[layer.training for layer in layers], [getattr(layer, "_momentum", None) for layer in layers], hooks, state]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1D, nn.BatchNorm], ids=["BatchNorm1D", "BatchNorm"])
def test_statistics_of_all_batches(kind: Any, mode: str) -> None:
    model = model_of(kind, momentum=0.3)
    getattr(model, mode)()
    before = everything(model)
    update_bn(batches(), model)
    for ours, exact in zip(statistics(model[1]), expected(model)):
        np.testing.assert_allclose(ours, exact, rtol=3e-6)
    assert everything(model)[:3] == before[:3]
    assert model[1]._momentum == 0.3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_former_statistics_have_no_part(bad: float) -> None:
    model = model_of()
    for tensor in (model[1]._mean, model[1]._variance):
        tensor.set_value(paddle.full([4], bad))
    update_bn(batches(), model)
    np.testing.assert_allclose(statistics(model[1])[0], expected(model)[0], rtol=3e-6)


def test_many_batches_are_summed_precisely() -> None:
    """In float64: a momentum of k / (k + 1) in float32 is not precise enough for it."""
    model = nn.BatchNorm1D(1)
    values = [1000.0 + k % 2 for k in range(3000)]
    update_bn([paddle.full([2, 1], value) for value in values], model)
    assert model._mean.item() == np.float32(1000.5)


def test_images_count_by_their_size() -> None:
    model = nn.BatchNorm2D(1)
    update_bn([paddle.full([1, 1, 2, 2], 1.0), paddle.full([2, 1, 4, 3], 8.0)], model)
    assert model._mean.item() == pytest.approx((4 * 1 + 24 * 8) / 28, rel=1e-6)


def test_a_layer_that_is_called_twice_or_never() -> None:
    class Twice(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.never = nn.BatchNorm1D(1), nn.BatchNorm1D(1)
            self.never._mean.set_value(paddle.full([1], 7.0))

        def forward(self, x: Any) -> Any:
            self.norm(x)
            return self.norm(x + 2.0)

    model = Twice()
    update_bn([paddle.full([2, 1], value) for value in (0.0, 4.0)], model)
    assert model.norm._mean.item() == 3.0
    assert model.never._mean.item() == 7.0


def test_frozen_layers_stay_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm1D(3), nn.BatchNorm1D(3, use_global_stats=True), nn.BatchNorm1D(3), nn.Dropout())
    for layer in model[:3]:
        layer._mean.set_value(paddle.full([3], 0.3))
        layer._variance.set_value(paddle.full([3], 2.0))
    model[0].eval()
    model[3].eval()
    seen = []
    for layer in model:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(layer.training))
    before = [statistics(layer) for layer in (model[0], model[1])]
    update_bn(batches(), model)
    np.testing.assert_array_equal(before, [statistics(layer) for layer in (model[0], model[1])])
    assert abs(model[2]._variance.numpy() - 2.0).min() > 0.1
    assert seen == [False, True, True, False] * len(SIZES)


def test_a_model_without_such_layers_returns_at_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.BatchNorm1D(3, use_global_stats=True))
    drawn = []
    update_bn((drawn.append(batch) for batch in batches()), model)
    update_bn([], nn.InstanceNorm1D(3))
    assert drawn == []


def test_kinds_of_batches() -> None:
    class Model(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1D(1)
            self.seen: list[Any] = []

        def forward(self, x: Any, scale: Any = None) -> Any:
            self.seen.append((type(x), scale))
            return self.norm(x["x"] if isinstance(x, dict) else x)

    x = paddle.ones([2, 1])
    for batch in (x, [x, 1], (x,), {"x": x, "label": 1}):
        model = Model()
        update_bn([batch], model)
        assert model.seen == [(paddle.Tensor, None)]
    model = Model()
    update_bn([{"scale": 3, "x": x}], model)
    update_bn([(1, x)], model, call=lambda batch: model(batch[1], scale=4))
    assert model.seen == [(paddle.Tensor, 3), (paddle.Tensor, 4)]
    # A model that takes the whole dict, and one under DataParallel.
    model = nn.Sequential(Whole(), nn.BatchNorm1D(1))
    update_bn([{"inputs": x * 5}], model)
    assert model[1]._mean.item() == 5.0


class Whole(nn.Layer):
    def forward(self, data: dict[str, Any]) -> Any:
        return data["inputs"]


def test_batches_of_a_loader() -> None:
    model = nn.BatchNorm1D(1)
    dataset = paddle.io.TensorDataset([paddle.arange(10, dtype="float32").reshape([10, 1]), paddle.zeros([10])])
    update_bn(paddle.io.DataLoader(dataset, batch_size=4), model)
    assert model._mean.item() == 4.5


class LoaderError(Exception):
    pass


def failing(error: type[BaseException], after: int) -> Iterator[Any]:
    yield from batches()[:after]
    raise error


@pytest.mark.parametrize("error", [LoaderError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_an_exception_changes_nothing(error: type[BaseException], mode: str) -> None:
    model = model_of(momentum=0.3)
    (model.eval if mode == "eval" else model.train)()
    if mode == "mixed":
        model[2].eval()
    before = everything(model)
    for after in (0, 2):
        with pytest.raises(error):
            update_bn(failing(error, after), model)
        assert everything(model) == before

    def call(batch: Any) -> None:
        model(batch)
        raise error

    with pytest.raises(error):
        update_bn(batches(), model, call=call)
    assert everything(model) == before


def test_an_interrupt_at_any_line_changes_nothing() -> None:
    """Within this package's own lines: Ctrl-C may come between any two."""
    folder = str(Path(paddle_asgd.__file__).parent)
    model = model_of()

    def interrupted_at(line: int) -> bool:
        left = [line]

        def trace(frame: Any, event: str, argument: Any) -> Any:
            if not frame.f_code.co_filename.startswith(folder):
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            update_bn(batches(), model)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    before, line = everything(model), 1
    while interrupted_at(line):
        assert everything(model) == before, line
        line += 1
    assert line > 60
    after = everything(model)
    assert after[:3] == before[:3]
    assert after[3] != before[3]


def test_to_static() -> None:
    """A compiled program has its own momentum and calls no hook; statistics that it made are taken back."""
    for warm in (False, True):
        plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1D(4), nn.Linear(4, 2))
        model = paddle.jit.to_static(plain, full_graph=True)
        if warm:
            model(batches()[0])
        before = everything(plain)
        with pytest.raises(RuntimeError, match=r"^model: .*to_static.*paddle.jit.enable_to_static\(False\)"):
            update_bn(batches(), model)
        assert everything(plain) == before
        paddle.jit.enable_to_static(False)
        try:
            update_bn(batches(), model)
        finally:
            paddle.jit.enable_to_static(True)
        np.testing.assert_allclose(statistics(plain[1])[0], expected(plain)[0], rtol=3e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda model: update_bn([], model),
            ValueError,
            r"loader: received \[\] .*gave no batch, expected at",
        ),
        (lambda model: update_bn(iter(()), model), ValueError, "loader: .*gave no batch"),
        (
            lambda model: update_bn([5], model),
            TypeError,
            "loader: received 5 .*from it, expected a tensor.*call=",
        ),
        (lambda model: update_bn([[]], model), TypeError, r"loader: received \[\] .*from it"),
        (lambda model: update_bn(model, batches()), TypeError, "model: received .*; the loader comes first"),
        (lambda model: update_bn(batches(), None), TypeError, "model: received None"),
        (lambda model: update_bn(None, model), TypeError, "loader: received None"),
        (lambda model: update_bn(batches()[0], model), TypeError, "loader: received a tensor"),
        (lambda model: update_bn(batches(), model, call=3), TypeError, "call: received 3"),
    ],
)
def test_refused(call: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    model = model_of()
    before = everything(model)
    with pytest.raises(error, match=f"^{words}"):
        call(model)
    assert everything(model) == before


def test_static_mode(static_mode: None) -> None:
    with pytest.raises(RuntimeError, match=r"^update_bn: received a call in static graph mode"):
        update_bn([], nn.Linear(1, 1))
