# SPDX-License-Identifier: Apache-2.0
"""The optimizer with a history in 16 and 8 bits against the judge: every way to a step, every kind of gradient.

What encoding does to numbers is test_reference.py's, how d keeps to the history over many steps test_drift.py's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from problems import DRAWN, ON_GPU, TRAINABLE, WEIGHTS, Quadratic, bits, state_of
from reference import BLOCK, Sag, decode
from test_gradients import embed, values_of
from test_gradients import parameter as table
from test_half_precision import DTYPES, master_of, parameter, rounded, rounding_is_meant, tensor, widened
from trial import Trial

from paddle_asgd import ASGD

#: The smallest tensor that is narrow, the largest that is not; last blocks of 1, 127 and, behind a whole one, 1 again.
SIZES = [[4095], [4096], [17, 241], [41, 103], [65, 65]]
NARROW = [65, 65]
KEPT = ("d", "y", "y_scale", "m")
narrow = pytest.mark.parametrize("history", ["int16", "int8"])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "theta": {"theta": 0.5},
    "batch_weights": {"batch_weights": WEIGHTS},
    "theta and batch_weights": {"theta": 1.0, "batch_weights": WEIGHTS},
}


def kept_bits(optimizer: ASGD, param: paddle.Tensor) -> dict:
    return bits(state_of(optimizer, param, KEPT))


def draws(shape: list[int], count: int, seed: int = 6) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.normal(size=shape).astype("float32") for _ in range(count)]


# ---- The steps -------------------------------------------------------------------------------------------------------


@narrow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_the_judges(history: str, dtype: str, options: dict[str, Any]) -> None:
    """Integers and scales to the bit after every step, and the rest to the rounding of the arithmetic."""
    trial = Trial(n=5, dtype=dtype, shapes=SIZES, history_dtype=history, **options)
    assert [stored is not None for stored in trial.sag.stored] == [False, True, True, True, True]
    for index in DRAWN:
        trial.step(index=index)
    assert trial.optimizer.gradient_norm() == pytest.approx(trial.sag.gradient_norm(), rel=1e-6)


@narrow
def test_slots_that_take_turns(history: str) -> None:
    """Without a batch index, and beside tensors of any shape."""
    trial = Trial(n=4, dtype="float32", shapes=TRAINABLE, history_dtype=history)
    for _ in range(13):
        trial.step()
    assert sum(stored is not None for stored in trial.sag.stored) == 1


def test_each_group_its_own() -> None:
    problem = Quadratic(3, [NARROW] * 3)
    params = problem.parameters()
    kinds = ["int8", None, "int16"]
    groups = [{"params": [p], "history_dtype": kind} for p, kind in zip(params, kinds)]
    optimizer = ASGD(0.1, 3, groups, weight_decay=0.1, history_dtype="int16")
    sags = [Sag([start], 3, 0.1, history_dtype=kind) for start, kind in zip(problem.start, kinds)]
    for step in range(8):
        problem.backward(step, params)
        grads = [param.grad.numpy() for param in params]
        optimizer.step()
        optimizer.clear_grad()
        for param, grad, sag in zip(params, grads, sags):
            sag.step([grad], 0.1)
            sag.check(0, state_of(optimizer, param, KEPT), 1e-6)


@narrow
@pytest.mark.parametrize("way", ["plan", "full"])
def test_plan_and_full_path_have_the_same_bits(history: str, way: str, request: pytest.FixtureRequest) -> None:
    problem = Quadratic(5, SIZES)
    found = []
    for planned in (way == "plan", False):
        params = problem.parameters()
        optimizer = ASGD(0.1, 5, params, weight_decay=0.1, history_dtype=history, theta=0.3, batch_weights=WEIGHTS)
        plans = 0
        for index in DRAWN:
            if not planned:
                optimizer._shortcut = None
            plans += optimizer._shortcut is not None
            problem.backward(index, params)
            optimizer.batch_index = index
            optimizer.step()
            optimizer.clear_grad()
        assert (plans > 10) is (planned and not request.config.getoption("--no-shortcut"))
        found.append([kept_bits(optimizer, param) for param in params])
    assert found[0] == found[1]


# ---- Gradients and parameters ----------------------------------------------------------------------------------------


@rounding_is_meant
@narrow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["half", "main_grad"])
@pytest.mark.parametrize("multi_precision", [True, False], ids=["master", "no_master"])
def test_16_bit_parameters(history: str, dtype: str, given: str, multi_precision: bool) -> None:
    """With gradients of 16 bits, and with float32 ones in main_grad."""
    problem = Quadratic(3, [NARROW])
    network = paddle.nn.Layer()
    network.x = network.create_parameter(NARROW, default_initializer=paddle.nn.initializer.Assign(problem.start[0]))
    network.to(dtype=dtype)
    (param,) = network.parameters()
    optimizer = ASGD(0.1, 3, [param], weight_decay=0.1, multi_precision=multi_precision, history_dtype=history)
    sag = Sag([widened(param.numpy())], 3, weight_decay=0.1, history_dtype=history)
    for step in range(11):
        (grad,) = problem.gradients(step, [widened(param.numpy())])
        if given == "half":
            half = rounded(grad, dtype)
            param.grad, grad = tensor(half), widened(half)
        else:
            grad = grad.astype("float32")
            param.main_grad = paddle.to_tensor(grad)
        optimizer.step()
        sag.step([grad], 0.1)
        state = state_of(optimizer, param, KEPT)
        del state["x"]
        if multi_precision:
            state["x"] = master_of(optimizer, param)
            assert param.numpy().tobytes() == rounded(state["x"], dtype).tobytes()
        sag.check(0, state, 1e-6)
        if not multi_precision:
            sag.x = [widened(param.numpy())]


@rounding_is_meant
@narrow
@pytest.mark.parametrize("dtype", ["float32", "float64", *DTYPES])
@pytest.mark.parametrize("theta", [None, 0.5])
def test_static_graphs_give_the_bits_of_dygraph(history: str, dtype: str, theta: float | None) -> None:
    grads = draws(NARROW, 11)
    start = np.random.default_rng(7).normal(size=NARROW).astype("float32")
    half = dtype in DTYPES
    if half:
        start = widened(rounded(start, dtype))  # the initializers of some versions of Paddle truncate
    grads = [rounded(g, dtype) if half else g.astype(dtype) for g in grads]
    param = paddle.create_parameter(NARROW, "float32" if half else dtype)
    param.set_value(start.astype("float32" if half else dtype))
    param = parameter(start, dtype) if half else param
    options = {"weight_decay": 0.1, "multi_precision": half, "history_dtype": history, "theta": theta}
    optimizer = ASGD(0.1, 3, [param], **options)
    paddle.enable_static()
    main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
    with paddle.static.program_guard(main, startup):
        assign = paddle.nn.initializer.Assign(start)
        x = paddle.create_parameter(NARROW, dtype, name="x", default_initializer=assign)
        fed = paddle.static.data("grad", NARROW, dtype)
        ASGD(0.1, 3, [x], **options).apply_gradients([(x, fed)])
    executor = paddle.static.Executor()
    names = {"x": "x", **{kept: f"{'x_fp32_master_0' if half else 'x'}_{kept}_0" for kept in KEPT}}
    with paddle.static.scope_guard(scope):
        executor.run(startup)
        for grad in grads:
            executor.run(main, feed={"grad": grad}, fetch_list=[])
            paddle.disable_static()
            param.grad = tensor(grad)
            optimizer.step()
            expected = kept_bits(optimizer, param)
            paddle.enable_static()
            assert bits({kept: np.array(scope.find_var(name).get_tensor()) for kept, name in names.items()}) == expected


@pytest.mark.skipif(ON_GPU, reason="on a GPU, Paddle makes a dense gradient of them before the step")
@narrow
def test_sparse_gradients_have_the_bits_of_dense_ones(history: str) -> None:
    params = [table([700, 7]) for _ in range(2)]
    optimizers = [ASGD(0.1, 3, [param], weight_decay=0.1, theta=0.5, history_dtype=history) for param in params]
    for step in range(8):
        rows = [[3, 699, 3, 0, 3], [*range(699, -1, -1), 2], [55]][step % 3]
        for sparse, param, optimizer in zip((True, False), params, optimizers):
            embed(param, rows, values_of(step, rows, 7), sparse)
            optimizer.step()
            optimizer.clear_grad()
        assert kept_bits(optimizers[0], params[0]) == kept_bits(optimizers[1], params[1])


@narrow
def test_a_step_with_found_inf_changes_nothing(history: str) -> None:
    param = table(NARROW)
    optimizer = ASGD(0.1, 3, [param], history_dtype=history)
    for step, grad in enumerate(draws(NARROW, 9)):
        skip = step in (0, 4, 7)
        before = kept_bits(optimizer, param)
        param.grad = paddle.to_tensor(np.full_like(grad, np.inf) if skip else grad)
        optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([skip]))
        optimizer.step()
        if step:
            assert (kept_bits(optimizer, param) == before) is skip


@narrow
@pytest.mark.parametrize("huge", [1e300, -1.7e308])
def test_float64_gradients_beyond_float32(history: str, huge: float) -> None:
    """They are stored as float32's largest number; the others of their block are lost, and come again."""
    param = paddle.create_parameter(NARROW, "float64")
    optimizer = ASGD(0.0, 2, [param], history_dtype=history)
    sag = Sag([param.numpy()], 2, history_dtype=history)
    for step, grad in enumerate(draws(NARROW, 6)):
        grad = grad.astype("float64")
        if step == 2:
            grad[30, 30] = huge
        param.grad = paddle.to_tensor(grad)
        optimizer.step()
        sag.step([grad], 0.0)
        sag.check(0, state_of(optimizer, param, KEPT), 1e-13)
    assert np.isfinite(param.numpy()).all()


