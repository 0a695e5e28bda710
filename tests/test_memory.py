# SPDX-License-Identifier: Apache-2.0
"""What steps do to memory: they take nothing of a parameter's size, and leak nothing however many they are.

In processes of their own, whose memory nobody else uses. Must not test the size of the state (test_edges.py).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MIB = 2**20
#: Of float32, so a parameter of 16 MiB.
ELEMENTS = 4 * MIB

PRELUDE = """
import sys, warnings
warnings.simplefilter("ignore")
import paddle
from paddle_asgd import ASGD, AveragedSGD, shortcut

if sys.argv[1] == "the full way":
    shortcut.Shortcut.of = lambda *arguments: None

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def optimizer_for(params):
    if "averaged" in sys.argv:
        return AveragedSGD(1e-6, t0=0, parameters=params, weight_decay=0.1)
    return ASGD(1e-6, 3, params, weight_decay=0.1)

def optimizer_of(*shapes):
    params = [paddle.create_parameter(list(shape), "float32") for shape in shapes]
    for param in params:
        param.grad = paddle.full(param.shape, 0.25)
    return optimizer_for(params)

def take(steps, optimizer):
    for _ in range(steps):
        optimizer.step()
"""

# Paddle's allocator does not see what C++ takes by itself; and what it keeps in reserve, the process need not ask for.
PEAKS = """
optimizer = optimizer_of([int(sys.argv[2])])
core, kind = paddle.base.core, ("Allocated", 0)
take(2, optimizer)
print(core.host_memory_stat_current_value(*kind), core.host_memory_stat_peak_value(*kind))
print(status("VmRSS"), status("VmHWM"))
take(30, optimizer)
print(core.host_memory_stat_peak_value(*kind), status("VmHWM"))
"""

GROWTH = """
optimizer = optimizer_of([3], [2, 5])
take(10_000, optimizer)
before = status("VmRSS")
take(90_000, optimizer)
print(status("VmRSS") - before)
"""


def numbers(code: str, *arguments: str) -> list[int]:
    """What the code printed."""
    command = [sys.executable, "-c", PRELUDE + code, *arguments]
    # Else glibc keeps large blocks that were freed, and a temporary would hide in them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB // 4)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-500:]
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("optimizer", ["ASGD", "averaged"])
@pytest.mark.parametrize("way", ["the shortcut", "the full way"])
def test_a_step_takes_nothing_of_a_parameters_size(way: str, optimizer: str) -> None:
    allocated, allocated_peak, resident, resident_peak, *later = numbers(PEAKS, way, str(ELEMENTS), optimizer)
    enough = 4 * ELEMENTS // 4
    # Below an earlier peak a step could take what it likes.
    assert allocated_peak - allocated < enough
    assert resident_peak - resident < enough
    assert later[0] - allocated_peak < enough
    assert later[1] - resident_peak < enough


@pytest.mark.parametrize("optimizer", ["ASGD", "averaged"])
@pytest.mark.parametrize("way", ["the shortcut", "the full way"])
def test_a_hundred_thousand_steps_leak_nothing(way: str, optimizer: str) -> None:
    (growth,) = numbers(GROWTH, way, optimizer)
    assert growth < MIB


# In the context lie the averages, and what the context keeps of the weights; behind it, neither that nor anything else.
SWAPS = """
optimizer = optimizer_of([int(sys.argv[2])])
core, kind = paddle.base.core, ("Allocated", 0)
current = lambda: core.host_memory_stat_current_value(*kind)
take(4, optimizer)
print(current())
for _ in range(20):
    with optimizer.averaged_parameters():
        within = current()
    take(1, optimizer)
print(within, current(), core.host_memory_stat_peak_value(*kind))
"""


def test_averaged_parameters_keep_one_copy_of_the_weights_and_give_it_back() -> None:
    before, within, after, peak = numbers(SWAPS, "the shortcut", str(ELEMENTS), "averaged")
    assert within - before == 4 * ELEMENTS
    assert after == before
    assert peak == within


# One row of a sparse gradient, and then another.
SPARSE = """
height = int(sys.argv[2]) // 128
table = paddle.create_parameter([height, 128], "float32")
optimizer = optimizer_for([table])
core, kind = paddle.base.core, ("Allocated", 0)

def take_sparse(steps):
    for step in range(steps):
        rows = paddle.to_tensor([step % height])
        paddle.nn.functional.embedding(rows, table, sparse=True).sum().backward()
        optimizer.step()
        optimizer.clear_grad()

take_sparse(2)
print(core.host_memory_stat_current_value(*kind), core.host_memory_stat_peak_value(*kind))
print(status("VmRSS"), status("VmHWM"))
take_sparse(30)
print(core.host_memory_stat_peak_value(*kind), status("VmHWM"))
"""


@pytest.mark.parametrize("optimizer", ["ASGD", "averaged"])
@pytest.mark.parametrize("way", ["the shortcut", "the full way"])
def test_a_sparse_gradient_takes_nothing_of_a_parameters_size(way: str, optimizer: str) -> None:
    allocated, allocated_peak, resident, resident_peak, *later = numbers(SPARSE, way, str(ELEMENTS), optimizer)
    enough = 4 * ELEMENTS // 4
    assert allocated_peak - allocated < enough
    assert resident_peak - resident < enough
    assert later[0] - allocated_peak < enough
    assert later[1] - resident_peak < enough
