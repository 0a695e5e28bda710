# SPDX-License-Identifier: Apache-2.0
"""float16 and bfloat16 parameters against the reference: master weights, rounding, memory, skipped steps. The
conversions by themselves are tests/native's."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import paddle
import pytest
from problems import ON_GPU, PIR, Network, Quadratic, bits, state_of
from reference import Sag

from paddle_asgd import ASGD

DTYPES = ["bfloat16", "float16"]
#: For tests that are not about the warning.
rounding_is_meant = pytest.mark.filterwarnings("ignore:.*multi_precision=True keeps:UserWarning")
half = pytest.mark.parametrize("dtype", DTYPES)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """To nearest even, in the form that Tensor.numpy() has: bfloat16 comes as the bits, in uint16."""
    values = np.asarray(values, dtype=np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    pattern = values.view(np.uint32)
    return ((pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16).astype(np.uint16)


def widened(halves: np.ndarray) -> np.ndarray:
    """float64 of either form."""
    if halves.dtype == np.float16:
        return halves.astype(np.float64)
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def tensor(halves: np.ndarray) -> paddle.Tensor:
    """uint16 becomes bfloat16."""
    return paddle.to_tensor(halves)


def parameter(values: np.ndarray, dtype: str) -> paddle.Tensor:
    param = tensor(rounded(values, dtype))
    param.stop_gradient = False
    return param


def master_of(optimizer: Any, param: paddle.Tensor) -> np.ndarray:
    master = optimizer.state_dict()["master_weights"][param.name]
    assert master.dtype == paddle.float32
    return master.numpy()


def gradient(problem: Quadratic, step: int, param: paddle.Tensor, dtype: str) -> np.ndarray:
    """What a network in this precision would compute from its 16-bit weights."""
    return rounded(problem.gradients(step, [widened(param.numpy())])[0], dtype)


def wide_state(optimizer: Any, param: paddle.Tensor) -> dict[str, np.ndarray]:
    """d, y and m, with y widened."""
    state = state_of(optimizer, param)
    del state["x"]
    state["y"] = widened(state["y"]) if state["y"].itemsize == 2 else state["y"]
    return state


@half
def test_master_weights_stay_exact_over_many_steps(dtype: str) -> None:
    problem = Quadratic(batches=997, shapes=[[257]])
    param = parameter(problem.start[0], dtype)
    # Without the watch: 997 batches do not fit 100 slots, on purpose.
    optimizer = ASGD(0.01, 100, [param], weight_decay=0.1, multi_precision=True, watch=False)
    sag = Sag([widened(param.numpy())], 100, weight_decay=0.1)
    for step in range(5000):
        grad = gradient(problem, step, param, dtype)
        param.grad = tensor(grad)
        optimizer.step()
        sag.step([widened(grad)], 0.01)
        if step % 61 == 0:
            assert param.numpy().tobytes() == rounded(master_of(optimizer, param), dtype).tobytes()
    error = master_of(optimizer, param) - sag.x[0]
    assert np.sqrt(np.mean(error**2)) <= 1e-5 * np.sqrt(np.mean(sag.x[0] ** 2))
    state = wide_state(optimizer, param)
    np.testing.assert_array_equal(state["y"], sag.y[0])
    assert state["m"] == 5000
    np.testing.assert_allclose(state["d"], sag.d[0], rtol=0, atol=1e-6 * np.abs(sag.y[0]).sum(axis=0).max())


@half
def test_every_master_weight_is_rounded_to_nearest_even(dtype: str) -> None:
    """Ties of either kind, subnormal numbers, what overflows, both signs; a learning rate of 0 moves none of them."""
    patterns = np.arange(0, 0x7F7F8000, 0x4001, dtype=np.uint32)
    ties = (np.arange(0x3800, 0x4800, dtype=np.uint32) << 16) + np.uint32(0x8000 if dtype == "bfloat16" else 0x1000)
    values = np.concatenate(
        [patterns, ties, np.array([0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001], dtype=np.uint32)]
    )
    masters = np.concatenate([values, values | 0x80000000]).view(np.float32)
    param = parameter(np.ones(masters.shape), dtype)
    optimizer = ASGD(0.0, 3, [param], weight_decay=0.1, multi_precision=True)
    for _ in range(2):
        param.grad = tensor(rounded(np.zeros(masters.shape), dtype))
        optimizer.step()
        optimizer.state_dict()["master_weights"][param.name].set_value(masters)
    optimizer.step()
    assert param.numpy().tobytes() == rounded(masters, dtype).tobytes()


@half
def test_without_master_weights_every_step_is_rounded_and_one_warning_says_so(dtype: str) -> None:
    """Each step starts from what the parameter was rounded to, and ends at most half a unit beside the formula."""
    problem = Quadratic(batches=3, shapes=[[257], [5]])
    params = [parameter(value, dtype) for value in problem.start]
    optimizer = ASGD(0.1, 3, params, weight_decay=0.1)
    sag = Sag([widened(param.numpy()) for param in params], 3, weight_decay=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(11):
            sag.x = [widened(param.numpy()) for param in params]
            grads = [rounded(g, dtype) for g in problem.gradients(step, sag.x)]
            for param, grad in zip(params, grads):
                param.grad = tensor(grad)
            optimizer.step()
            sag.step([widened(grad) for grad in grads], 0.1)
            for p, param in enumerate(params):
                got, right = widened(param.numpy()), sag.x[p]
                kept_bits = {"bfloat16": 8, "float16": 11}[dtype]
                half_unit = 2.0 ** (np.frexp(right)[1] - kept_bits) / 2
                # The float32 arithmetic before the rounding is wrong by some 2^-24 of the numbers it adds up.
                assert np.all(np.abs(got - right) <= half_unit + 2e-7 * (np.abs(right) + 1))
                sag.check(p, wide_state(optimizer, param), 1e-6)
    assert ["multi_precision=True" in str(warning.message) for warning in caught] == [True]
    assert "master_weights" not in optimizer.state_dict()


@rounding_is_meant
@half
@pytest.mark.parametrize("multi_precision", [True, False], ids=["master", "no_master"])
def test_float32_gradients_of_16_bit_parameters(dtype: str, multi_precision: bool) -> None:
    """main_grad: the history keeps what it was given, in float32."""
    problem = Quadratic(batches=3, shapes=[[257]])
    network = Network(problem)
    network.to(dtype=dtype)
    (param,) = network.parameters()
    optimizer = ASGD(0.1, 3, [param], weight_decay=0.1, multi_precision=multi_precision)
    sag = Sag([widened(param.numpy())], 3, weight_decay=0.1)
    for step in range(11):
        (grad,) = problem.gradients(step, [widened(param.numpy())])
        param.main_grad = paddle.to_tensor(grad.astype("float32"))
        optimizer.step()
        sag.step([grad.astype("float32")], 0.1)
        state = wide_state(optimizer, param)
        assert state["y"].dtype == np.float32
        if multi_precision:
            state["x"] = master_of(optimizer, param)
        sag.check(0, state, 1e-6)
        if not multi_precision:
            sag.x = [widened(param.numpy())]


@rounding_is_meant
@half
@pytest.mark.parametrize("grad_dtype", ["half", "float32"])
@pytest.mark.parametrize("multi_precision", [True, False], ids=["master", "no_master"])
def test_memory(dtype: str, grad_dtype: str, multi_precision: bool) -> None:
    """Per element: 4 bytes of d, n gradients, 4 bytes of master weight; per parameter: 8 bytes of m."""
    shapes, n = [[257], [3, 5], []], 7
    params = [parameter(np.ones(shape), dtype) for shape in shapes]
    optimizer = ASGD(0.1, n, params, weight_decay=0.1, multi_precision=multi_precision)
    grads = [np.ones(shape, "float32") for shape in shapes]
    if grad_dtype == "half":
        grads = [rounded(grad, dtype) for grad in grads]
    optimizer.apply_gradients([(p, paddle.to_tensor(g)) for p, g in zip(params, grads)])
    state = optimizer.state_dict()
    del state["batch_num"]  # one for all parameters
    tensors = [*state.pop("master_weights", {}).values(), *state.values()]
    elements = sum(param.size for param in params)
    an_element = 4 + n * (2 if grad_dtype == "half" else 4) + (4 if multi_precision else 0)
    assert sum(t.numpy().nbytes for t in tensors) == an_element * elements + 8 * len(params)


@rounding_is_meant
@half
@pytest.mark.parametrize("steps_before", [0, 4])
def test_multi_precision_switched_on_later(dtype: str, steps_before: int) -> None:
    """What paddle.amp.decorate does to an optimizer that exists. History gathered before goes on being used."""
    problem = Quadratic(batches=3, shapes=[[257]])
    param = parameter(problem.start[0], dtype)
    optimizer = ASGD(0.1, 3, [param], weight_decay=0.1)
    sag = Sag([widened(param.numpy())], 3, weight_decay=0.1)
    for step in range(11):
        if step == steps_before:
            optimizer._multi_precision = True
        grad = gradient(problem, step, param, dtype)
        param.grad = tensor(grad)
        optimizer.step()
        sag.step([widened(grad)], 0.1)
        if step < steps_before:
            sag.x = [widened(param.numpy())]
        else:
            sag.check(0, {"x": master_of(optimizer, param), **wide_state(optimizer, param)}, 1e-6)
            assert param.numpy().tobytes() == rounded(master_of(optimizer, param), dtype).tobytes()


@rounding_is_meant
@half
@pytest.mark.parametrize("multi_precision", [True, False], ids=["master", "no_master"])
@pytest.mark.parametrize("beside", [[]] + [[0, 3]] * PIR, ids=["alone", "beside_an_empty_one"][: 1 + PIR])
def test_static_graphs_give_the_bits_of_dygraph(dtype: str, multi_precision: bool, beside: list) -> None:
    """An executor takes a list with an empty tensor in it for no list at all, that of the master weights included."""
    problem = Quadratic(batches=3, shapes=[[257]])
    param = parameter(np.ones(257), dtype)
    optimizer = ASGD(0.1, 3, [param], weight_decay=0.1, multi_precision=multi_precision)
    paddle.enable_static()
    main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
    with paddle.static.program_guard(main, startup):
        x = paddle.create_parameter([257], dtype, name="x", default_initializer=paddle.nn.initializer.Constant(1.0))
        fed = paddle.static.data("grad", [257], dtype)
        pairs = [(x, fed)]
        if beside:
            pairs += [
                (
                    paddle.create_parameter(
                        beside, dtype, name="z", default_initializer=paddle.nn.initializer.Constant(1.0)
                    ),
                    paddle.static.data("none", beside, dtype),
                )
            ]
        ASGD(0.1, 3, weight_decay=0.1, multi_precision=multi_precision).apply_gradients(pairs)
    executor = paddle.static.Executor()
    owner = "x_fp32_master_0" if multi_precision else "x"
    with paddle.static.scope_guard(scope):
        executor.run(startup)
        for step in range(11):
            grad = gradient(problem, step, param, dtype)
            nothing = {"none": np.zeros(beside, grad.dtype)} if beside else {}
            executor.run(main, feed={"grad": grad, **nothing}, fetch_list=[])
            paddle.disable_static()
            param.grad = tensor(grad)
            optimizer.step()
            expected = {"x": param.numpy(), **state_of(optimizer, param)}
            if multi_precision:
                expected["master"] = master_of(optimizer, param)
            paddle.enable_static()
            names = {"x": "x", "master": "x_fp32_master_0", **{name: f"{owner}_{name}_0" for name in "dym"}}
            got = {name: np.array(scope.find_var(names[name]).get_tensor()) for name in expected}
            assert bits(got) == bits(expected)


def frozen_bits(optimizer: Any, param: paddle.Tensor) -> dict:
    masters = optimizer.state_dict().get("master_weights", {})
    return bits({**state_of(optimizer, param), **{name: t.numpy() for name, t in masters.items()}})


@pytest.mark.parametrize("dtype", [*DTYPES, "float32", "float64"])
def test_a_step_with_found_inf_changes_nothing(dtype: str) -> None:
    """GradScaler leaves a tensor in found_inf and expects to find its truth there afterwards."""
    problem = Quadratic(batches=3, shapes=[[257]])
    wide = dtype in ("float32", "float64")
    param = problem.parameters(dtype)[0] if wide else parameter(problem.start[0], dtype)
    optimizer = ASGD(0.1, 3, [param], weight_decay=0.1, multi_precision=not wide)
    sag = Sag([param.numpy() if wide else widened(param.numpy())], 3, weight_decay=0.1)
    for step in range(11):
        (grad,) = problem.gradients(step, sag.x)
        grad = grad.astype(dtype) if wide else rounded(grad, dtype)
        skip = step in (2, 3, 7)
        before = step and frozen_bits(optimizer, param)
        param.grad = paddle.to_tensor(np.full_like(grad, 0x7F80 if dtype == "bfloat16" else np.inf) if skip else grad)
        optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([skip]))
        optimizer.step()
        assert optimizer._get_auxiliary_var("found_inf") is skip
        if skip:
            assert frozen_bits(optimizer, param) == before
            continue
        sag.step([grad if wide else widened(grad)], 0.1)
        x = param.numpy() if wide else master_of(optimizer, param)
        sag.check(0, {**(state_of if wide else wide_state)(optimizer, param), "x": x}, 1e-6)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@half
def test_amp_decorate_and_grad_scaler(dtype: str) -> None:
    """The front end of mixed precision, which does nothing on a CPU."""
    paddle.seed(3)
    model = paddle.nn.Sequential(paddle.nn.Linear(13, 31), paddle.nn.Tanh(), paddle.nn.Linear(31, 1))
    optimizer = ASGD(0.05, 3, model.parameters(), weight_decay=0.1)
    model, optimizer = paddle.amp.decorate(model, optimizer, level="O2", dtype=dtype)
    scaler = paddle.amp.GradScaler(init_loss_scaling=2.0**10, decr_every_n_nan_or_inf=1)
    batches = [(paddle.randn([16, 13]), paddle.randn([16, 1])) for _ in range(3)]
    sags: dict[str, Sag] = {}
    for step in range(11):
        x, target = batches[step % 3]
        x = x * 1e38 if step == 5 else x
        with paddle.amp.auto_cast(level="O2", dtype=dtype):
            loss = (model(x).astype("float32") - target).square().mean()
        scale = scaler._scale.item()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for param in model.parameters():
            if param.name not in sags:
                sags[param.name] = Sag([param.astype("float32").numpy()], 3, weight_decay=0.1)
            grad = param.grad.astype("float32").numpy()
            if step != 5:
                sags[param.name].step([grad], 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.clear_grad()
        assert scaler._scale.item() == (scale / 2 if step == 5 else scale)
        for param in model.parameters():
            sags[param.name].check(0, {"x": master_of(optimizer, param)}, 1e-5)