# ---- Blocks of an unusual kind ---------------------------------------------------------------------------------------


@narrow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_unusual_blocks(history: str, dtype: str) -> None:
    """Of zeros, of denormal numbers, with one that is huge, with the sign of zero: no NaN comes of any."""
    draw = np.random.default_rng(8)
    blocks = draw.normal(size=(40, BLOCK)).astype("float32")
    blocks[0] = 0
    blocks[1] = -0.0
    blocks[2] *= np.float32(1e-40)
    blocks[3] *= np.float32(9e-31) / np.abs(blocks[3]).max()
    blocks[4] *= np.float32(1.1e-30) / np.abs(blocks[4]).max()
    blocks[5, 77] = 3e38
    blocks[6, 1] = -1e30
    blocks[7, 1:] = 0
    blocks[8] = np.abs(blocks[8]).max()
    blocks[9] = np.finfo(np.float32).max
    grads = [np.roll(blocks, turn, axis=0).ravel()[:-1] for turn in (0, 3, 11)]
    param = paddle.create_parameter(list(grads[0].shape), dtype)
    optimizer = ASGD(0.0, 2, [param], history_dtype=history, watch=False)
    sag = Sag([param.numpy()], 2, history_dtype=history)
    for grad in grads * 2:
        param.grad = paddle.to_tensor(grad.astype(dtype))
        optimizer.step()
        sag.step([grad], 0.0)
        state = state_of(optimizer, param, KEPT)
        del state["d"]  # two of the largest number are Inf in float32
        sag.check(0, state, 1e-6)
        assert np.isfinite(decode(state["y"][0], state["y_scale"][0]).astype(dtype)).all()


