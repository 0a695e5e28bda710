# SPDX-License-Identifier: Apache-2.0
"""PostHocEMA: when it writes snapshots, what it makes of them, and how it is resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from paddle import nn

from paddle_asgd import AveragedModel, PostHocEMA, power_ema
from paddle_asgd.averages import post_hoc


class Model(nn.Layer):
    """Trained, shared, frozen and counted tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3), nn.BatchNorm1D(3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = self.create_parameter([2])
        self.frozen.stop_gradient = True
        self.register_buffer("count", paddle.to_tensor([0], dtype="int64"))


def walk(model: Model, begin: int, end: int, after: Callable[[], Any]) -> None:
    """Go from one step to another, always by the same random numbers."""
    for step in range(begin, end):
        draw = np.random.RandomState(step)
        for tensor in (model.first.weight, model.first.bias, model.norm._mean):
            tensor.set_value(tensor + paddle.to_tensor(draw.standard_normal(tensor.shape).astype("float32")))
        model.count.set_value(paddle.to_tensor([step + 1]))
        after()


def values_of(state: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def assert_equal(state: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    assert sorted(state) == sorted(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype
        np.testing.assert_allclose(tensor.numpy(), other[name].numpy(), **tolerance, err_msg=name)


def test_reconstructs_what_was_kept(tmp_path: Path) -> None:
    model = Model()
    averages = PostHocEMA(model, (0.1, 0.2), tmp_path / "a" / "b", 10, dtype="float32")
    kept = []
    walk(model, 0, 40, lambda: [averages.update(), kept.append([a.averaged_state_dict() for a in averages.averages])])
    assert averages.snapshots == [(t, width) for t in (10, 20, 30, 40) for width in (0.1, 0.2)]
    assert sorted(os.listdir(tmp_path / "a" / "b")) == [f"{t}-{width}.npz" for t, width in averages.snapshots]
    for t in (10, 30, 40):
        for width, expected in zip((0.1, 0.2), kept[t - 1]):
            assert_equal(averages.reconstruct(width, at=t), expected, rtol=1e-6, atol=1e-6)
    assert_equal(averages.reconstruct(0.1), kept[-1][0], rtol=1e-6, atol=1e-6)


def test_reconstructs_another_width(tmp_path: Path) -> None:
    model = Model()
    averages = PostHocEMA(model, folder=tmp_path, every=50, dtype="float32")
    judge = AveragedModel(model, power_ema(0.075))
    walk(model, 0, 400, lambda: [averages.update(), judge.update()])
    made, expected = (values_of(state) for state in (averages.reconstruct(0.075), judge.averaged_state_dict()))
    for name in ("first.weight", "first.bias"):
        away = abs(made[name] - expected[name]).max() / abs(expected[name] - model.state_dict()[name].numpy()).max()
        assert away < 0.01
    np.testing.assert_array_equal(made["second.weight"], made["first.weight"])


def test_copies_are_those_of_the_nearest_snapshot_before(tmp_path: Path) -> None:
    model = Model()
    averages, means = PostHocEMA(model, folder=tmp_path, every=10), []
    walk(model, 0, 30, lambda: [averages.update(), means.append(model.norm._mean.numpy().copy())])
    for at, nearest in ((30, 30), (29, 20), (20, 20), (4, 10)):
        state = averages.reconstruct(0.08, at=at)
        np.testing.assert_array_equal(state["norm._mean"].numpy(), means[nearest - 1])
        assert state["count"].item() == nearest
        assert state["count"].dtype == paddle.int64
    np.testing.assert_array_equal(state["frozen"].numpy(), model.frozen.numpy())
    model.set_state_dict(state)
    np.testing.assert_array_equal(model.norm._mean.numpy(), means[9])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_of_the_files(tmp_path: Path, dtype: str) -> None:
    model = Model()
    averages = PostHocEMA(model, folder=tmp_path, every=4, dtype=dtype)
    walk(model, 0, 4, averages.update)
    with np.load(tmp_path / "4-0.05.npz", allow_pickle=False) as file:
        assert {file[name].dtype for name in file.files if name.startswith("averaged/")} == {np.dtype(dtype)}
        assert file["copied/norm._mean"].dtype == np.float32
    expected = averages.averages[1].averaged_state_dict()
    assert_equal(averages.reconstruct(0.1), expected, rtol=2**-10 if dtype == "float16" else 2e-6, atol=1e-6)


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    model = Model()
    averages = PostHocEMA(model, folder=tmp_path, every=2)
    averages.update()
    model.first.bias.set_value(paddle.full([3], 1e6))
    with pytest.raises(ValueError, match=r"^dtype: received 'float16', expected 'float32': .*'first.bias'"):
        averages.update()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_of_the_model(tmp_path: Path, dtype: str) -> None:
    """The averages of 16-bit weights are float32, and are rounded once, at the end."""
    model = nn.Linear(3, 2)
    model.to(dtype=dtype)
    averages = PostHocEMA(model, folder=tmp_path, every=5, dtype="float64")
    for step in range(10):
        for parameter in model.parameters():
            parameter.set_value(paddle.full(parameter.shape, 1 + step / 64, dtype))
        averages.update()
    state, expected = averages.reconstruct(0.1), averages.averages[1].averaged_state_dict()
    for name, tensor in state.items():
        assert tensor.dtype == model.state_dict()[name].dtype
        apart = (tensor.astype("float64") - expected[name].astype("float64")).abs().max().item()
        assert apart < 1e-14 if dtype == "float64" else apart == 0


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_snapshot_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def killed(*arguments: Any) -> None:
        raise Killed

    model = Model()
    averages = PostHocEMA(model, folder=tmp_path, every=2)
    walk(model, 0, 3, averages.update)
    before = sorted(os.listdir(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(os, where, killed)
        with pytest.raises(Killed):
            averages.update()
    assert sorted(os.listdir(tmp_path)) == before
    assert averages.snapshots == [(2, 0.05), (2, 0.1)]
    # What a killed process leaves is passed over.
    (tmp_path / ".4-0.05.npz-x").write_bytes(b"")
    (tmp_path / "notes.npz").write_bytes(b"")
    averages.reconstruct(0.07)


def test_resumed(tmp_path: Path) -> None:
    """From a state in a file, after a run went on that is now abandoned and left snapshots of its own."""
    model = Model()
    start = values_of(model.state_dict())
    whole = PostHocEMA(model, folder=tmp_path / "whole", every=10, dtype="float32")
    walk(model, 0, 45, whole.update)

    model.set_state_dict(start)
    first = PostHocEMA(model, folder=tmp_path / "parts", every=10, dtype="float32")
    walk(model, 0, 25, first.update)
    paddle.save({"averages": first.state_dict(), "model": model.state_dict()}, str(tmp_path / "checkpoint.pdparams"))
    for step in range(25, 45):
        model.first.bias.set_value(paddle.full([3], float(step)))
        first.update()

    saved = paddle.load(str(tmp_path / "checkpoint.pdparams"))
    other = Model()
    other.set_state_dict(saved["model"])
    second = PostHocEMA(other, folder=tmp_path / "parts", every=10, dtype="float32")
    second.set_state_dict(saved["averages"])
    assert second.num_updates == 25
    assert [t for t, _ in second.snapshots] == [10, 10, 20, 20]
    walk(other, 25, 45, second.update)
    assert second.snapshots == whole.snapshots
    assert_equal(second.reconstruct(0.07), whole.reconstruct(0.07), rtol=0, atol=0)
    assert_equal(second.reconstruct(0.15, at=30), whole.reconstruct(0.15, at=30), rtol=0, atol=0)


def test_a_folder_of_a_training_that_is_over(tmp_path: Path) -> None:
    model = Model()
    averages = PostHocEMA(model, folder=str(tmp_path), every=5)
    walk(model, 0, 20, averages.update)
    other = PostHocEMA(Model(), (0.1, 0.2), tmp_path)
    assert other.snapshots == averages.snapshots
    assert_equal(other.reconstruct(0.07), averages.reconstruct(0.07), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^folder: received .* with 8 snapshots of another training"):
        other.update()
    assert other.num_updates == 0


def test_steps_of_an_optimizer_count(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = paddle.optimizer.SGD(0.1, model.parameters())
    averages = PostHocEMA(model, folder=tmp_path, every=2, optimizer=optimizer, update_every=2)
    for step in range(16):
        model(paddle.ones([1, 2])).sum().backward()
        if step % 2:
            optimizer.step()
            optimizer.clear_grad()
        averages.update()
    assert averages.num_updates == 4
    assert sorted({t for t, _ in averages.snapshots}) == [2, 4]


def test_rank_0_alone_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_hoc, "get_rank", lambda: 1)
    averages = PostHocEMA(Model(), folder=tmp_path, every=1)
    averages.update()
    assert os.listdir(tmp_path) == []


def test_the_first_snapshot_of_rank_0_is_no_other_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank may come to its first update behind that."""
    first, second = (PostHocEMA(Model(), folder=tmp_path, every=1) for _ in range(2))
    first.update()
    monkeypatch.setattr(post_hoc, "get_rank", lambda: 1)
    second.update()
    assert second.snapshots == first.snapshots
    first.update()
    monkeypatch.setattr(post_hoc, "get_rank", lambda: 0)
    first.update()
    for rank in (0, 1):
        monkeypatch.setattr(post_hoc, "get_rank", lambda rank=rank: rank)
        with pytest.raises(ValueError, match=r"^folder: received .* snapshots of another training"):
            PostHocEMA(Model(), folder=tmp_path, every=1).update()


def test_files_of_no_use(tmp_path: Path) -> None:
    model = Model()
    averages = PostHocEMA(model, folder=tmp_path, every=1)
    with pytest.raises(ValueError, match=r"^folder: received .* without a snapshot of this training, expected some"):
        averages.reconstruct(0.1)
    averages.update()
    other = PostHocEMA(nn.Linear(2, 2), folder=tmp_path)
    with pytest.raises(ValueError, match=r"^folder: .*'weight' is missing, expected \[2, 2\]"):
        other.reconstruct(0.1)
    (tmp_path / "1-0.1.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"^folder: received .*1-0.1.npz.*, expected a snapshot: "):
        averages.reconstruct(0.1)
    (tmp_path / "1-0.1.npz").unlink()
    assert averages.snapshots == [(1, 0.05)]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((0.1,), {}, TypeError, "sigma_rels: received 0.1"),
        (([0.1],), {}, ValueError, r"sigma_rels: received \[0.1\].*at least two widths that differ"),
        (([0.1, 0.1],), {}, ValueError, "sigma_rels: .*that differ"),
        (([0.1, 0.4],), {}, ValueError, r"sigma_rels\[1\]: received 0.4"),
        ((), {"folder": 3}, TypeError, "folder: received 3"),
        ((), {"every": 0}, ValueError, "every: received 0"),
        (
            (),
            {"dtype": "bfloat16"},
            ValueError,
            "dtype: received 'bfloat16'.*expected 'float16', 'float32'",
        ),
        ((), {"dtype": None}, TypeError, "dtype: received None"),
        ((), {"optimizer": 3}, TypeError, "optimizer: received 3"),
        ((), {"update_every": 0}, ValueError, "update_every: received 0"),
    ],
)
def test_refused(arguments: tuple, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{words}"):
        PostHocEMA(nn.Linear(1, 1), *arguments, **options)


def test_states_refused(tmp_path: Path) -> None:
    model = Model()
    averages = PostHocEMA(model, folder=tmp_path, every=2)
    walk(model, 0, 3, averages.update)
    state = averages.state_dict()
    damaged = {**state["averages"][1], "num_updates": -1}
    other = PostHocEMA(Model(), folder=tmp_path, every=2)
    before = [values_of(average.state_dict()["averages"]) for average in other.averages]
    for wrong, words in (
        ({"averages": state["averages"]}, r"it has the entries \['averages'\], expected"),
        ({**state, "sigma_rels": [0.05, 0.2]}, r"sigma_rels is \[0.05, 0.2\], expected \[0.05, 0.1\]"),
        ({**state, "averages": state["averages"][:1]}, "sigma_rels is"),
        ({**state, "averages": [state["averages"][0], damaged]}, "num_updates is -1"),
        ({**state, "snapshots": [[2]]}, r"'snapshots' is \[\[2\]\]"),
        ({**state, "snapshots": None}, "'snapshots' is None"),
    ):
        with pytest.raises(ValueError, match=rf"^set_state_dict: {words}.*Nothing has been loaded\.$"):
            other.set_state_dict(wrong)
        for average, values in zip(other.averages, before):
            np.testing.assert_equal(values_of(average.state_dict()["averages"]), values)
        assert other.num_updates == 0
    with pytest.raises(TypeError, match=r"^set_state_dict: received None"):
        other.set_state_dict(None)
