# SPDX-License-Identifier: Apache-2.0
"""Which samples make up which batch, in which order batches come, and what they weigh: arithmetic, and its checks.

Must not ask a loader for batches, nor know where a run stands (sampler.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from paddle.distributed import get_rank, get_world_size
from paddle.io import BatchSampler, DataLoader, IterableDataset

from ..arguments import check_int, refuse_state, shown

ORDERS = ("replacement", "reshuffle", "sequential")


class Batches:
    """``length`` samples in batches of ``size`` for each of ``ranks`` ranks; what is told of parts is of ``rank``."""

    def __init__(
        self, length: int, size: int, ranks: int, rank: int, order: str, shuffle: bool, drop_last: bool, seed: int
    ) -> None:
        self.length, self.ranks, self.rank = length, ranks, rank
        self.order, self.seed = order, seed
        #: samples of a complete batch, over all ranks
        self.whole = size * ranks
        self._kept = length // self.whole * self.whole if drop_last else length
        self.count = -(-self._kept // self.whole)
        self.sizes = [min(self.whole, self._kept - begin) for begin in range(0, self._kept, self.whole)]
        self._check(size)
        #: every batch is a run of these
        self._samples = random(seed, 0).permutation(length) if shuffle else np.arange(length)

    def _check(self, size: int) -> None:
        if not self.sizes:
            raise ValueError(
                f"batch_size: received {size} for each of {self.ranks} ranks, which makes no complete batch of the "
                f"{self.length} samples with drop_last=True; pass a smaller batch_size or drop_last=False"
            )
        if self.sizes[-1] < self.ranks:
            raise ValueError(
                f"num_replicas: received {self.ranks}, but {self.sizes[-1]} of the {self.length} samples are left for "
                "the last batch, expected at least one for every rank; pass drop_last=True or another batch_size"
            )

    def _span(self, batch: int) -> tuple[int, int]:
        """Where this rank's part begins and ends; the parts of two ranks differ by one sample at most."""
        begin, size = batch * self.whole, self.sizes[batch]
        return begin + size * self.rank // self.ranks, begin + size * (self.rank + 1) // self.ranks

    def part(self, batch: int) -> list[int]:
        """The samples of a batch that are this rank's."""
        first, last = self._span(batch)
        return self._samples[first:last].tolist()

    def weights(self) -> list[float]:
        """Of every batch in the mean over all samples, 1 on average."""
        return [self.count * size / self._kept for size in self.sizes]

    def part_weights(self) -> list[float]:
        """Of this rank's part in the mean over every batch, 1 on average over the ranks."""
        spans = map(self._span, range(self.count))
        return [self.ranks * (last - first) / size for (first, last), size in zip(spans, self.sizes)]

    def epoch_order(self, epoch: int) -> list[int]:
        """The numbers of the batches in the order in which they come."""
        if self.order == "sequential":
            return list(range(self.count))
        draw = random(self.seed, 1, epoch)
        if self.order == "reshuffle":
            return draw.permutation(self.count).tolist()
        return draw.randint(self.count, size=self.count, dtype=np.int64).tolist()


def random(seed: int, *key: int) -> np.random.RandomState:
    """NumPy keeps what a RandomState draws the same in all versions, which it does not promise of a Generator."""
    return np.random.RandomState(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def check_order(value: Any) -> str:
    """One of ORDERS."""
    expected = f"expected one of {', '.join(map(repr, ORDERS))}"
    if not isinstance(value, str):
        raise TypeError(f"order: received {shown(value)}, {expected}")
    if value not in ORDERS:
        raise ValueError(f"order: received {value!r}, {expected}")
    return value


def check_dataset(value: Any) -> int:
    """The number of samples."""
    length = length_of(value)
    if isinstance(value, (DataLoader, BatchSampler)):
        # They would be taken for a data set of a few samples.
        counted = "" if length is None else f", whose length is its number of batches ({length})"
        raise TypeError(
            f"dataset: received a {type(value).__name__}{counted}, expected the dataset itself, such as loader.dataset"
        )
    if length is None:
        raise TypeError(
            f"dataset: received {shown(value)}, expected a paddle.io.Dataset or anything else with a length; a dataset "
            "that can only be iterated has no fixed batches"
        )
    if length == 0:
        raise ValueError(f"dataset: received {shown(value)} of length 0, expected at least one sample")
    return length


def length_of(dataset: Any) -> int | None:
    """The number of samples; None where there is none."""
    try:
        return None if isinstance(dataset, IterableDataset) else len(dataset)
    except (TypeError, NotImplementedError, RuntimeError, ValueError):
        return None


def check_ranks(num_replicas: Any, rank: Any) -> tuple[int, int]:
    """How many ranks there are and which this is; what is None is asked of paddle.distributed."""
    world = check_int("num_replicas", get_world_size() if num_replicas is None else num_replicas, 1)
    own = check_int("rank", get_rank() if rank is None else rank, 0)
    if own >= world:
        raise ValueError(f"rank: received {own}, expected less than num_replicas, which is {world}; pass both")
    return world, own


def check_state(value: Any, own: dict[str, Any], count: int, any_seed: bool) -> dict[str, Any]:
    """A state that means the same batches as ``own``, of which there are ``count``; the seed may be another."""
    if not isinstance(value, dict):
        raise TypeError(f"set_state_dict: received {shown(value)}, expected a dict")
    for kind, names in (("missing", set(own) - set(value)), ("unknown", set(value) - set(own))):
        if names:
            refuse_state(f"entry {min(names, key=repr)!r} is {kind}")
    state = {name: entry.item() if isinstance(entry, np.generic) else entry for name, entry in value.items()}
    free = {"epoch", "position", "seed"} if any_seed else {"epoch", "position"}
    for name in sorted(free):
        if type(state[name]) is not int or state[name] < 0:
            refuse_state(f"{name} is {shown(state[name])}, expected an int of at least 0")
    if state["position"] >= count:
        refuse_state(f"position is {state['position']}, expected less than {count}, the number of batches")
    for name in [name for name in own if name not in free]:
        # True counts as 1, and 1.0 does.
        if type(state[name]) is not type(own[name]) or state[name] != own[name]:
            refuse_state(f"{name} is {shown(state[name])}, expected {own[name]!r}, as in this sampler")
    return state
