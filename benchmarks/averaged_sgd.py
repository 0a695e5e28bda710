# SPDX-License-Identifier: Apache-2.0
"""A step of AveragedSGD beside one of torch.optim.ASGD: ``python -m benchmarks.averaged_sgd``.

``optimizer.step()`` alone, on the CPU, where both average in every step (t0 = 0) and torch takes its loop
(foreach=False, which is faster there than foreach=True). Must assert nothing about time.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import warnings
from typing import Any, Callable

with warnings.catch_warnings():
    # What Paddle says while it is imported: no ccache, a GPU build on a machine without a GPU.
    warnings.simplefilter("ignore")
    import paddle

    from paddle_asgd import AveragedSGD

from . import measure
from .contestants import LEARNING_RATE

#: How many tensors of how many elements.
SIZES = ((1, 20_000_000), (1_000, 64), (8, 64))
EFFORT = measure.Effort(rounds=21, seconds_a_turn=0.03)


def ours(count: int, length: int, **options: Any) -> Callable[[], Any]:
    params = [paddle.create_parameter([length], "float32") for _ in range(count)]
    for param in params:
        param.grad = paddle.randn([length])
    return AveragedSGD(LEARNING_RATE, parameters=params, **options).step


def torchs(count: int, length: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(1)
    params = [torch.randn(length, requires_grad=True) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(length)
    return torch.optim.ASGD(params, LEARNING_RATE, foreach=False, t0=0).step


def main() -> None:
    print(f"paddle {paddle.__version__}, float32, one step")
    with_torch = importlib.util.find_spec("torch") is not None
    for count, length in SIZES:
        steps = [ours(count, length, t0=0), ours(count, length)] + [torchs(count, length)] * with_torch
        for step in steps:
            for _ in range(3):
                step()
        times = measure.take_turns(steps, EFFORT)
        text = f"  {count:5} x {length:<10,} averaging {statistics.median(times[0]) * 1e3:8.3f} ms, before averaging "
        text += f"{statistics.median(times[1]) * 1e3:8.3f} ms"
        if with_torch:
            ratios = [torch / own for torch, own in zip(times[2], times[0])]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            text += f", torch {statistics.median(times[2]) * 1e3:8.3f} ms: {middle:.1f} x ({low:.1f} to {high:.1f})"
        else:
            text += ", no torch here to compare with"
        # What a step that averages moves at least: it reads three numbers an element, and writes two.
        print(text + f"; {5 * 4 * math.prod((count, length)) / statistics.median(times[0]) / 1e9:.0f} GB/s", flush=True)


if __name__ == "__main__":
    main()