@narrow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_not_finite_stays_in_its_block(history: str, bad: float) -> None:
    """Until its slot has been overwritten and refreshed; what the others become is not touched by a bit."""
    n, at, size = 4, 6, 5 * 1024 + 77
    element = 2 * BLOCK + 9
    others = np.r_[: 2 * BLOCK, 3 * BLOCK : size]
    params = [paddle.zeros([size]) for _ in range(2)]
    for param in params:
        param.stop_gradient = False
    optimizers = [ASGD(0.1, n, [param], history_dtype=history, watch=False) for param in params]
    for step, grad in enumerate(draws([size], at + n + 8 * n + 1)):
        for param, value in zip(params, (grad, np.where(np.arange(size) == element, bad, grad))):
            param.grad = paddle.to_tensor((value if step == at else grad).astype("float32"))
        for optimizer in optimizers:
            optimizer.step()
        clean, hit = (state_of(o, p, KEPT) for o, p in zip(optimizers, params))
        for name in ("x", "d"):
            assert clean[name][others].tobytes() == hit[name][others].tobytes()
        slots = range(n) if not at <= step < at + n else [i for i in range(n) if i != at % n]
        for name in ("y", "y_scale"):
            assert clean[name][slots].tobytes() == hit[name][slots].tobytes()
        if at <= step < at + n and not np.isfinite(bad):
            assert np.isnan(hit["y_scale"][at % n]).nonzero()[0].tolist() == [2]
    y = np.array([decode(q, scale) for q, scale in zip(hit["y"], hit["y_scale"])])
    np.testing.assert_allclose(hit["d"], y.sum(axis=0), rtol=0, atol=1e-6 * np.abs(y).sum(axis=0).max())


