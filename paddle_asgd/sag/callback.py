# SPDX-License-Identifier: Apache-2.0
"""BatchIndexCallback: tells the optimizer under ``paddle.Model.fit`` which batch comes next.

Must not know how batches are made (batches.py) nor what a step does with the index.
"""

from __future__ import annotations

from typing import Any

from paddle.base.framework import in_dygraph_mode
from paddle.callbacks import Callback

from ..arguments import shown
from ..caller import warn
from .sampler import FixedBatchSampler


class BatchIndexCallback(Callback):
    """Sets the optimizer's ``batch_index`` before every training batch of ``paddle.Model.fit``.

    Each epoch of ``fit`` is the sampler's next pass, so a second ``fit`` or a resumed run continues where the sampler
    stands.

    Args:
        sampler: the ``FixedBatchSampler`` that the training loader has as its ``batch_sampler``.

    Raises:
        TypeError: ``sampler`` is not a ``FixedBatchSampler``.
        RuntimeError: raised when training begins in static graph mode, where an index has to be fed.
        ValueError: raised when training begins with an optimizer that takes no batch index, with one whose
            ``batch_num`` is not the sampler's, or with ``accumulate_grad_batches`` above 1, which would put the
            gradients of several batches into one slot.

    Examples:
        >>> import paddle
        >>> from paddle_asgd import ASGD, BatchIndexCallback, FixedBatchSampler
        >>> x = paddle.randn([40, 3])
        >>> dataset = paddle.io.TensorDataset([x, x.sum(axis=1, keepdim=True)])
        >>> sampler = FixedBatchSampler(dataset, batch_size=8, seed=0)
        >>> loader = paddle.io.DataLoader(dataset, batch_sampler=sampler)
        >>> model = paddle.Model(paddle.nn.Linear(3, 1))
        >>> model.prepare(ASGD(0.1, sampler.batch_num, model.parameters()), paddle.nn.MSELoss())
        >>> model.fit(loader, epochs=2, verbose=0, callbacks=[BatchIndexCallback(sampler)])
    """

    def __init__(self, sampler: FixedBatchSampler) -> None:
        super().__init__()
        if not isinstance(sampler, FixedBatchSampler):
            raise TypeError(f"sampler: received {shown(sampler)}, expected a paddle_asgd.FixedBatchSampler")
        self._sampler = sampler
        self._order: list[int] = []

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuse a training that would fill slots with gradients of other batches.

        Raises:
            RuntimeError: Paddle is in static graph mode.
            ValueError: the optimizer does not suit the sampler, or gradients are accumulated over several batches.
        """
        if not in_dygraph_mode():
            raise RuntimeError(
                "BatchIndexCallback: received a call in static graph mode, expected dygraph; in a static graph the "
                "batch index is a variable that is fed"
            )
        optimizer, expected = self.model._optimizer, self._sampler.batch_num
        if not hasattr(optimizer, "set_batch_index"):
            raise ValueError(f"optimizer: received {shown(optimizer)}, expected one with a batch index, such as ASGD")
        if optimizer.batch_num != expected:
            raise ValueError(
                f"batch_num: received {optimizer.batch_num} of the optimizer, expected {expected}, as the sampler has; "
                "make the optimizer with batch_num=sampler.batch_num"
            )
        accumulated = getattr(self.model, "_accumulate", 1)
        if accumulated != 1:
            raise ValueError(
                f"accumulate_grad_batches: received {accumulated}, expected 1: a slot holds the gradient of one batch; "
                "make the sampler's batches larger instead"
            )
        self._warn_of_parts()

    def _warn_of_parts(self) -> None:
        """Warn of batches that the ranks cannot share evenly: ``fit`` computes the losses and does not weight them."""
        ranks = self._sampler.num_replicas
        uneven = [size for size in self._sampler.batch_sizes if size % ranks]
        if uneven:
            warn(
                f"BatchIndexCallback: a batch of {uneven[0]} samples is divided unequally among {ranks} ranks, and "
                "Model.fit does not weight the losses of unequal parts; pass drop_last=True to the sampler, or train "
                "in a loop of your own on sampler.part_loss(index, loss)"
            )

    def on_epoch_begin(self, epoch: int | None = None, logs: Any = None) -> None:
        """Look up the order of the sampler's next pass, and compare it with that of the other ranks.

        ``epoch`` is not used: the sampler counts its own epochs, which continue in a second ``fit``.
        """
        self._sampler.compare_ranks()
        own = self._sampler.state_dict()["epoch"]
        # Without this, the loader's pass could be of a later epoch than the order below, after one that ended early.
        self._sampler.set_epoch(own)
        self._order = self._sampler.epoch_order(own)[self._sampler.state_dict()["position"] :]

    def on_train_batch_begin(self, step: int, logs: Any = None) -> None:
        """Tell the optimizer which batch comes next: the one at place ``step`` of this epoch's order."""
        self.model._optimizer.set_batch_index(self._order[step])
