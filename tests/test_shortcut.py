# SPDX-License-Identifier: Apache-2.0
"""The shortcut between two steps of dygraph: it has the bits of the full way, and notices whatever changes in between.

Random sequences of such changes are drawn in test_events.py.
"""

from __future__ import annotations

import gc
import weakref
from collections import UserDict
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from paddle import nn
from problems import FULL_SHAPES, Quadratic, bits, constant, state_of, step_with
from trial import Trial

from paddle_asgd import ASGD, native

SHAPES = [[257], [], [3, 5]]
STEPS = 8


def own_regularizer(trial: Trial, grads: list) -> list:
    trial.params[1].regularizer = paddle.regularizer.L2Decay(0.125)
    trial.sag.weight_decay = [0.1, 0.0, 0.1, 0.1]
    return [g + 0.125 * trial.sag.x[1] if i == 1 else g for i, g in enumerate(grads)]


def main_grad(trial: Trial, grads: list) -> list:
    grads[1] = grads[1] + 3
    trial.params[1].main_grad = paddle.to_tensor(grads[1])
    return grads


def no_gradient(trial: Trial, grads: list) -> list:
    trial.params[1].clear_gradient(False)
    return [None if i == 1 else g for i, g in enumerate(grads)]


def strided_gradient(trial: Trial, grads: list) -> list:
    trial.params[3].main_grad = paddle.to_tensor(np.ascontiguousarray(grads[3].T)).t()
    assert not trial.params[3].main_grad.is_contiguous()
    return grads


def found_inf(trial: Trial, grads: list) -> list:
    trial.optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([True]))
    return [None] * len(grads)


def frozen(trial: Trial, grads: list) -> list:
    trial.params[1].stop_gradient = True  # and its gradient stays
    return [None if i == 1 else g for i, g in enumerate(grads)]


def last_frozen(trial: Trial, grads: list) -> list:
    trial.params[-1].stop_gradient = True
    return [*grads[:-1], None]


def clip(trial: Trial, grads: list) -> list:
    trial.optimizer._grad_clip = paddle.nn.ClipGradByValue(0.125)
    return [np.clip(g, -0.125, 0.125) for g in grads]


EVENTS = [own_regularizer, main_grad, no_gradient, strided_gradient, found_inf, frozen, last_frozen, clip]


@pytest.mark.parametrize("event", EVENTS)
def test_a_step_unlike_the_ones_before(event: Callable) -> None:
    """Plain steps go by what the first of them found. Whatever comes up later must be noticed, and its end too."""
    trial = Trial(shapes=FULL_SHAPES)
    for step in range(11):
        trial.problem.backward(step, trial.params)
        happens = step in (4, 5, 8)
        grads = trial.gradients()
        grads = event(trial, grads) if happens else grads
        trial.optimizer.step()
        trial.optimizer.clear_grad()
        trial.follow(grads)
        trial.optimizer._set_auxiliary_var("found_inf", None)
        trial.optimizer._grad_clip = None
        trial.sag.weight_decay = 0.1
        for param in trial.params:
            param.regularizer = param.main_grad = None
            param.stop_gradient = False
            param.clear_gradient(False)


def test_a_rate_changed_on_the_parameter() -> None:
    trial = Trial(shapes=FULL_SHAPES)
    for step in range(8):
        factor = 0.5 if step in (3, 4) else 1.0
        trial.params[1].optimize_attr["learning_rate"] = factor
        trial.step([0.1, 0.1 * factor, 0.1, 0.1])


@pytest.mark.parametrize("frozen_then", [[], [0], [1]])
def test_a_parameter_thawed_later(frozen_then: list) -> None:
    """Alone, or while another one is frozen, which leaves as many as before and of the same shape."""
    trial = Trial(shapes=[[5], [5], [5]])
    last = len(trial.params) - 1
    for step in range(8):
        still = [last] if step < 4 else frozen_then
        for i, param in enumerate(trial.params):
            param.stop_gradient = i in still
            param.clear_gradient(False)
        trial.step(grads=[None if i in still else g for i, g in enumerate(trial.gradients())])


