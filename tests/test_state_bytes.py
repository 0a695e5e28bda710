# SPDX-License-Identifier: Apache-2.0
"""``ASGD.state_bytes``: what it says is what the tensors of the state take, and it says the same before they exist."""

from __future__ import annotations

from typing import Any

import paddle
import pytest
from problems import Quadratic, StaticRun, constant
from refusing import assert_refused

from paddle_asgd import ASGD
from paddle_asgd.sag.state_bytes import StateBytes

pytestmark = pytest.mark.filterwarnings("ignore:.*is rounded to it after every step")

#: Two that are narrow if anything is, the second with a last block of one element.
SHAPES = [[3, 2741], [257], [], [4097], [4095]]
KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "int16": {"history_dtype": "int16"},
    "int8": {"history_dtype": "int8"},
    "float64": {"dtype": "float64"},
    "float64_int8": {"dtype": "float64", "history_dtype": "int8"},
    "float16": {"dtype": "float16"},
    "masters": {"dtype": "float16", "multi_precision": True},
    "masters_int8": {"dtype": "float16", "multi_precision": True, "history_dtype": "int8"},
    "main_grad": {"dtype": "float16", "multi_precision": True, "main_grad": True},
    "groups": {"groups": ["int8", None, "int16", "int16", None]},
    "indexed": {"indexed": True, "history_dtype": "int8"},
}


class Trained:
    """An optimizer of parameters with these gradients."""

    def __init__(self, dtype: str = "float32", main_grad: bool = False, indexed: bool = False, groups: Any = None,
                 **options: Any) -> None:  # fmt: skip
        self.params = [constant(1.0, dtype, shape) for shape in SHAPES]
        for param in self.params:
            if main_grad:
                param.main_grad = None
        self.main_grad, self.indexed = main_grad, indexed
        given = [{"params": [p], "history_dtype": kind} for p, kind in zip(self.params, groups or [])]
        self.optimizer = ASGD(0.1, 3, given or self.params, **options)

    def step(self) -> None:
        for param in self.params:
            if self.main_grad:
                param.main_grad = paddle.ones(param.shape, "float32")
            else:
                param.grad = paddle.ones_like(param)
        if self.indexed:
            self.optimizer.batch_index = 2
        self.optimizer.step()

    def counted(self) -> dict[str, int]:
        """Bytes of the tensors in the state, by their kinds."""
        state = {key: value for key, value in self.optimizer.state_dict().items() if isinstance(value, paddle.Tensor)}
        found = dict.fromkeys(StateBytes._fields, 0)
        for key, value in state.items():
            for kind, suffix in (("history", "_y_0"), ("scales", "_y_scale_0"), ("sums", "_d_0")):
                found[kind] += value.numpy().nbytes if key.endswith(suffix) else 0
        masters = self.optimizer.state_dict().get("master_weights", {})
        found["master_weights"] = sum(master.numpy().nbytes for master in masters.values())
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_tensors_take(kind: str) -> None:
    trained = Trained(**KINDS[kind])
    before = trained.optimizer.state_bytes()
    assert set(trained.optimizer.state_dict()) == {"batch_num"}
    trained.step()
    assert trained.optimizer.state_bytes() == before
    assert before._asdict() == trained.counted()
    assert before.total == sum(trained.counted().values())


def test_by_hand() -> None:
    """Of one parameter: 100 x 100 elements are 79 blocks, and a slot of them 10,000 bytes."""
    weight = paddle.create_parameter([100, 100], "float32")
    found = ASGD(0.1, 50, [weight], history_dtype="int8").state_bytes()
    assert found == StateBytes(history=500_000, scales=50 * 79 * 4, sums=40_000, master_weights=0)
    assert found.total == 500_000 + 15_800 + 40_000


@pytest.mark.parametrize(("history_dtype", "bits"), [("int16", 16.5), ("int8", 8.5)])
def test_bits_for_each_element_and_slot(history_dtype: str, bits: float) -> None:
    n, elements = 100, 1_000_000
    weight = paddle.create_parameter([elements], "float32")
    found = ASGD(0.1, n, [weight], history_dtype=history_dtype).state_bytes()
    assert 8 * (found.history + found.scales) / (n * elements) <= bits


def test_gradients_of_another_dtype_count_as_they_are() -> None:
    """Which nobody knows before the first of them."""
    param = constant(1.0, "float16", [300])
    optimizer = ASGD(0.1, 3, [param])
    assert optimizer.state_bytes().history == 3 * 300 * 2
    param.main_grad = paddle.ones([300], "float32")
    optimizer.step()
    assert optimizer.state_bytes().history == 3 * 300 * 4


def test_frozen_parameters_count_once_they_have_state() -> None:
    trained = Trained()
    trained.params[0].stop_gradient = True
    assert trained.optimizer.state_bytes().sums == 4 * (257 + 1 + 4097 + 4095)
    trained.params[0].stop_gradient = False
    trained.step()
    trained.params[0].stop_gradient = True
    assert trained.optimizer.state_bytes().sums == 4 * (3 * 2741 + 257 + 1 + 4097 + 4095)


def test_a_part_of_the_parameters() -> None:
    """What a wrapper has left this process."""
    trained = Trained(history_dtype="int8")
    trained.optimizer._parameter_list = trained.params[:1]
    assert trained.optimizer.state_bytes() == StateBytes(3 * 3 * 2741, 3 * 65 * 4, 4 * 3 * 2741, 0)


@pytest.mark.usefixtures("static_mode")
@pytest.mark.parametrize("listed", [False, True], ids=["all", "listed"])
def test_static_graphs(listed: bool) -> None:
    made = []

    def build(loss: Any, params: list) -> None:
        optimizer = ASGD(0.1, 3, params if listed else None, history_dtype="int16")
        if listed:
            made.append(optimizer.state_bytes())
        else:
            assert_refused(optimizer.state_bytes, ValueError, ["state_bytes", "minimize()", "parameters=None"])
        optimizer.minimize(loss)
        made.append(optimizer.state_bytes())

    StaticRun(Quadratic(3, SHAPES), build)
    paddle.disable_static()
    params = [paddle.create_parameter(shape, "float32") for shape in SHAPES]
    expected = ASGD(0.1, 3, params, history_dtype="int16").state_bytes()
    assert made == [expected] * len(made)
    assert expected.scales == 3 * 4 * (65 + 33)
