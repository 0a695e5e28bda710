# SPDX-License-Identifier: Apache-2.0
"""NonMonotonicTrigger: when to begin averaging, from the validation losses. Must not know what it begins."""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..arguments import check_int, is_tensor, refuse_state, shown


class NonMonotonicTrigger:
    r"""Tells when the validation loss has stopped falling: AWD-LSTM's rule for the switch to averaged SGD.

    .. math::

        \text{loss}_e > \min(\text{loss}_1, \dots, \text{loss}_{e - 1 - n})

    The last n losses do not count, so the rule can first hold at loss n + 2. It fires once: the call at which it first
    holds returns True, and all others False.

    Args:
        n: how many of the latest losses before the present one are left out of the comparison, at least 1.

    Attributes:
        triggered: whether it has fired.

    Raises:
        TypeError: ``n`` is not an int.
        ValueError: ``n`` is below 1.

    Examples:
        >>> from paddle_asgd import NonMonotonicTrigger
        >>> trigger = NonMonotonicTrigger(n=3)
        >>> [trigger(loss) for loss in (10.0, 9.0, 8.0, 7.0, 11.0, 12.0)]
        [False, False, False, False, True, False]
        >>> trigger.triggered
        True

    Source: S. Merity, N. S. Keskar, R. Socher, "Regularizing and Optimizing LSTM Language Models", ICLR 2018, algorithm
    1, as its authors' program has it.
    """

    def __init__(self, n: int = 5) -> None:
        self._n = check_int("n", n, 1)
        #: the least loss of those that count, and the last n
        self._best, self._recent = math.inf, []
        self.triggered = False

    def __call__(self, loss: Any) -> bool:
        """Take in the validation loss of one more epoch, and return whether averaging is to begin now.

        Args:
            loss: a number or a tensor of one. Infinity is a loss like others.

        Raises:
            TypeError: ``loss`` is neither.
            ValueError: ``loss`` is NaN, which compares with nothing, or a tensor of more than one number.
        """
        loss = _check_loss("loss", loss)
        if self.triggered:
            return False
        self.triggered = loss > self._best
        self._recent.append(loss)
        if len(self._recent) > self._n:
            self._best = min(self._best, self._recent.pop(0))
        return self.triggered

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, in plain values."""
        return {"n": self._n, "best": self._best, "recent": list(self._recent), "triggered": self.triggered}

    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called.

        Raises:
            TypeError: it is no dict.
            ValueError: an entry is missing, unknown, of no use, or another ``n``; nothing has been loaded then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"set_state_dict: received {shown(state_dict)}, expected a dict")
        own = self.state_dict()
        if set(state_dict) != set(own):
            refuse_state(f"received the keys {sorted(map(str, state_dict))}, expected {sorted(own)}")
        if state_dict["n"] != self._n:
            refuse_state(f"n is {shown(state_dict['n'])}, expected {self._n}, as in this trigger")
        recent = state_dict["recent"]
        if not isinstance(recent, (list, tuple)) or len(recent) > self._n:
            refuse_state(f"'recent' is {shown(recent)}, expected a list of at most {self._n} losses")
        try:
            best, recent = _check_loss("best", state_dict["best"]), [_check_loss("recent", loss) for loss in recent]
        except (TypeError, ValueError) as error:
            refuse_state(str(error))
        if not isinstance(state_dict["triggered"], bool):
            refuse_state(f"'triggered' is {shown(state_dict['triggered'])}, expected True or False")
        self._best, self._recent, self.triggered = best, recent, state_dict["triggered"]

    load_state_dict = set_state_dict

    def __repr__(self) -> str:
        return f"NonMonotonicTrigger(n={self._n}, triggered={self.triggered})"


def _check_loss(argument: str, value: Any) -> float:
    """A number that is not NaN."""
    expected = "expected a number, or a tensor of one"
    if is_tensor(value):
        if math.prod(value.shape) != 1:
            raise ValueError(f"{argument}: received {shown(value)}, {expected}; pass its mean")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: received {shown(value)}, {expected}")
    if math.isnan(value):
        raise ValueError(f"{argument}: received nan, {expected}; the training or its validation has failed")
    return float(value)