@pytest.mark.shortcut
def test_plain_steps_go_the_full_way_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above compare; this one makes sure that it is the shortcut that they compare."""
    trial = Trial(shapes=FULL_SHAPES)
    trial.step()
    monkeypatch.setattr(trial.optimizer, "_apply_optimize", lambda *_, **__: pytest.fail("the full way"))
    for _ in range(7):
        trial.step()


def convolutional() -> nn.Layer:
    return nn.Sequential(
        nn.Conv2D(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2D(2), nn.Flatten(), nn.Linear(64, 10)
    )


def transformer() -> nn.Layer:
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, dropout=0.0)
    return nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.shortcut
@pytest.mark.parametrize("build", [convolutional, transformer])
def test_a_network_trained_by_plans_has_the_bits_of_one_trained_in_full(build: Callable) -> None:
    """Here the gradients come from a backward pass that replaces or reuses their memory as it likes."""
    images, labels = paddle.randn([3, 4, 1, 8, 8]), paddle.randint(0, 10, [3, 4], "int64")
    found = []
    for planned in (True, False):
        paddle.seed(3)
        network = build()
        optimizer = ASGD(0.05, 3, network.parameters())
        for step in range(160):
            nn.functional.cross_entropy(network(images[step % 3]), labels[step % 3]).backward()
            if not planned:
                optimizer._shortcut = None
            assert (optimizer._shortcut is not None) == (planned and step > 0)
            optimizer.step()
            # Paddle's default keeps the memory of the gradients and zeroes it.
            optimizer.clear_grad(set_to_zero=step % 5 != 0)
        found.append([param.numpy().tobytes() for param in network.parameters()])
    assert found[0] == found[1]


def set_clip(optimizer: ASGD, params: list) -> None:
    optimizer._grad_clip = paddle.nn.ClipGradByValue(0.5)


def set_subset(optimizer: ASGD, params: list) -> None:
    optimizer._parameter_list = params[:2]


def freeze(optimizer: ASGD, params: list) -> None:
    params[1].stop_gradient = True


@pytest.mark.parametrize("change", [set_clip, set_subset, freeze])
def test_what_changes_between_two_steps_counts(change: Callable) -> None:
    """However many steps were alike before: the same as an optimizer that takes every step anew."""
    problem = Quadratic(3, SHAPES)
    contents = []
    for anew in (False, True):
        params = problem.parameters("float64")
        optimizer = ASGD(0.1, 3, params, weight_decay=0.25)
        for step in range(STEPS):
            problem.backward(step, params)
            if step == 5:
                before = [p.numpy().copy() for p in params]
                change(optimizer, params)
            if anew:
                pairs = [(p, p.grad) for p in optimizer._parameter_list]
                optimizer._apply_optimize(loss=None, startup_program=None, params_grads=pairs)
            else:
                optimizer.step()
            for param in params:
                param.clear_gradient()
        contents.append([bits(state_of(optimizer, p)) for p in params])
        stood = [np.array_equal(p.numpy(), b) for p, b in zip(params, before)]
        assert any(stood) == (change is not set_clip)
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("attributes", "moved"),
    [({}, 0.125), ({"learning_rate": 0.5}, 0.0625)],
    ids=["none", "half"],
)
def test_own_options_changed_between_two_steps_count(attributes: dict, moved: float) -> None:
    param = constant(1.0)
    optimizer = ASGD(0.125, 3, [param])
    before = [step_with(optimizer, 1.0) for _ in range(3)][-1]
    param.optimize_attr = attributes
    assert step_with(optimizer, 1.0)[0] == pytest.approx(before[0] - moved, rel=1e-6)


def test_a_tensor_as_own_learning_rate_stands_for_the_whole() -> None:
    """Equal to the multiplier that it replaces, it still means another thing."""
    param = constant(1.0)
    optimizer = ASGD(0.125, 3, [param])
    before = [step_with(optimizer, 1.0) for _ in range(2)][-1]
    param.optimize_attr["learning_rate"] = paddle.to_tensor(1.0)
    assert step_with(optimizer, 1.0)[0] == pytest.approx(before[0] - 1.0, rel=1e-6)


# ---- What the native plan compares: all of csrc/paddle_plan.h --------------------------------------------------------


def put_data(tensor: Any, value: Any) -> None:
    """Up to Paddle 3.0 this freezes the tensor, too, which would be another change."""
    frozen = tensor.stop_gradient
    tensor.data = value
    tensor.stop_gradient = frozen


class Planned:
    """Two parameters whose next step would go by the plan; the second one is square."""

    def __init__(self, dtype: str = "float32", side: int = 4, **options: Any) -> None:
        self.base = paddle.full([2 * side, side], 0.25, dtype)
        self.params = [paddle.create_parameter(shape, dtype) for shape in ([3], [side, side])]
        self.optimizer = ASGD(0.1, 2, self.params, watch=False, multi_precision=dtype == "float16", **options)
        put_data(self.params[1], self.base[:side])
        self.step()
        self.step()
        self.step()

    def step(self) -> None:
        for param in self.params:
            param.grad = paddle.ones_like(param)
        self.optimizer.step()

    def tensors(self) -> dict[str, Any]:
        state = self.optimizer._state.named(self.params[1])
        return {"param": self.params[1], **{name: tensor for name, tensor in state.items() if tensor is not None}}

    def plan(self, *more: list) -> Any:
        """One of the same lists and of more, which asks no dictionary."""
        lists = [self.params, *self.optimizer._shortcut.bucket.state[:3], *more]
        multipliers = [param.optimize_attr["learning_rate"] for param in self.params]
        return native.step_plan(self.params, self.params, multipliers, lists, [])

    def takes_step(self) -> bool:
        shortcut = self.optimizer._shortcut
        return shortcut is not None and self.optimizer._step_by_shortcut(shortcut)


def data_of_another(tensor: Any, planned: Planned) -> None:
    put_data(tensor, tensor.clone().detach())


def data_of_the_same(tensor: Any, planned: Planned) -> None:
    """Another tensor with the same memory, which later may get other memory."""
    put_data(tensor, tensor.detach())
    put_data(tensor, tensor.clone().detach())


def memory_of_another(tensor: Any, planned: Planned) -> None:
    tensor.clone()._share_buffer_to(tensor)


def memory_made_anew(tensor: Any, planned: Planned) -> None:
    """It may lie where the old one lay, and then a Paddle that does not show who owns it leaves no difference."""
    values = tensor.numpy()
    tensor._clear_data()
    paddle.to_tensor(values)._share_buffer_to(tensor)


def no_memory(tensor: Any, planned: Planned) -> None:
    tensor._clear_data()


def other_shape(tensor: Any, planned: Planned) -> None:
    with paddle.no_grad():
        tensor.reshape_([1, *tensor.shape])


def other_strides(tensor: Any, planned: Planned) -> None:
    with paddle.no_grad():
        tensor.transpose_([*range(len(tensor.shape) - 2), len(tensor.shape) - 1, len(tensor.shape) - 2])


TENSORS = ("param", "d", "y", "m")
TENSOR_CHANGES = [
    data_of_another,
    data_of_the_same,
    memory_of_another,
    memory_made_anew,
    no_memory,
    other_shape,
    other_strides,
]


@pytest.mark.shortcut
@pytest.mark.parametrize(
    ("name", "narrow"), [*((name, False) for name in TENSORS), *((name, True) for name in (*TENSORS, "y_scale"))]
)
@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_the_plan_notices_a_changed_tensor(change: Callable, name: str, narrow: bool) -> None:
    # Beside a parameter whose history is exact, so that the scales are fewer than the parameters.
    planned = Planned(side=64, history_dtype="int8") if narrow else Planned()
    tensors = planned.tensors()
    tensor = tensors[name]
    if change is other_strides and name == "m":
        pytest.skip("a clock has one dimension")
    assert planned.takes_step()
    address = tensor.data_ptr()
    change(tensor, planned)
    owned = planned.optimizer._shortcut.plan.keeps_memory
    same = change is memory_made_anew and tensor.data_ptr() == address and not owned
    for param in planned.params:
        if param._is_initialized():
            param.grad = paddle.ones_like(param)
    held = [value.numpy().tobytes() for value in tensors.values() if value._is_initialized()]
    assert planned.takes_step() == same
    assert same or held == [value.numpy().tobytes() for value in tensors.values() if value._is_initialized()]


def other_part(planned: Planned) -> None:
    """The same memory from another element on."""
    planned.base[4:]._share_buffer_to(planned.params[1])


def other_dtype(planned: Planned) -> None:
    """Of a tensor whose dtype no gradient is compared with."""
    sums = planned.tensors()["d"]
    sums.view("int32")._share_buffer_to(sums)


def fewer_rows(planned: Planned) -> None:
    """Of the same, which leaves the strides as they are."""
    planned.tensors()["d"].get_tensor()._set_dims([2, 4])


def clock_without_dimensions(planned: Planned) -> None:
    """The last of all tensors then has no dimension or stride that could differ."""
    with paddle.no_grad():
        planned.tensors()["m"].reshape_([])


def replaced_in_the_dictionary(planned: Planned) -> None:
    held = planned.optimizer._accumulators["d"]
    held[planned.params[1].name] = held[planned.params[1].name].clone()


def renamed_in_the_dictionary(planned: Planned) -> None:
    held = planned.optimizer._accumulators["d"]
    held["another"] = held.pop(planned.params[1].name)


def lost_from_the_dictionary(planned: Planned) -> None:
    """The one that comes last, so that all others are where they were."""
    planned.optimizer._accumulators["d"].popitem()


def replaced_dictionary(planned: Planned) -> None:
    planned.optimizer._accumulators["y"] = dict(planned.optimizer._accumulators["y"])


def more_masters(planned: Planned) -> None:
    planned.optimizer._master_weights["another"] = planned.params[0]


def frozen_first(planned: Planned) -> None:
    planned.params[0].stop_gradient = True


def thawed_third(planned: Planned) -> None:
    planned.optimizer._parameter_list.append(paddle.create_parameter([2], "float32"))


def one_less(planned: Planned) -> None:
    planned.optimizer._parameter_list.pop()


def other_order(planned: Planned) -> None:
    planned.optimizer._parameter_list.reverse()


def no_gradient_of_one(planned: Planned) -> None:
    planned.params[1].clear_gradient(False)


def gradient_elsewhere(planned: Planned) -> None:
    planned.params[1].main_grad = planned.params[1].grad


def with_regularizer(planned: Planned) -> None:
    planned.params[1].regularizer = paddle.regularizer.L2Decay(0.5)


def with_multiplier(planned: Planned) -> None:
    planned.params[1].optimize_attr["learning_rate"] = 0.5


def with_other_options(planned: Planned) -> None:
    planned.params[1].optimize_attr = {"learning_rate": 0.5}


def with_options_in_no_dict(planned: Planned) -> None:
    planned.params[1].optimize_attr = UserDict(learning_rate=1.0)


def with_clip(planned: Planned) -> None:
    planned.optimizer._grad_clip = paddle.nn.ClipGradByValue(0.5)


def with_masters(planned: Planned) -> None:
    planned.optimizer._multi_precision = True


def with_index(planned: Planned) -> None:
    planned.optimizer.batch_index = 1


@pytest.mark.shortcut
@pytest.mark.parametrize(
    "change",
    [
        other_part,
        other_dtype,
        fewer_rows,
        clock_without_dimensions,
        replaced_in_the_dictionary,
        renamed_in_the_dictionary,
        lost_from_the_dictionary,
        replaced_dictionary,
        more_masters,
        frozen_first,
        thawed_third,
        one_less,
        other_order,
        no_gradient_of_one,
        gradient_elsewhere,
        with_regularizer,
        with_multiplier,
        with_other_options,
        with_options_in_no_dict,
        with_clip,
        with_masters,
        with_index,
    ],
)
def test_the_plan_notices(change: Callable) -> None:
    planned = Planned()
    assert planned.takes_step()
    change(planned)
    assert not planned.takes_step()


@pytest.mark.shortcut
def test_gradients_are_read_without_python_objects() -> None:
    """Where this Paddle exports what that takes; every Paddle that is supported does."""
    assert Planned().optimizer._shortcut.plan.reads_gradients


@pytest.mark.shortcut
def test_stop_gradient_may_be_anything_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Planned()
    monkeypatch.setattr(type(planned.params[0]), "stop_gradient", property(lambda _: False), raising=False)
    assert planned.takes_step()
    monkeypatch.setattr(type(planned.params[0]), "stop_gradient", property(lambda _: True))
    assert not planned.takes_step()


@pytest.mark.shortcut
def test_a_plan_that_cannot_read_gradients_asks_python_for_them() -> None:
    """The plan is made while the first parameter has none to compare with."""
    contents = []
    for direct in (True, False):
        planned = Planned()
        shortcut = planned.optimizer._shortcut
        if not direct:
            planned.params[0].clear_gradient(False)
            plan = planned.plan()
            assert not plan.reads_gradients
            planned.optimizer._shortcut = shortcut._replace(plan=plan)
        for scale in (0.5, -2.0):
            for param in planned.params:
                param.grad = paddle.full_like(param, scale)
            assert planned.takes_step()
        contents.append([value.numpy().tobytes() for value in planned.tensors().values()])
        planned.params[1].clear_gradient(False)
        assert not planned.takes_step()
    assert contents[0] == contents[1]


@pytest.mark.shortcut
def test_a_plan_keeps_no_optimizer_alive() -> None:
    """It holds the dictionary of the optimizer that owns it: a circle, which Python has to see."""
    planned = Planned()
    optimizer = weakref.ref(planned.optimizer)
    assert planned.takes_step()
    del planned
    gc.collect()
    assert optimizer() is None


@pytest.mark.shortcut
@pytest.mark.parametrize("change", [None, *TENSOR_CHANGES])
def test_the_plan_notices_a_changed_tensor_of_a_list_of_another_length(change: Callable | None) -> None:
    planned = Planned("float16")
    shortcut = planned.optimizer._shortcut
    more = paddle.full([4, 4], 0.25)
    plan = planned.plan(shortcut.bucket.masters, [more])
    planned.optimizer._shortcut = shortcut._replace(plan=plan)
    assert planned.takes_step()
    address = more.data_ptr()
    if change is not None:
        change(more, planned)
    same = change is memory_made_anew and more.data_ptr() == address and not plan.keeps_memory
    assert planned.takes_step() == (same or change is None)


@pytest.mark.shortcut
def test_no_plan_of_lists_that_do_not_fit() -> None:
    planned = Planned()
    sparse = paddle.sparse.sparse_coo_tensor([[0], [1]], [1.0], [2, 2])
    for lists in ([], [planned.params[:1], planned.params], [planned.params, [sparse]]):
        assert native.step_plan(planned.params, planned.params, [1.0, 1.0], lists, []) is None


@pytest.mark.shortcut
def test_a_plan_is_for_its_own_kind_of_step() -> None:
    """Clocks of taking turns are shorter than those of a batch index, and other optimizers have other lists."""
    planned = Planned()
    with pytest.raises(ValueError, match="not like the last one"):
        native.average_planned(planned.plan([planned.base]), 0.5, [])
    for kept in ((), (True, False, False, False)):
        with pytest.raises(ValueError, match="not like the last one"):
            native.averaged_sgd_planned(planned.plan(), kept, 0.1, 0.0, 0.0, 0.75, 1.0, 1.0, [])
    plan = planned.plan()
    with pytest.raises(ValueError, match="not like the last one"):
        native.asgd_planned(plan, 0.1, 0.0, None, None, None, None, True, [])
    native.asgd_planned(plan, 0.1, 0.0, None, None, None, None, False, [])
    with pytest.raises(ValueError, match="not like the last one"):
        native.asgd_planned(plan, 0.1, 0.0, 0, None, None, None, False, [])


@pytest.mark.shortcut
def test_a_plan_takes_no_step_within_its_own_step() -> None:
    """Which another thread would do."""
    planned = Planned()
    plan = planned.plan()

    def again() -> None:
        with pytest.raises(ValueError, match="in use"):
            native.asgd_planned(plan, 0.1, 0.0, None, None, None, None, False, [])

    notes = [again]
    native.asgd_planned(plan, 0.1, 0.0, None, None, None, None, False, notes)
    native.asgd_planned(plan, 0.1, 0.0, None, None, None, None, False, notes)
