# SPDX-License-Identifier: Apache-2.0
"""FixedBatchSampler: passes over batches that never change, each known by its number, and the place of a run in them.

Must not know the optimizer, nor compose batches and orders (batches.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized
from functools import partial
from typing import Any

import numpy as np
from paddle.io import BatchSampler, DataLoader

from ..arguments import check_flag, check_int, shown
from ..caller import warn
from ..sharding import gathered, whole_group
from .batches import Batches, check_dataset, check_order, check_ranks, check_state, length_of

#: What ``next`` returns behind the last batch.
_END = object()


class FixedBatchSampler(BatchSampler):
    r"""Batches whose samples stay the same in every epoch; only the order in which the batches come may change.

    The history of the stochastic average gradient has one slot per batch. It is of use only if a slot always meets the
    same samples, in whichever order they come. ``enumerate(loader)`` tells which batch, and so which slot, comes next.
    With :math:`N` samples in :math:`n` batches, batch :math:`b` of :math:`|B_b|` samples has this weight in the mean
    loss:

    .. math:: w_b = n \frac{|B_b|}{N}

    An epoch is :math:`n` steps. Its order depends only on ``seed`` and on the number of the epoch, so all processes and
    a resumed run have the same order. A pass over the loader, with or without ``enumerate``, is one epoch, and after a
    ``break`` the next pass begins the next epoch, as with any sampler. After ``set_state_dict(state_dict())``, or after
    loading a state that was saved in the middle of an epoch, the next pass continues with the rest of that epoch.

    Args:
        dataset: a ``paddle.io.Dataset`` or anything else with a length, which must not change.
        batch_size: samples per batch and rank, a positive int: a batch has ``batch_size * num_replicas`` in all.
        order: ``"reshuffle"`` draws a permutation for every epoch, so that each visits every batch once; use it with
            ``ASGD(..., theta=0.3)``, which then takes SGD's learning rate. ``"replacement"`` draws each batch uniformly
            among all, as the paper does; this order needs no theta. ``"sequential"`` is 0 to n - 1 in every
            epoch (the incremental aggregated gradient). Without theta, ``learning_rate * n`` times the largest
            curvature of the mean loss must stay below 5.4 (``"reshuffle"``) or pi^2 / 2 = 4.93 (``"sequential"``, where
            ``theta=0.3`` raises it to 13).
        shuffle_once: deal the samples to the batches at random, once; False keeps the order of the dataset.
        drop_last: leave out the samples of an incomplete last batch.
        seed: an int of at least 0, the same on all ranks. None draws one from ``numpy.random``, as Paddle's samplers
            do: ``numpy.random.seed`` makes it repeatable, ``paddle.seed`` does not. ``state_dict`` contains it.
        num_replicas: how many ranks share every batch. None asks ``paddle.distributed``, which says 1 in a single
            process.
        rank: which of them this is, 0 to ``num_replicas - 1``. None asks ``paddle.distributed``.

    Attributes:
        batch_num: the number of batches n, and of steps in an epoch.
        batches: the samples of every batch, or of this rank's part of it.
        batch_sizes: the number of samples of every batch, those of all ranks together.
        batch_weights: the weight w_b of every batch. Their mean is 1, and with ``drop_last`` all of them are 1.
        part_weights: ``num_replicas * |part| / |B_b|`` of this rank's part of every batch. All are 1 unless the last
            batch does not divide evenly. Parts then differ by one sample and no sample is repeated, so the ranks' mean
            losses must be multiplied by these weights for their mean to be the mean over the batch:
            ``part_loss(index, loss)`` does that.
        seed: the number from which all draws derive.

    Raises:
        TypeError: an argument is of the wrong type, or the dataset has no length, or is a loader or a sampler.
        ValueError: an argument is out of range, no batch is complete, a batch has fewer samples than there are ranks,
            or several ranks have no seed.

    Examples:
        >>> import paddle
        >>> from paddle_asgd import FixedBatchSampler
        >>> dataset = paddle.io.TensorDataset([paddle.arange(10)])
        >>> sampler = FixedBatchSampler(dataset, batch_size=4, seed=1)
        >>> loader = paddle.io.DataLoader(dataset, batch_sampler=sampler)
        >>> for epoch in range(2):
        ...     for index, (samples,) in sampler.enumerate(loader):
        ...         print(epoch, index, samples.tolist())
        0 1 [0, 5, 9, 2]
        0 2 [3, 8]
        0 1 [0, 5, 9, 2]
        1 2 [3, 8]
        1 1 [0, 5, 9, 2]
        1 0 [4, 1, 6, 7]

    Source: M. Schmidt, N. Le Roux, F. Bach, "Minimizing Finite Sums with the Stochastic Average Gradient", Mathematical
    Programming 162 (2017), Algorithm 1 and section 5.1 (random against cyclic order).
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        order: str = "replacement",
        shuffle_once: bool = True,
        drop_last: bool = False,
        seed: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        length, size = check_dataset(dataset), check_int("batch_size", batch_size, 1)
        self.order, self.shuffle_once = check_order(order), check_flag("shuffle_once", shuffle_once)
        self._length = length
        # Paddle keeps these three; it reads the dataset when it tunes the number of workers.
        super().__init__(dataset=dataset, batch_size=size, drop_last=check_flag("drop_last", drop_last))
        self.num_replicas, self.rank = check_ranks(num_replicas, rank)
        self._seed_is_drawn = seed is None
        self.seed = self._draw_seed() if seed is None else check_int("seed", seed, 0)
        self._batches_of = partial(
            Batches, length, size, self.num_replicas, self.rank, self.order, self.shuffle_once, self.drop_last
        )
        self._batches = self._batches_of(self.seed)
        self.batch_num = self._batches.count
        #: what state_dict saves: the epoch, and how many of its batches have been handed to the user
        self._epoch, self._position = 0, 0
        #: whether a batch of this epoch has been handed out since the state was made or loaded
        self._is_begun = False
        #: whether somebody weighs the losses of unequal parts, or has been told to
        self._weighs_parts = False
        #: how often a pass began or the state was set, by which a pass notices that it is no longer the latest
        self._turns = 0
        #: the batches of a pass that counts what it yields, for the ``__iter__`` that its loader calls
        self._planned: list[int] | None = None

    def _draw_seed(self) -> int:
        """Draw a seed from ``numpy.random``, or take 0 if nothing will be drawn from it.

        Raises:
            ValueError: there are several ranks, which would draw different seeds.
        """
        if not self.shuffle_once and self.order == "sequential":
            return 0  # nothing will be drawn
        if self.num_replicas > 1:
            raise ValueError(
                f"seed: received None with num_replicas={self.num_replicas}, expected an int, the same on every rank, "
                "for all must have the same batches in the same order"
            )
        return int(np.random.randint(2**31, dtype=np.int64))

    @property
    def batch_sizes(self) -> list[int]:
        """The number of samples of every batch, over all ranks."""
        return list(self._batches.sizes)

    @property
    def batch_weights(self) -> list[float]:
        """The weight of every batch in the mean loss, 1 on average, as ``ASGD`` takes it."""
        return self._batches.weights()

    @property
    def part_weights(self) -> list[float]:
        """The factors for the mean losses of this rank's parts of the batches, 1 on average over the ranks."""
        self._weighs_parts = True
        return self._batches.part_weights()

    def part_loss(self, index: int, loss: Any) -> Any:
        """The mean loss of this rank's part of a batch, weighted so that the mean over the ranks is that of the batch.

        Call ``backward()`` of it where ``paddle.DataParallel`` or fleet averages the gradients of several ranks.

        Args:
            index: the number of the batch, as ``enumerate`` gives it.
            loss: the mean loss over this rank's samples of the batch, a tensor or a number.

        Raises:
            TypeError, ValueError: the index is not an int, or not that of a batch.

        Examples:
            >>> sampler = FixedBatchSampler(range(11), batch_size=4, seed=3, num_replicas=2, rank=1)
            >>> sampler.batch_sizes, sampler.part_loss(0, 1.0), round(sampler.part_loss(1, 1.0), 3)
            ([8, 3], 1.0, 1.333)
        """
        index = check_int("index", index, 0)
        if index >= self.batch_num:
            raise ValueError(f"index: received {index}, expected less than batch_num, which is {self.batch_num}")
        self._weighs_parts = True
        weight = self._batches.part_weight(index)
        return loss if weight == 1.0 else loss * weight

    def _warn_of_parts(self, batch: int) -> None:
        """Warn, once, if a batch has been used whose parts are unequal, and nobody has asked for their weights."""
        if self._weighs_parts or not self._batches.is_uneven(batch):
            return
        self._weighs_parts = True
        warn(
            f"FixedBatchSampler: the {self._batches.sizes[batch]} samples of batch {batch} are divided unequally among "
            f"{self.num_replicas} ranks, and the mean of their mean losses is not the mean over the batch. Train on "
            "sampler.part_loss(index, loss), or pass drop_last=True"
        )

    @property
    def batches(self) -> list[list[int]]:
        """The samples of every batch that are this rank's, by their numbers in the dataset."""
        return [self._batches.part(batch) for batch in range(self.batch_num)]

    def epoch_order(self, epoch: int) -> list[int]:
        """The numbers of the batches in the order in which they come in an epoch, past or future.

        Args:
            epoch: the number of the epoch, an int of at least 0.

        Examples:
            >>> sampler = FixedBatchSampler(range(12), batch_size=4, order="reshuffle", seed=3)
            >>> sorted(sampler.epoch_order(5))
            [0, 1, 2]
        """
        return self._batches.epoch_order(check_int("epoch", epoch, 0))

    def __len__(self) -> int:
        """Number of batches in an epoch. A resumed epoch may have fewer left."""
        return self.batch_num

    def __iter__(self) -> Iterator[list[int]]:
        """One pass, for a loader: the samples of batch after batch.

        A loader runs ahead of what it hands out, by how much cannot be seen from here. A pass that does not go through
        ``enumerate`` therefore counts as a whole epoch from its beginning.
        """
        planned, self._planned = self._planned, None
        if planned is None:
            epoch, begin = self._begin()
            planned, self._position, self._is_begun = self.epoch_order(epoch)[begin:], self.batch_num, True
        return map(self._batches.part, planned)

    def enumerate(self, loader: DataLoader) -> Iterator[tuple[int, Any]]:
        """One pass over the loader, as pairs of the batch's number and what the loader made of the batch.

        The numbers are right with any number of workers, because what is handed out is counted here. A batch counts as
        consumed once it is yielded, so call ``state_dict`` after the step. Only one pass may run at a time: continuing
        it after another pass, ``set_state_dict`` or ``set_epoch`` is a RuntimeError.

        Where several ranks train, the beginning of a pass is a collective, ``compare_ranks``.

        Args:
            loader: the ``paddle.io.DataLoader`` whose ``batch_sampler`` is this sampler.

        Raises:
            TypeError: ``loader`` is not a loader.
            ValueError: the loader has another batch sampler, or a dataset of another length than this sampler's, or
                joins the batches of several places; the samplers of the ranks differ.
            RuntimeError: the pass was overtaken by another, or the loader does not give one batch for each asked for.
        """
        if not hasattr(loader, "batch_sampler"):
            raise TypeError(f"loader: received a {type(loader).__name__}, expected a paddle.io.DataLoader")
        if loader.batch_sampler is not self:
            raise ValueError(
                f"loader: received {shown(loader)} with another batch sampler, expected "
                "paddle.io.DataLoader(dataset, batch_sampler=sampler) with this very sampler"
            )
        length = length_of(getattr(loader, "dataset", None))
        if length not in (None, self._length):
            raise ValueError(
                f"loader: received one over a dataset of {length} samples, expected the {self._length} samples that "
                "the sampler was made for"
            )
        if len(getattr(loader, "places", None) or [None]) > 1:
            raise ValueError(
                f"loader: received one for {len(loader.places)} places, which joins as many batches, expected one place"
            )
        return self._pass(loader)

    def _pass(self, loader: DataLoader) -> Iterator[tuple[int, Any]]:
        """The pass of ``enumerate``, whose checks must run before the first batch is asked for.

        Args:
            loader: a loader that suits this sampler. Workers that an earlier pass has left over are stopped first.
        """
        left = getattr(loader, "_iterator", None)
        if getattr(left, "_batches_outstanding", 0):
            _stop(loader, left)
        self.compare_ranks()
        epoch, begin = self._begin()
        turn, order = self._turns, self.epoch_order(epoch)
        self._planned = order[begin:]
        try:
            batches = iter(loader)
            if self._planned is not None:
                raise RuntimeError("the loader's iter() did not begin a pass over its batch sampler, as Paddle's does")
        finally:
            self._planned = None
        try:
            for position in range(begin, self.batch_num):
                batch = next(batches, _END)
                if batch is _END:
                    raise RuntimeError(f"the loader ended after {position} of the epoch's {self.batch_num} batches")
                self._position, self._is_begun = position + 1, True
                yield order[position], batch
                self._warn_of_parts(order[position])
                # This comes before the loader is asked again: with persistent workers both passes would share batches.
                if self._turns != turn:
                    raise RuntimeError(
                        "another pass over the sampler, set_state_dict or set_epoch came in between, expected one pass "
                        "at a time; give what runs in between a loader and a sampler of its own"
                    )
            if next(batches, _END) is not _END:
                raise RuntimeError(f"the loader gave more than the epoch's {self.batch_num} batches")
        except BaseException:
            # Persistent workers may be at work for the pass that has overtaken this one.
            if self._turns == turn or getattr(loader, "_iterator", None) is not batches:
                _stop(loader, batches)
            raise

    def compare_ranks(self) -> None:
        """Refuse to go on where the ranks would not have the parts of the same batches in the same order.

        A collective, if Paddle is in dygraph and ``num_replicas`` is the number of all ranks of ``paddle.distributed``;
        else it does nothing. ``enumerate`` and ``BatchIndexCallback`` call it at the beginning of each pass.

        Raises:
            ValueError: a seed, an order, a place or another setting is not the same on all ranks, or two have the same
                number. It is raised on every rank.
        """
        group = whole_group(self.num_replicas)
        if group is None:
            return
        own = self.state_dict()
        rows = gathered([float(self.rank), *map(_digest, own.values())], group)
        ranks, *columns = zip(*rows)
        if len(set(ranks)) < len(ranks):
            raise ValueError(
                f"rank: received {[int(rank) for rank in ranks]} of the {len(ranks)} processes, expected each number "
                "once; without num_replicas and rank, paddle.distributed is asked"
            )
        differing = [name for name, values in zip(own, columns) if len(set(values)) > 1]
        if differing:
            # The seed first, because what is drawn from it differs in any case.
            name = min(differing, key=lambda name: name != "seed")
            raise ValueError(
                f"{name}: received {own[name]!r} on rank {self.rank} and another value on another rank, expected the "
                "same on all, which otherwise train on different batches; create, load and set the samplers of all "
                "ranks alike"
            )

    def _begin(self) -> tuple[int, int]:
        """Begin a pass; returns its epoch and the number of its batches that have been taken already."""
        if self._is_begun:
            self._epoch, self._position, self._is_begun = self._epoch + 1, 0, False
        self._turns += 1
        return self._epoch, self._position

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass begin an epoch, or continue it if a loaded state lies within it.

        Args:
            epoch: the number of the epoch, an int of at least 0.
        """
        epoch = check_int("epoch", epoch, 0)
        self._go_to(epoch, 0 if self._is_begun or epoch != self._epoch else self._position)

    def _go_to(self, epoch: int, position: int) -> None:
        """Let the next pass begin in an epoch with the batch at ``position``; ends a pass that is running."""
        self._epoch, self._position, self._is_begun = epoch, position, False
        self._turns += 1

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands, in plain values: the same on all ranks, and for any number of workers.

        ``batch_size`` is that of all ranks together, so that a run may be resumed on another number of ranks.

        Examples:
            >>> state = FixedBatchSampler(range(12), batch_size=4, seed=3).state_dict()
            >>> state["epoch"], state["position"], state["seed"]
            (0, 0, 3)
        """
        ended = self._position == self.batch_num
        epoch, position = (self._epoch + 1, 0) if ended else (self._epoch, self._position)
        return {
            "epoch": epoch,
            "position": position,
            "dataset_length": self._length,
            "batch_size": self._batches.whole,
            "order": self.order,
            "shuffle_once": self.shuffle_once,
            "drop_last": self.drop_last,
            "seed": self.seed,
        }

    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next pass continue where ``state_dict`` was called: with what remains of that epoch, then whole ones.

        A seed that was drawn gives way to that of the state.

        Args:
            state_dict: what ``state_dict`` of a sampler with the same batches returned.

        Raises:
            TypeError: the state is not a dict.
            ValueError: an entry is missing, unknown, or belongs to other batches; nothing has been changed then.
        """
        state = check_state(state_dict, self.state_dict(), self.batch_num, self._seed_is_drawn)
        if state["seed"] != self.seed:
            self.seed = state["seed"]
            self._batches = self._batches_of(self.seed)
        self._go_to(state["epoch"], state["position"])

    load_state_dict = set_state_dict

    def __repr__(self) -> str:
        return (
            f"FixedBatchSampler({self._length} samples, batch_num={self.batch_num}, batch_size={self.batch_size}, "
            f"order={self.order!r}, shuffle_once={self.shuffle_once}, drop_last={self.drop_last}, seed={self.seed}, "
            f"num_replicas={self.num_replicas}, rank={self.rank})"
        )


def _stop(loader: DataLoader, batches: Any) -> None:
    """End the workers of a pass that was left early.

    Paddle keeps them until the process ends. Persistent workers would fail in the next pass, or give it batches that
    were left over.

    Args:
        loader: the loader of that pass.
        batches: its iterator.
    """
    if getattr(loader, "_iterator", None) is batches:
        loader._iterator = None
    if hasattr(batches, "_workers"):
        batches._try_shutdown_all(1)


def _digest(value: Any) -> float:
    """A number that is the same for the same value in every process, and that a float64 holds exactly."""
    return float(int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:6], "big"))
