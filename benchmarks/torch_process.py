# SPDX-License-Identifier: Apache-2.0
"""PyTorch's contestants, in a process of their own: its threads and Paddle's disturb each other in one.

The process measures as ``cold.py`` does. It takes one turn for each line that it reads, which names a contestant, and
answers with a line of what it measured. Must not import Paddle.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
from functools import partial
from typing import Any, Callable

from . import cases, cold

#: Bytes of state for each element of a parameter.
BYTES_AN_ELEMENT = {"torch.optim.SGD(fused=True)": 0, "torch.optim.ASGD(t0=0)": 4}


def available() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


class TorchProcess:
    """Starts the process for one model, which must be closed.

    Args:
        model: one of ``cases.MODELS``.
        learning_rate: that of all contestants.
        seconds: as ``cold.Turns`` takes it.
        with_cold: whether turns end with a cold step.
    """

    def __init__(self, model: str, learning_rate: float, seconds: float, with_cold: bool) -> None:
        arguments = json.dumps([model, learning_rate, seconds, with_cold])
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turns_of(self, name: str) -> Callable[[], cold.Turn]:
        """A function that takes one turn of a contestant."""
        return partial(self._turn, name)

    def _turn(self, name: str) -> cold.Turn:
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{name}: its process ended with exit code {self._process.wait()}")
        return cold.Turn(*json.loads(answer))

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _steps(model: str, learning_rate: float) -> dict[str, Callable[[], Any]]:
    import torch

    # As many as the others have.
    torch.set_num_threads(1)
    params = [torch.full(shape, 0.5, requires_grad=True) for shape in cases.MODELS[model]()]
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizers = [
        torch.optim.SGD(params, learning_rate, fused=True),
        torch.optim.ASGD(params, learning_rate, foreach=False, t0=0),
    ]
    return {name: optimizer.step for name, optimizer in zip(BYTES_AN_ELEMENT, optimizers)}


def main() -> None:
    model, learning_rate, seconds, with_cold = json.loads(sys.argv[1])
    taken = {}
    for name, step in _steps(model, learning_rate).items():
        for _ in range(2):
            step()
        taken[name] = cold.Turns(step, seconds, with_cold)
    gc.collect()
    gc.disable()
    for line in sys.stdin:
        print(json.dumps(taken[line.rstrip("\n")]()), flush=True)


if __name__ == "__main__":
    main()
