# SPDX-License-Identifier: Apache-2.0
"""The data that the sampler's tests load, which tell of themselves which samples they are, and loaders of them.

Must not hold tests nor what the sampler is expected to do beyond the order it announces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Callable, ClassVar

import numpy as np
import paddle

from paddle_asgd.sag.sampler import FixedBatchSampler

#: Four batches, the last a short one.
LENGTH, SIZE, N = 11, 3, 4


class Numbers(paddle.io.Dataset):
    """Sample k is the number k. Those divisible by 4 take long, so that workers overtake each other."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> np.ndarray:
        if index % 4 == 0:
            time.sleep(0.005)
        return np.array([index])


def make(order: str = "replacement", **options: Any) -> FixedBatchSampler:
    return FixedBatchSampler(Numbers(), SIZE, order, **{"seed": 9, **options})


class Loader(paddle.io.DataLoader):
    """Paddle's, whose passes are known."""

    passes: ClassVar[list[Any]] = []

    def __iter__(self) -> Any:
        self.passes.append(super().__iter__())
        return self.passes[-1]


def end_workers() -> None:
    """Paddle leaves that to the end of the process."""
    for passing in Loader.passes:
        if hasattr(passing, "_workers"):
            passing._try_shutdown_all()
    Loader.passes.clear()


def workers_alive() -> int:
    return sum(worker.is_alive() for passing in set(Loader.passes) for worker in getattr(passing, "_workers", []))


def loader_of(sampler: FixedBatchSampler, workers: int = 0, **options: Any) -> Loader:
    return Loader(Numbers(), batch_sampler=sampler, num_workers=workers, **options)


def samples_in(batch: Any) -> list[int]:
    tensor = batch[0] if isinstance(batch, (list, tuple)) else batch
    return np.asarray(tensor).ravel().tolist()


def seen(passing: Iterator[tuple[int, Any]]) -> list[tuple[int, list[int]]]:
    return [(index, samples_in(batch)) for index, batch in passing]


def expected(sampler: FixedBatchSampler, epoch: int, begin: int = 0) -> list[tuple[int, list[int]]]:
    return [(index, sampler.batches[index]) for index in sampler.epoch_order(epoch)[begin:]]


def take(passing: Iterator[Any], count: int) -> list[Any]:
    """As a loop that is left with break: the pass ends with it."""
    taken = []
    for item in passing:
        taken.append(item)
        if len(taken) == count:
            break
    return taken


class Fake:
    """A loader that makes of a pass over its sampler what it is told to."""

    def __init__(self, sampler: Any, deliver: Callable[[Any], Any], places: int = 1) -> None:
        self.batch_sampler, self.deliver, self.places = sampler, deliver, [None] * places

    def __iter__(self) -> Iterator[Any]:
        return iter(self.deliver(self.batch_sampler))
