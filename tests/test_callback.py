# SPDX-License-Identifier: Apache-2.0
"""BatchIndexCallback under paddle.Model.fit: which index each step gets, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import paddle
import pytest

from paddle_asgd import ASGD, BatchIndexCallback, FixedBatchSampler
from paddle_asgd.sag.batches import ORDERS

# Model.fit of Paddle warns of its own copy of the labels.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")


class Data(paddle.io.Dataset):
    """Samples whose gradients tell them apart."""

    def __init__(self, length: int = 11) -> None:
        draw = np.random.default_rng(3)
        self.x, self.y = (draw.normal(size=(length, width)).astype("float32") for width in (3, 1))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.x[index], self.y[index]

    def __len__(self) -> int:
        return len(self.x)


def sampled(order: str = "replacement") -> tuple[FixedBatchSampler, paddle.io.DataLoader]:
    data = Data()
    sampler = FixedBatchSampler(data, batch_size=4, order=order, seed=2)
    return sampler, paddle.io.DataLoader(data, batch_sampler=sampler)


def prepared(optimizer: Any = None, **options: Any) -> paddle.Model:
    paddle.seed(4)
    model = paddle.Model(paddle.nn.Linear(3, 1))
    model.prepare(optimizer or ASGD(0.05, 3, model.parameters(), **options), paddle.nn.MSELoss())
    return model


def trained_by_hand(order: str, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    sampler, loader = sampled(order)
    paddle.seed(4)
    layer = paddle.nn.Linear(3, 1)
    optimizer = ASGD(0.05, 3, layer.parameters())
    for _ in range(epochs):
        for batch_index, (x, y) in sampler.enumerate(loader):
            paddle.nn.functional.mse_loss(layer(x), y).backward()
            optimizer.batch_index = batch_index
            optimizer.step()
            optimizer.clear_grad()
    return layer.weight.numpy(), layer.bias.numpy()


def fit(model: paddle.Model, loader: Any, callback: Any, epochs: int, **options: Any) -> None:
    model.fit(loader, epochs=epochs, verbose=0, callbacks=[callback], **options)


@pytest.mark.parametrize("order", ORDERS)
def test_same_as_a_loop_by_hand(order: str) -> None:
    sampler, loader = sampled(order)
    model = prepared()
    fit(model, loader, BatchIndexCallback(sampler), 4)
    for value, expected in zip(model.network.parameters(), trained_by_hand(order, 4)):
        np.testing.assert_array_equal(value.numpy(), expected)


def test_a_second_fit_and_a_resumed_epoch_go_on() -> None:
    sampler, loader = sampled("reshuffle")
    model = prepared()
    callback = BatchIndexCallback(sampler)
    fit(model, loader, callback, 1)
    state = sampler.state_dict()
    fit(model, loader, callback, 1)
    # As a run that is resumed from a checkpoint: the sampler is told where it stood, one batch into the third epoch.
    assert state["epoch"] == 1
    sampler.set_state_dict({**state, "epoch": 2, "position": 1})
    fit(model, loader, callback, 1)
    by_hand, by_hand_loader = sampled("reshuffle")
    orders = [by_hand.epoch_order(epoch) for epoch in range(3)]
    clock = model._optimizer.state_dict()[f"{model.parameters()[0].name}_m_0"]
    assert clock[0].item() == len(orders[0] + orders[1] + orders[2][1:])
    assert len(by_hand_loader) == 3


def test_after_a_pass_that_ended_early() -> None:
    """The epoch that the callback looks up is the one that the loader then goes through."""
    sampler, loader = sampled("reshuffle")
    for _ in sampler.enumerate(loader):
        break
    callback, seen = BatchIndexCallback(sampler), []
    callback.set_model(prepared())
    callback.on_epoch_begin(0)
    for step, (x, _) in enumerate(loader):
        seen.append((callback._order[step], x.numpy().tobytes()))
    data = Data()
    expected = {batch: data.x[samples].tobytes() for batch, samples in enumerate(sampler.batches)}
    assert sorted(batch for batch, _ in seen) == [0, 1, 2]
    assert all(expected[batch] == samples for batch, samples in seen)


def test_what_is_refused() -> None:
    sampler, loader = sampled()
    callback = BatchIndexCallback(sampler)
    with pytest.raises(TypeError, match=r"sampler: received .*list.*, expected a paddle_asgd.FixedBatchSampler"):
        BatchIndexCallback([1, 2])
    layer = paddle.nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"optimizer: received .*SGD.*, expected one with a batch index"):
        fit(prepared(paddle.optimizer.SGD(0.1, layer.parameters())), loader, callback, 1)
    with pytest.raises(ValueError, match="batch_num: received 5 of the optimizer, expected 3"):
        fit(prepared(ASGD(0.1, 5, layer.parameters())), loader, callback, 1)
    with pytest.raises(ValueError, match="accumulate_grad_batches: received 2, expected 1"):
        fit(prepared(), loader, callback, 1, accumulate_grad_batches=2)


@pytest.mark.usefixtures("static_mode")
def test_static_graphs_are_refused() -> None:
    with pytest.raises(RuntimeError, match="static graph mode, expected dygraph"):
        BatchIndexCallback(FixedBatchSampler(range(8), 4, seed=0)).on_train_begin()


def test_unequal_parts_are_warned_of() -> None:
    """11 samples in batches of 4 for two ranks: the last has 3. Not so where it is left out, or has an even number."""
    for length, drop_last, warns in ((11, False, True), (11, True, False), (10, False, False)):
        data = Data(length)
        sampler = FixedBatchSampler(data, 2, seed=2, drop_last=drop_last, num_replicas=2, rank=1)
        model = paddle.Model(paddle.nn.Linear(3, 1))
        model.prepare(ASGD(0.05, sampler.batch_num, model.parameters()), paddle.nn.MSELoss())
        loader = paddle.io.DataLoader(data, batch_sampler=sampler)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            fit(model, loader, BatchIndexCallback(sampler), 2)
        said = [str(warning.message) for warning in given if "BatchIndexCallback" in str(warning.message)]
        assert len(said) == warns
        assert all(text.startswith("BatchIndexCallback: a batch of 3 samples is divided unequally") for text in said)