# ---- The watch -------------------------------------------------------------------------------------------------------


@narrow
def test_the_watch_compares_with_what_is_decoded(history: str) -> None:
    """All runs of 16 elements, from which it samples, are the same here, so its figures are those of all elements."""
    n, draw = 5, np.random.default_rng(4)
    param = paddle.create_parameter([4096], "float64")
    optimizer = ASGD(0.0, n, [param], history_dtype=history, watch=True)
    sag = Sag([param.numpy()], n, history_dtype=history)
    batches = draw.normal(size=(n, 16)) + np.arange(n)[:, np.newaxis]
    for epoch in range(4):
        replaced = centred = 0.0
        for i in range(n):
            grad = np.tile(batches[i], 256)
            stored = sag.y[0][i].copy()
            param.grad = paddle.to_tensor(grad)
            optimizer.step()
            sag.step([grad], 0.0)
            replaced += np.sum((grad - stored) ** 2)
            centred += np.sum((grad - sag.d[0] / sag.weight_seen(0)) ** 2)
        if epoch:
            # The batches repeat exactly, so what is left is the rounding to integers.
            assert 0 < replaced < 1e-3 * centred
            assert optimizer.variance_ratio == pytest.approx(replaced / centred, rel=1e-9)


# ---- A network -------------------------------------------------------------------------------------------------------


def trained_loss(history: str | None) -> float:
    """Of a small network on the digits, after 50 passes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    batches = [slice(start, start + 128) for start in range(0, 1792, 128)]
    x, y = paddle.to_tensor((images / 16).astype("float32")), paddle.to_tensor(labels)
    paddle.seed(2)
    network = paddle.nn.Sequential(paddle.nn.Linear(64, 96), paddle.nn.ReLU(), paddle.nn.Linear(96, 10))
    optimizer = ASGD(0.2, len(batches), network.parameters(), theta=0.3, history_dtype=history)
    order = np.random.default_rng(2)
    for _ in range(50):
        for index in order.permutation(len(batches)):
            paddle.nn.functional.cross_entropy(network(x[batches[index]]), y[batches[index]]).backward()
            optimizer.batch_index = int(index)
            optimizer.step()
            optimizer.clear_grad()
    with paddle.no_grad():
        return float(paddle.nn.functional.cross_entropy(network(x[:1792]), y[:1792]))


def test_a_network_trains_to_the_same_loss() -> None:
    exact = trained_loss(None)
    assert exact < 0.1
    for history in ("int16", "int8"):
        assert trained_loss(history) == pytest.approx(exact, rel=0.01)
