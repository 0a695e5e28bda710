# SPDX-License-Identifier: Apache-2.0
"""update_bn: the statistics of batch normalisation for weights that were averaged. Must not know who averaged them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Callable

import paddle
from paddle.base.framework import in_dygraph_mode
from paddle.nn.layer.norm import _BatchNormBase

from ..arguments import is_tensor, shown
from ..uninterrupted import uninterrupted

#: Those of Paddle that keep statistics; SyncBatchNorm and the sparse ones are among them. InstanceNorm keeps none.
_KINDS = (_BatchNormBase, paddle.nn.BatchNorm)


@paddle.no_grad()
def update_bn(loader: Iterable[Any], model: paddle.nn.Layer, *, call: Callable[[Any], Any] | None = None) -> None:
    r"""Compute the statistics of the model's batch normalisation anew, from the batches of a loader.

    .. math::

        \text{mean} = \sum_k \frac{n_k}{n} \, \text{mean}_k, \quad
            \text{variance} = \sum_k \frac{n_k}{n} \, \text{variance}_k, \quad n = \sum_k n_k

    with the mean and variance that a layer computes of its input k, which has :math:`n_k` values in each channel. An
    average of weights needs it: the statistics of training are those of other weights. The sums are in float64.

    Layers that are frozen keep their statistics: those with ``use_global_stats=True``, and, within a model in training
    mode, those in evaluation mode. All other sublayers stay in the mode in which they are; a model in evaluation mode
    is in training mode meanwhile. A model without a layer to update returns at once, and the loader is not asked.

    However it ends, by an exception or ``KeyboardInterrupt`` too, momenta and modes are what they were; and unless it
    returns, so are the statistics. With several processes each computes the statistics of its own batches.

    Args:
        loader: gives batches: tensors; lists or tuples, of which the model gets the first element; or dicts, of which
            the model gets those entries that its ``forward`` names as arguments, or, if it names none, the dict.
        model: the layer whose sublayers are updated, which holds the averaged weights.
        call: what is called with each batch in place of this, such as ``lambda batch: model(batch[0], batch[2])``.

    Raises:
        TypeError: an argument is of the wrong type, or a batch is none of these.
        ValueError: the loader gives no batch.
        RuntimeError: Paddle is in static graph mode, or a layer ran in a program that ``to_static`` had compiled.

    Examples:
        >>> import paddle
        >>> from paddle_asgd import update_bn
        >>> model = paddle.nn.Sequential(paddle.nn.BatchNorm1D(1), paddle.nn.Linear(1, 1))
        >>> update_bn([paddle.to_tensor([[1.0], [3.0]]), paddle.to_tensor([[8.0], [8.0]])], model)
        >>> model[0]._mean.item(), model[0]._variance.item()
        (5.0, 0.5)

    Source: P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
    section 3.2.
    """
    _check(loader, model, call)
    sublayers = model.sublayers(include_self=True)
    statistics = [_Statistics(layer) for layer in sublayers if _is_updated(layer, model.training)]
    if not statistics:
        return
    call = _caller_of(model) if call is None else call
    ends = [partial(vars(layer).__setitem__, "training", layer.training) for layer in sublayers]
    ends += [end for each in statistics for end in each.ends()]
    try:
        if not model.training:
            model.train()
        for each in statistics:
            each.begin()
        if not _call_for_each(loader, call):
            raise ValueError(f"loader: received {shown(loader)}, which gave no batch, expected at least one")
        results = [copy for each in statistics for copy in each.results()]
        uninterrupted(*results, *ends)
    except BaseException:
        uninterrupted(*(copy for each in statistics for copy in each.undo()), *ends)
        raise


def _call_for_each(loader: Iterable[Any], call: Callable[[Any], Any]) -> int:
    count = 0
    for batch in loader:
        call(batch)
        count += 1
    return count


class _Statistics:
    """The mean and the variance of one layer, summed up behind each of its calls."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._momentum = layer, layer._momentum
        self._tensors = (layer._mean, layer._variance)
        self._kept = [tensor.clone() for tensor in self._tensors]
        self._sums: list[Any] = [0.0, 0.0]
        self._count = 0
        self._hook: Any = None

    def begin(self) -> None:
        # With a momentum of 0, the share of the former statistics, a layer holds those of its last input alone. But 0
        # times infinity or NaN would stay.
        uninterrupted(*self._copies([paddle.zeros_like(self._tensors[0]), paddle.ones_like(self._tensors[1])]))
        self._layer._momentum = 0.0
        self._hook = self._layer.register_forward_post_hook(self._add)

    def _add(self, layer: Any, inputs: Any, output: Any) -> None:
        if not in_dygraph_mode():
            return  # to_static compiles a program: results() will tell
        values = inputs[0].values() if inputs[0].is_sparse() else inputs[0]
        count = values.size // layer._mean.size
        for i, tensor in enumerate(self._tensors):
            self._sums[i] = self._sums[i] + tensor.astype("float64") * count
        self._count += count

    def results(self) -> list[Callable[[], Any]]:
        """What puts the means of the sums into the layer. A layer that was never called keeps what it had."""
        if self._count:
            return self._copies([(total / self._count).astype(t.dtype) for total, t in zip(self._sums, self._tensors)])
        mean, variance = self._tensors
        if not bool((mean == 0).all()) or not bool((variance == 1).all()):
            raise RuntimeError(
                "model: received one whose batch normalisation ran in a program that to_static had compiled, expected "
                "one that runs in dygraph; call paddle.jit.enable_to_static(False) before, and with True afterwards"
            )
        return self.undo()

    def undo(self) -> list[Callable[[], Any]]:
        """What puts the former statistics back."""
        return self._copies(self._kept)

    def ends(self) -> list[Callable[[], Any]]:
        """What is done however it ends."""
        return [partial(vars(self._layer).__setitem__, "_momentum", self._momentum), self._remove_hook]

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _copies(self, values: list[Any]) -> list[Callable[[], Any]]:
        return [partial(tensor.copy_, value, True) for tensor, value in zip(self._tensors, values)]


