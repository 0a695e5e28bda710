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

#: The orders in which batches may come.
ORDERS = ("replacement", "reshuffle", "sequential")


class Batches:
    """``length`` samples in batches of ``size`` samples for each of ``ranks`` ranks.

    Args:
        length: the number of samples.
        size: samples per batch and rank.
        ranks: how many ranks share each batch.
        rank: which of them this is; what is said of parts concerns this rank.
        order: one of ``ORDERS``.
        shuffle: whether samples are dealt to the batches at random; otherwise batches are runs of the dataset.
        drop_last: whether an incomplete last batch is left out.
        seed: the number from which all draws derive.

    Raises:
        ValueError: no batch is complete, or a batch has fewer samples than there are ranks.

    Examples:
        >>> batches = Batches(10, 2, 2, 1, "sequential", False, False, 0)
        >>> batches.sizes, [batches.part(batch) for batch in range(batches.count)]
        ([4, 4, 2], [[2, 3], [6, 7], [9]])
    """

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
        #: numbers of the samples; each batch is a run of them
        self._samples = random(seed, 0).permutation(length) if shuffle else np.arange(length)

    def _check(self, size: int) -> None:
        """Refuse batches of which some rank would get nothing."""
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
        """Where this rank's part of a batch begins and ends among all samples. Parts of two ranks differ by at most one
        sample.
        """
        begin, size = batch * self.whole, self.sizes[batch]
        return begin + size * self.rank // self.ranks, begin + size * (self.rank + 1) // self.ranks

    def part(self, batch: int) -> list[int]:
        """Numbers of the samples of a batch that are this rank's."""
        first, last = self._span(batch)
        return self._samples[first:last].tolist()

    def weights(self) -> list[float]:
        """Weight of each batch in the mean over all samples; 1 on average."""
        return [self.count * size / self._kept for size in self.sizes]

    def part_weights(self) -> list[float]:
        """Weight of this rank's part of each batch in the mean over the batch; 1 on average over the ranks."""
        return [self.part_weight(batch) for batch in range(self.count)]

    def part_weight(self, batch: int) -> float:
        """Weight of this rank's part of one batch."""
        first, last = self._span(batch)
        return self.ranks * (last - first) / self.sizes[batch]

    def is_uneven(self, batch: int) -> bool:
        """Whether the ranks' parts of a batch differ in size, on whichever rank this is asked."""
        return self.sizes[batch] % self.ranks != 0

    def epoch_order(self, epoch: int) -> list[int]:
        """Numbers of the batches in the order in which an epoch has them.

        Args:
            epoch: the number of the epoch, from 0. The seed and this number alone decide the order.
        """
        if self.order == "sequential":
            return list(range(self.count))
        draw = random(self.seed, 1, epoch)
        if self.order == "reshuffle":
            return draw.permutation(self.count).tolist()
        return draw.randint(self.count, size=self.count, dtype=np.int64).tolist()


def random(seed: int, *key: int) -> np.random.RandomState:
    """Generator of random numbers for one purpose.

    NumPy promises that a ``RandomState`` draws the same numbers in all versions, which it does not promise of a
    ``Generator``.

    Args:
        seed: the sampler's seed.
        key: what it is for: 0 for dealing the samples, 1 and the epoch's number for the order of an epoch.
    """
    return np.random.RandomState(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def check_order(value: Any) -> str:
    """Check an order and return it: one of ``ORDERS``.

    Raises:
        TypeError: the value is not a string.
        ValueError: it is another string.
    """
    expected = f"expected one of {', '.join(map(repr, ORDERS))}"
    if not isinstance(value, str):
        raise TypeError(f"order: received {shown(value)}, {expected}")
    if value not in ORDERS:
        raise ValueError(f"order: received {value!r}, {expected}")
    return value


def check_dataset(value: Any) -> int:
    """Check a dataset and return the number of its samples.

    Args:
        value: anything with a length, but no loader and no sampler, whose length is a number of batches.

    Raises:
        TypeError: the value is a loader or a sampler, or has no length.
        ValueError: its length is 0.
    """
    length = length_of(value)
    if isinstance(value, (DataLoader, BatchSampler)):
        # Either would be taken for a dataset of a few samples.
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
    """Number of samples of a dataset; None if it does not have a length."""
    try:
        return None if isinstance(dataset, IterableDataset) else len(dataset)
    except (TypeError, NotImplementedError, RuntimeError, ValueError):
        return None


def check_ranks(num_replicas: Any, rank: Any) -> tuple[int, int]:
    """Check the number of ranks and this rank's number, and return both.

    Args:
        num_replicas: how many ranks there are; None asks ``paddle.distributed``.
        rank: which of them this is; None asks ``paddle.distributed``.

    Raises:
        TypeError: one of them is not an int.
        ValueError: one of them is out of range.
    """
    world = check_int("num_replicas", get_world_size() if num_replicas is None else num_replicas, 1)
    own = check_int("rank", get_rank() if rank is None else rank, 0)
    if own >= world:
        raise ValueError(f"rank: received {own}, expected less than num_replicas, which is {world}; pass both")
    return world, own


def check_state(value: Any, own: dict[str, Any], count: int, any_seed: bool) -> dict[str, Any]:
    """Check a sampler's state, which must mean the same batches as the sampler has, and return it as plain values.

    Args:
        value: what the user passed.
        own: the sampler's present state.
        count: the number of its batches.
        any_seed: whether the state may have another seed, because the sampler's was drawn and not given.

    Raises:
        TypeError: the state is not a dict.
        ValueError: an entry is missing, unknown, out of range, or belongs to other batches.
    """
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
        # True == 1 and 1.0 == 1, but neither is what a state holds.
        if type(state[name]) is not type(own[name]) or state[name] != own[name]:
            refuse_state(f"{name} is {shown(state[name])}, expected {own[name]!r}, as in this sampler")
    return state
