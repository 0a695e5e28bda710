# SPDX-License-Identifier: Apache-2.0
"""AveragedModel's swaps: what is in the model then, what comes back on every way out, and what is refused meanwhile.

Must not test what an average is (test_averaged_model.py).
"""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Callable

import numpy as np
import paddle
import pytest
from averaging import COPIED, Network, arrays, batches, bits, train
from interrupting import Instructions

from paddle_asgd import ASGD, AveragedModel, ema, native
from paddle_asgd.averages import averaged_model

ROUNDED = {"float16": 2**-11, "bfloat16": 2**-8}


class Run:
    """A model in training with its average, and its bits."""

    def __init__(self, dtype: str = "float32", **options: Any) -> None:
        self.model = Network()
        self.optimizer = paddle.optimizer.Momentum(0.05, parameters=self.model.parameters())
        self.averaged = AveragedModel(self.model, ema(0.6), optimizer=self.optimizer, dtype=dtype, **options)
        self.train(4)
        # Layers whose flags differ.
        self.model.norm.eval()
        self.average = arrays(self.averaged.averaged_state_dict())

    def train(self, steps: int) -> None:
        for batch in batches(steps):
            train(self.model, self.optimizer, batch)
            self.averaged.update()

    def content(self) -> dict[str, Any]:
        """All that must come back."""
        momentum = {
            name: entry.numpy().tobytes()
            for name, entry in self.optimizer.state_dict().items()
            if isinstance(entry, paddle.Tensor)
        }
        flags = [layer.training for layer in self.model.sublayers(include_self=True)]
        average = {name: value.tobytes() for name, value in arrays(self.averaged.averaged_state_dict()).items()}
        return {"weights": bits(self.model), "momentum": momentum, "flags": flags, "average": average}

    def holds_the_average(self) -> bool:
        """True of the average to the bit, False of the weights."""
        found, differs = arrays(self.model), []
        for name, value in self.average.items():
            if name not in COPIED:  # they may not have changed since the last update
                differs.append(found[name].tobytes() != value.tobytes())
        assert all(differs) or not any(differs)
        return not any(differs)


@pytest.fixture
def run() -> Run:
    return Run()


def disturb(run: Run) -> None:
    """What a context may do to what must come back."""
    run.model.eval()
    run.model.norm.train()
    run.model(batches(1, seed=9)[0])


# ---- Ways out --------------------------------------------------------------------------------------------------------


def by_error(run: Run) -> None:
    with run.averaged.averaged_parameters():
        run.model.eval()
        raise ArithmeticError


def by_interrupt(run: Run) -> None:
    with run.averaged.apply():
        run.model.eval()
        raise KeyboardInterrupt


def by_a_closed_generator(run: Run) -> None:
    def predictions() -> Iterator[Any]:
        with run.averaged.averaged_parameters():
            run.model.eval()
            while True:
                yield run.model(batches(1)[0])

    generator = predictions()
    next(generator)
    assert run.holds_the_average()
    generator.close()


def by_the_end(run: Run) -> None:
    with run.averaged.averaged_parameters() as given:
        assert given is run.averaged
        run.model.eval()


def by_restore(run: Run) -> None:
    run.averaged.apply()
    run.model.eval()
    assert run.holds_the_average()
    run.averaged.restore()


def by_restore_after_a_context(run: Run) -> None:
    with run.averaged.apply(need_restore=False):
        run.model.eval()
    assert run.holds_the_average()
    run.averaged.restore()


def by_restore_within(run: Run) -> None:
    with run.averaged.averaged_parameters():
        run.averaged.restore()


def by_a_refused_swap(run: Run) -> None:
    with run.averaged.averaged_parameters(), run.averaged.averaged_parameters():
        raise AssertionError


