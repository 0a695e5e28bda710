# SPDX-License-Identifier: Apache-2.0
"""SWALR: a schedule that ends at a constant learning rate. Must not know what is averaged meanwhile."""

from __future__ import annotations

import math
from typing import Any

from paddle.base.framework import in_dygraph_mode
from paddle.optimizer import Optimizer
from paddle.optimizer.lr import LRScheduler, ReduceOnPlateau

from ..arguments import check_flag, check_int, check_number, refuse_state, shown

_ANNEALING = {"cos": lambda x: (1.0 - math.cos(math.pi * x)) / 2.0, "linear": lambda x: x}
#: The entries of a state: of the schedule before, as LinearWarmup of Paddle names its own, and where annealing began.
_BEFORE, _START = "SWALR_LR", "start_lr"


class SWALR(LRScheduler):
    r"""Follows a learning rate or schedule, then anneals to the constant rate of stochastic weight averaging.

    .. math::

        lr_e = lr^{before}_{\min(e, s)} (1 - a) + \text{swa\_lr} \cdot a, \quad
            a = \frac{1 - \cos(\pi x)}{2} \text{ or } x, \quad x = \min(1, \max(0, e - s) / \text{anneal\_epochs})

    after e calls of ``step()``, with :math:`s = \text{swa\_start}`. These are the numbers of
    ``torch.optim.swa_utils.SWALR``. There are two ways to use it.

    * As Paddle's schedulers: ``SGD(SWALR(before, swa_lr=0.05, swa_start=75))``, and ``step()`` once an epoch, where
      ``before`` is a number or the scheduler of the first 75 epochs, which ``SWALR`` then steps.
    * As torch's: ``swa_scheduler = SWALR(optimizer, swa_lr=0.05)``, and in each epoch ``swa_scheduler.step()`` in place
      of ``scheduler.step()`` once averaging has begun. Until its first ``step()`` it does nothing; then it starts from
      the optimizer's learning rate and takes the place of its scheduler.

    Args:
        learning_rate: a number, the scheduler before, or the optimizer, in dygraph, that has one. No
            ``ReduceOnPlateau``, whose ``step`` needs a loss: pass the optimizer instead.
        swa_lr: the constant learning rate at the end, one for all groups: those have multiples of it.
        anneal_epochs: how many calls of ``step()`` annealing takes. With 0 the rate jumps at ``swa_start``; with an
            optimizer at the first ``step()``, where torch's jumps when it is made.
        anneal_strategy: "cos" or "linear".
        swa_start: how many calls of ``step()`` come before annealing. Not with an optimizer.
        last_epoch: how many calls of ``step()`` there were, less 1, as in Paddle's schedulers: -1 at the beginning. The
            scheduler before must stand there too. Not with an optimizer.
        verbose: whether to print the learning rate at each ``step()``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or has no effect with an optimizer.
        RuntimeError: an optimizer is passed in static graph mode.

    Examples:
        >>> import paddle
        >>> from paddle_asgd import SWALR
        >>> linear = paddle.nn.Linear(2, 1)
        >>> scheduler = SWALR(0.5, swa_lr=0.1, anneal_epochs=4, anneal_strategy="linear", swa_start=2)
        >>> optimizer = paddle.optimizer.SGD(scheduler, linear.parameters())
        >>> rates = []
        >>> for epoch in range(7):
        ...     rates.append(round(optimizer.get_lr(), 3))
        ...     scheduler.step()
        >>> rates
        [0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1]

    Source: P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, whose
    annealing is torch's.
    """

    def __init__(
        self,
        learning_rate: float | LRScheduler | Optimizer,
        swa_lr: float,
        anneal_epochs: int = 10,
        anneal_strategy: str = "cos",
        swa_start: int = 0,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.swa_lr = check_number("swa_lr", swa_lr)
        self.anneal_epochs = check_int("anneal_epochs", anneal_epochs, 0)
        if not isinstance(anneal_strategy, str) or anneal_strategy not in _ANNEALING:
            raise (ValueError if isinstance(anneal_strategy, str) else TypeError)(
                f"anneal_strategy: received {shown(anneal_strategy)}, expected 'cos' or 'linear'"
            )
        self.anneal_strategy = anneal_strategy
        self.swa_start = check_int("swa_start", swa_start, 0)
        last_epoch = check_int("last_epoch", last_epoch, -1)
        #: What was passed, as far as it goes on by itself; and the rate at which annealing starts, once it is known.
        self._optimizer, self._before, self._start_lr = None, None, None
        self._take(learning_rate, last_epoch)
        self._is_made = False
        super().__init__(self._rate_before(), last_epoch, check_flag("verbose", verbose))
        self._is_made = True

    def _take(self, learning_rate: Any, last_epoch: int) -> None:
        if isinstance(learning_rate, Optimizer):
            if not in_dygraph_mode():
                raise RuntimeError(
                    "SWALR: received an optimizer in static graph mode, expected a number or an LRScheduler; pass the "
                    "SWALR to the optimizer"
                )
            for name, value, default in (("swa_start", self.swa_start, 0), ("last_epoch", last_epoch, -1)):
                if value != default:
                    raise ValueError(
                        f"{name}: received {value} with an optimizer, expected {default}: its first step() is "
                        "where annealing begins; pass a number or an LRScheduler in place of the optimizer"
                    )
            self._optimizer = learning_rate
        elif isinstance(learning_rate, ReduceOnPlateau):
            raise TypeError(
                "learning_rate: received a ReduceOnPlateau, whose step() needs a loss, expected another scheduler or a "
                "number; pass the optimizer, and step whichever of the two it is the turn of"
            )
        elif isinstance(learning_rate, LRScheduler):
            self._before = learning_rate
        elif isinstance(learning_rate, (int, float)) and not isinstance(learning_rate, bool):
            self._start_lr = check_number("learning_rate", learning_rate)
        else:
            raise TypeError(
                f"learning_rate: received {shown(learning_rate)}, expected a number, an LRScheduler or an optimizer"
            )

    def _rate_before(self) -> float:
        """The learning rate without annealing: what it starts from, where it has begun."""
        if self._before is not None:
            return float(self._before())
        return float(self._optimizer.get_lr()) if self._start_lr is None else self._start_lr

    def get_lr(self) -> float:
        """Return the learning rate after ``last_epoch`` calls of ``step()``."""
        annealed = self.last_epoch - self.swa_start
        # Without annealing, the rate is the last one as soon as averaging begins; of an optimizer, at the first step.
        if annealed < 0 or (annealed == 0 and (self.anneal_epochs > 0 or self._optimizer is not None)):
            return self._rate_before()
        done = _ANNEALING[self.anneal_strategy](min(1.0, annealed / self.anneal_epochs) if self.anneal_epochs else 1.0)
        return self.swa_lr * done + self._rate_before() * (1.0 - done)

    def step(self, epoch: int | None = None) -> None:
        """Go on by one epoch, or to ``epoch``. Up to ``swa_start`` the scheduler before takes the same step."""
        if self._is_made:
            if epoch is not None:
                epoch = check_int("epoch", epoch, 0)
            if self._before is not None:
                if epoch is not None:
                    self._before.step(min(epoch, self.swa_start))
                elif self.last_epoch < self.swa_start:
                    self._before.step()
            if self._optimizer is not None and self._start_lr is None:
                self._install(self._rate_before())
        super().step(epoch)

    def _install(self, start_lr: float) -> None:
        self._start_lr = start_lr
        self._optimizer.set_lr_scheduler(self)

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule stands, and the scheduler before, in plain values."""
        state = super().state_dict()
        if self._before is not None:
            state[_BEFORE] = self._before.state_dict()
        if self._optimizer is not None:
            state[_START] = self._start_lr
        return state

    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called. With an optimizer, take the scheduler's place if annealing had begun.

        Raises:
            TypeError: it is no dict.
            ValueError: an entry is missing or unknown; nothing has been loaded then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"set_state_dict: received {shown(state_dict)}, expected a dict")
        own = self.state_dict()
        if set(state_dict) != set(own):
            refuse_state(f"received the keys {sorted(map(str, state_dict))}, expected {sorted(own)}")
        if self._before is not None:
            self._before.set_state_dict(state_dict[_BEFORE])
        super().set_state_dict({key: value for key, value in state_dict.items() if key not in (_BEFORE, _START)})
        if self._optimizer is not None and state_dict[_START] is not None:
            self._install(check_number(_START, state_dict[_START]))

    set_dict = set_state_dict