def _is_updated(layer: Any, model_is_training: bool) -> bool:
    return isinstance(layer, _KINDS) and not layer._use_global_stats and (layer.training or not model_is_training)


def _caller_of(model: paddle.nn.Layer) -> Callable[[Any], Any]:
    """What hands a batch to the model."""
    forward = (model._layers if isinstance(model, paddle.DataParallel) else model).forward
    # to_static puts an object without a signature in its place.
    named = {
        name
        for name, parameter in inspect.signature(getattr(forward, "dygraph_function", forward)).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }

    def call(batch: Any) -> Any:
        if is_tensor(batch):
            return model(batch)
        if isinstance(batch, Mapping):
            chosen = {name: value for name, value in batch.items() if name in named}
            return model(**chosen) if chosen else model(batch)
        if isinstance(batch, (list, tuple)) and batch:
            return model(batch[0])
        raise TypeError(
            f"loader: received {shown(batch)} from it, expected a tensor, a list or tuple that begins with one, or a "
            "dict; pass call=lambda batch: model(...)"
        )

    return call


def _check(loader: Any, model: Any, call: Any) -> None:
    if isinstance(loader, paddle.nn.Layer) or not isinstance(model, paddle.nn.Layer):
        raise TypeError(f"model: received {shown(model)}, expected a paddle.nn.Layer; the loader comes first")
    if is_tensor(loader) or isinstance(loader, (Mapping, str)) or not isinstance(loader, Iterable):
        raise TypeError(
            f"loader: received {shown(loader)}, expected what gives batches, such as a paddle.io.DataLoader"
        )
    if call is not None and not callable(call):
        raise TypeError(f"call: received {shown(call)}, expected a function of a batch, or None")
    if not in_dygraph_mode():
        raise RuntimeError("update_bn: received a call in static graph mode, expected dygraph")
