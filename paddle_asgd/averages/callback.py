# SPDX-License-Identifier: Apache-2.0
"""WeightAveraging: averages the weights under ``paddle.Model.fit``, and evaluates, predicts and saves with the average.

Must not know how an average is kept or swapped (averaged_model.py).
"""

from __future__ import annotations

from typing import Any, Callable

import paddle
from paddle.base.framework import in_dygraph_mode
from paddle.callbacks import Callback

from ..arguments import shown
from .averaged_model import AveragedModel
from .rules import check_rule, ema

#: What is added to the path of a save: the weights for ``model.load``, and the state for ``WeightAveraging.load``.
WEIGHTS, STATE = "_average.pdparams", ".pdaverage"


class WeightAveraging(Callback):
    """Averages the weights during ``paddle.Model.fit``, and evaluates and predicts with the average.

    An update follows each step of the optimizer; batches that only accumulate gradients and steps that ``GradScaler``
    skips do not count. Before the first update, and during training, the model has its own weights. Pass the callback
    to ``fit``, and to ``evaluate`` and ``predict`` that shall use the average. ``EarlyStopping`` then judges and saves
    the average, wherever it stands in the list. If an evaluation ends with an error, the weights come back at once.

    Every ``model.save(path)`` during ``fit``, that of ``ModelCheckpoint`` included, also writes the average: as weights
    to ``path_average.pdparams``, for ``model.load(path + "_average")``, and with its counts to ``path.pdaverage``, for
    ``load(path)`` here.

    Args:
        average: the rule: ``ema``, ``swa``, ``power_ema``, or a callable that takes t = 1, 2, ... and returns the decay
            in [0, 1].
        options: further arguments of ``AveragedModel``, such as ``update_after``, ``exclude`` or ``dtype``; the
            optimizer is that of the model.

    Attributes:
        averaged_model: the ``AveragedModel``; None before training begins.

    Raises:
        TypeError: the rule or an option is of the wrong type, or ``AveragedModel`` does not have it.
        ValueError: an option is out of range; raised when training begins.
        RuntimeError: raised when training begins in static graph mode, and by ``evaluate`` or ``predict`` before.

    Examples:
        >>> import paddle
        >>> from paddle_asgd import WeightAveraging, ema
        >>> x = paddle.randn([40, 3])
        >>> dataset = paddle.io.TensorDataset([x, x.sum(axis=1, keepdim=True)])
        >>> model = paddle.Model(paddle.nn.Linear(3, 1))
        >>> model.prepare(paddle.optimizer.Adam(0.01, parameters=model.parameters()), paddle.nn.MSELoss())
        >>> averaging = WeightAveraging(ema(0.99, warmup="ratio"))
        >>> model.fit(dataset, epochs=2, batch_size=8, verbose=0, callbacks=[averaging])
        >>> averaging.averaged_model.num_updates
        10
        >>> result = model.evaluate(dataset, verbose=0, callbacks=[averaging])
    """

    def __init__(self, average: Callable[[int], float] = ema(0.999), **options: Any) -> None:
        super().__init__()
        self._average = check_rule("average", average)
        known = AveragedModel.__init__.__kwdefaults__.keys() - {"optimizer"}
        for name in options:
            if name not in known:
                raise TypeError(f"options: received {name}={shown(options[name])}, expected {', '.join(sorted(known))}")
        self._options = options
        self._averaged: AveragedModel | None = None
        self._pending: dict[str, Any] | None = None
        #: the network and the optimizer that the average is of
        self._bound: tuple[Any, Any] = (None, None)
        #: while the average is in the model
        self._context: Any | None = None
        #: while ``fit`` runs, and the model whose methods are ours
        self._training, self._watched = False, None

    @property
    def averaged_model(self) -> AveragedModel | None:
        return self._averaged

    def load(self, path: str) -> None:
        """Go on from the average that a save to ``path`` wrote to ``path.pdaverage``, now or when training begins.

        Raises:
            ValueError: the average does not fit the model or the rule; nothing has been loaded.
        """
        self._pending = paddle.load(path + STATE)
        self._load_pending()

    def _load_pending(self) -> None:
        if self._averaged is not None and self._pending is not None:
            self._averaged.set_state_dict(self._pending)
            self._pending = None

    # ---- Training ---------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin to average, or go on if this is the same network and optimizer as before."""
        if not in_dygraph_mode():
            raise RuntimeError("WeightAveraging: received a call in static graph mode, expected dygraph")
        # A fit or an evaluation before this one may have ended with an error.
        self._leave()
        bound = (self.model.network, self.model._optimizer)
        if self._averaged is None or any(own is not other for own, other in zip(bound, self._bound)):
            self._averaged = AveragedModel(bound[0], self._average, optimizer=bound[1], **self._options)
            self._bound = bound
        self._load_pending()
        self._training = True
        self._watch()

    def on_train_batch_end(self, step: int, logs: Any = None) -> None:
        """Update the average if the batch ended with a step of the optimizer."""
        self._averaged.update()

    def on_train_end(self, logs: Any = None) -> None:
        """Leave the model with its own weights and methods."""
        self._end()

    # ---- Evaluation and prediction ----------------------------------------------------------------------------------

    def on_eval_begin(self, logs: Any = None) -> None:
        """Put the average into the model; before its first update the average is the weights."""
        self._enter("evaluate")

    def on_eval_end(self, logs: Any = None) -> None:
        """Put the weights back, after what all other callbacks do."""
        self._leave()

    def on_predict_begin(self, logs: Any = None) -> None:
        """Put the average into the model, as for an evaluation."""
        self._enter("predict")

    def on_predict_end(self, logs: Any = None) -> None:
        """Put the weights back."""
        self._leave()

    def _enter(self, caller: str) -> None:
        self._leave()
        if self._averaged is None:
            raise RuntimeError(f"WeightAveraging: received a call of {caller} before fit, expected an average")
        self._watch()
        if self._averaged.num_updates > 0:
            self._context = self._averaged.apply()

    def _leave(self) -> None:
        """Put the weights back, if the average is in the model."""
        if self._context is not None:
            context, self._context = self._context, None
            context.__exit__()
        if not self._training:
            self._unwatch()

    def _end(self) -> None:
        self._training = False
        self._leave()

    # ---- Methods of the model ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Stand in for two methods of the model, because no callback is told of an error or of a save."""
        self._unwatch()
        run, save = self.model._run_one_epoch, self.model.save

        def run_one_epoch(data_loader: Any, callbacks: Any, *arguments: Any, **options: Any) -> Any:
            # So that EarlyStopping, which saves when an evaluation ends, finds the average that was evaluated.
            callbacks.callbacks.sort(key=lambda callback: callback is self)
            try:
                return run(data_loader, callbacks, *arguments, **options)
            except BaseException:
                self._end()
                raise

        def save_both(path: str, training: bool = True) -> None:
            save(path, training)
            if training and paddle.distributed.ParallelEnv().local_rank == 0:
                paddle.save(self._averaged.averaged_state_dict(), path + WEIGHTS)
                paddle.save(self._averaged.state_dict(), path + STATE)

        self._watched = self.model
        vars(self.model).update(_run_one_epoch=run_one_epoch, save=save_both)

    def _unwatch(self) -> None:
        if self._watched is not None:
            for method in ("_run_one_epoch", "save"):
                vars(self._watched).pop(method, None)
            self._watched = None