WAYS: list[Callable[[Run], None]] = [
    *(by_error, by_interrupt, by_a_closed_generator, by_the_end, by_restore, by_restore_after_a_context),
    *(by_restore_within, by_a_refused_swap),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_all_comes_back_to_the_bit(way: Callable[[Run], None], dtype: str) -> None:
    run = Run(dtype)
    before = run.content()
    assert not run.holds_the_average()
    with suppress(ArithmeticError, KeyboardInterrupt, RuntimeError):
        way(run)
    assert run.content() == before
    # And it goes on.
    run.train(2)
    assert run.averaged.num_updates == 6
    by_the_end(run)


def test_statistics_that_change_within_stay_with_the_average(run: Run) -> None:
    before = bits(run.model)
    with run.averaged.averaged_parameters():
        disturb(run)
        changed = run.model.norm._mean.numpy().copy()
        assert changed.tobytes() != before["norm._mean"]
    assert bits(run.model) == before
    assert [layer.training for layer in run.model.sublayers()] == [True, False, True, True]
    with run.averaged.averaged_parameters():
        assert run.model.norm._mean.numpy().tobytes() == changed.tobytes()


def test_contents_move_and_tensors_stay(run: Run) -> None:
    """So to_static, a step that keeps pointers and DataParallel see what is in the model."""
    pointers = {name: tensor.data_ptr() for name, tensor in run.model.state_dict().items()}
    with run.averaged.averaged_parameters():
        assert {name: tensor.data_ptr() for name, tensor in run.model.state_dict().items()} == pointers
    assert {name: tensor.data_ptr() for name, tensor in run.model.state_dict().items()} == pointers


@pytest.mark.parametrize("name", ["state_dict", "averaged_state_dict"])
def test_what_is_saved_while_swapped_is_the_average(run: Run, name: str) -> None:
    """Nor do weights come into what was taken before."""

    def taken() -> dict[str, np.ndarray]:
        found = getattr(run.averaged, name)()
        return {key: tensor.numpy() for key, tensor in found.get("averages", found).items()}

    outside = taken()
    expected = {key: value.tobytes() for key, value in outside.items()}
    before = getattr(run.averaged, name)()
    with run.averaged.averaged_parameters():
        within = getattr(run.averaged, name)()
        assert {key: value.tobytes() for key, value in taken().items()} == expected
        tensors = before.get("averages", before)
        assert {key: tensor.numpy().tobytes() for key, tensor in tensors.items()} == expected
    tensors = within.get("averages", within)
    assert {key: tensor.numpy().tobytes() for key, tensor in tensors.items()} == expected


@pytest.mark.parametrize("average", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_are_rounded_once_and_come_back(dtype: str, average: str) -> None:
    model = paddle.nn.Layer()
    draw = np.random.default_rng(4)
    model.x = model.create_parameter([1000], dtype=dtype)
    model.x.set_value(paddle.to_tensor(draw.normal(size=1000).astype("float32")).astype(dtype))
    averaged = AveragedModel(model, ema(0.7), dtype=average)
    model.x.set_value(paddle.to_tensor(draw.normal(size=1000).astype("float32")).astype(dtype))
    averaged.update()
    before, exact = model.x.numpy().tobytes(), averaged.state_dict()["averages"]["x"].numpy().astype("float64")
    with averaged.averaged_parameters():
        found = model.x.astype("float32").numpy()
        saved = averaged.averaged_state_dict()["x"]
        assert saved.numpy().tobytes() == model.x.numpy().tobytes()
        assert averaged.state_dict()["averages"]["x"].numpy().astype("float64").tobytes() == exact.tobytes()
    assert model.x.numpy().tobytes() == before
    assert str(saved.dtype) == str(model.x.dtype)
    # Half a unit in the last place, so rounded once.
    assert (np.abs(found - exact) <= ROUNDED[dtype] * np.abs(exact) + 2.0**-25).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_master_weights_are_averaged(dtype: str) -> None:
    model = paddle.nn.Layer()
    model.x = model.create_parameter([300], dtype="bfloat16")
    model.x.set_value(paddle.linspace(0.5, 2.0, 300).astype("bfloat16"))
    # Paddle's own optimizers take no 16-bit step on the CPU.
    optimizer = ASGD(1e-4, 1, [model.x], multi_precision=True)
    draw = np.random.default_rng(4)
    for step in range(50):
        model.x.grad = paddle.to_tensor(draw.normal(size=300).astype("float32")).astype("bfloat16")
        optimizer.step()
        (master,) = optimizer._master_weights.values()
        if step == 0:
            # Made in mid-training, it starts as the master weights.
            averaged = AveragedModel(model, ema(0.9), optimizer=optimizer, dtype=dtype)
            expected = master.numpy().astype("float64")
            assert expected.tobytes() == averaged.state_dict()["averages"]["x"].numpy().astype("float64").tobytes()
            continue
        averaged.update()
        expected += 0.1 * (master.numpy().astype("float64") - expected)
    np.testing.assert_allclose(averaged.state_dict()["averages"]["x"].numpy(), expected, rtol=1e-6)
    weights, masters = model.x.numpy().tobytes(), master.numpy().tobytes()
    with averaged.averaged_parameters():
        found = model.x.astype("float32").numpy()
        assert (np.abs(found - expected) <= (2**-8 + 1e-6) * np.abs(expected)).all()
    assert (model.x.numpy().tobytes(), master.numpy().tobytes()) == (weights, masters)


# ---- What is refused -------------------------------------------------------------------------------------------------

WITHIN: dict[str, Callable[[Run], Any]] = {
    "apply": lambda run: run.averaged.apply(),
    "averaged_parameters": lambda run: run.averaged.averaged_parameters().__enter__(),
    "update": lambda run: run.averaged.update(),
    "set_state_dict": lambda run: run.averaged.set_state_dict(run.averaged.state_dict()),
    "copy_to": lambda run: run.averaged.copy_to(run.model),
    "step": lambda run: run.optimizer.step(),
    "minimize": lambda run: run.optimizer.minimize(run.model(batches(1)[0]).mean()),
    "_apply_optimize": lambda run: run.optimizer._apply_optimize(None, None, []),
}


@pytest.mark.parametrize("name", WITHIN)
def test_what_is_refused_while_the_average_is_in(run: Run, name: str) -> None:
    before = run.content()
    with run.averaged.averaged_parameters():
        within = run.content()
        with pytest.raises(RuntimeError, match=r"^\w+: received a call while the average is in the model, expected"):
            WITHIN[name](run)
        assert run.content() == within
    assert run.content() == before


def test_another_average_of_the_same_tensors(run: Run) -> None:
    other = AveragedModel(run.model.first, ema(0.5))
    other.update()
    before = run.content()
    with run.averaged.averaged_parameters():
        for call in (other.apply, other.update):
            with pytest.raises(RuntimeError, match="while the average of another AveragedModel is in the model"):
                call()
    with other.averaged_parameters(), pytest.raises(RuntimeError, match="another AveragedModel"):
        run.averaged.apply()
    assert run.content() == before


def test_an_average_that_is_dropped_while_it_is_in_the_model() -> None:
    model = paddle.nn.Linear(2, 1)
    averaged = AveragedModel(model, ema(0.5))
    averaged.update()
    averaged.apply()
    del averaged
    gc.collect()
    assert not averaged_model._HOLDING_AN_AVERAGE
    AveragedModel(model, ema(0.5)).update()


def test_before_the_first_update(run: Run) -> None:
    averaged = AveragedModel(run.model, ema(0.5), update_after=2)
    for call in (averaged.apply, averaged.averaged_parameters().__enter__):
        with pytest.raises(RuntimeError, match="received a call before the first update, expected an average"):
            call()
        averaged.update()
    assert averaged.num_updates == 0
    averaged.update()
    with averaged.averaged_parameters():
        pass


def test_restore_without_apply(run: Run) -> None:
    with pytest.raises(RuntimeError, match=r"restore: received a call while the weights are in the model, expected ap"):
        run.averaged.restore()
    with pytest.raises(TypeError, match="need_restore: received 1"):
        run.averaged.apply(need_restore=1)


# ---- Interrupts ------------------------------------------------------------------------------------------------------


def use(run: Run) -> None:
    with run.averaged.averaged_parameters():
        run.model.eval()


def swap_in_and_out(run: Run) -> None:
    run.averaged.apply()
    run.averaged.restore()


def update(run: Run) -> None:
    run.optimizer.step()
    run.averaged.update()


@pytest.mark.parametrize("act", [use, swap_in_and_out], ids=lambda act: act.__name__)
def test_an_interrupt_at_any_instruction_of_a_swap(act: Callable[[Run], None]) -> None:
    """Either the average is in the model and restore() brings all back, or it is not, and all is as it was."""
    counting, run = Instructions(), Run()
    counting.run(lambda: act(run))
    before, left_in = run.content(), set()
    for at in range(1, counting.count + 1):
        tracing = Instructions(at)
        with pytest.raises(KeyboardInterrupt):
            tracing.run(lambda: act(run))
        if run.averaged._applied is not None:
            left_in.add(tracing.where)
            assert run.holds_the_average()
            run.averaged.restore()
        assert run.content() == before
    # Python enters a method before its first line and leaves it behind its last, outside of what they guard. A signal
    # is handled at the former only.
    (leaves,) = _lines(averaged_model._Context.__enter__, "return averaged")
    (enters,) = _lines(averaged_model._Context.__exit__, "def __exit__")
    gaps = {f"averaged_model.py:{line}" for line in (leaves, enters, enters + 1)}
    assert left_in <= gaps if act is use else left_in, left_in


def _lines(function: Any, text: str) -> Iterator[int]:
    source, first = inspect.getsourcelines(function)
    return (number for number, line in enumerate(source, first) if text in line)


def test_an_interrupt_at_any_instruction_of_an_update() -> None:
    run = Run()
    state = run.averaged.state_dict()
    counting = Instructions()
    run.train(0)
    train(run.model, run.optimizer, batches(1)[0])
    counting.run(run.averaged.update)
    after = run.averaged.state_dict()["averages"]["last.bias"].numpy().tobytes()
    taken = 0
    for at in range(1, counting.count + 1, 7):
        run.averaged.set_state_dict(state)
        before = run.averaged.state_dict()["averages"]["last.bias"].numpy().tobytes()
        run.averaged._counter.steps += 1
        with pytest.raises(KeyboardInterrupt):
            Instructions(at).run(run.averaged.update)
        found = run.averaged.state_dict()["averages"]["last.bias"].numpy().tobytes()
        assert (run.averaged.num_updates, found) in ((4, before), (5, after))
        taken += run.averaged.num_updates == 5
        run.averaged.update()  # again, or nothing
        assert run.averaged.num_updates == 5
        assert run.averaged.state_dict()["averages"]["last.bias"].numpy().tobytes() == after
    assert counting.count > 100
    assert taken < counting.count // 7


# ---- Memory ----------------------------------------------------------------------------------------------------------

PEAKS = """
import sys, warnings
warnings.simplefilter("ignore")
import paddle
from paddle_asgd import AveragedModel, ema

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

model = paddle.nn.Layer()
model.x = model.create_parameter([4 * 2**20], dtype=sys.argv[1])
averaged = AveragedModel(model, ema(0.9))
averaged.update()
core, kind = paddle.base.core, ("Allocated", 0)
before = core.host_memory_stat_peak_value(*kind), status("VmHWM")
for _ in range(5):
    averaged.update()
    if sys.argv[1] == "float32":
        averaged.apply()
        averaged.restore()
print(core.host_memory_stat_peak_value(*kind) - before[0], status("VmHWM") - before[1])
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_a_parameters_size_is_allocated(dtype: str) -> None:
    """For an update, and for a swap of float32 weights. The parameter has 16 or 8 MiB."""
    printed = subprocess.run([sys.executable, "-c", PEAKS, dtype], capture_output=True, text=True, check=True).stdout
    allocated, resident = map(int, printed.split()[-2:])
    assert allocated == 0
    assert resident < 2**20


def test_swap_of_nothing() -> None:
    native.average_swap([], [])
    native.average_update([], [], 0.5)
