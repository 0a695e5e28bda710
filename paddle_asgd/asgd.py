"""ASGD, the stochastic average gradient: the algorithm's arguments and state.

Must not hold Paddle's plumbing (fused.py) nor the update itself (csrc/asgd_formula.h).

The letters are those of Schmidt, Le Roux and Bach, Algorithm 1: ``n`` batches; ``y_i``, the last gradient seen of batch
``i``; ``d``, the sum of all ``y_i``; ``m``, the steps taken so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle.nn.clip import GradientClipBase
from paddle.optimizer.lr import LRScheduler
from paddle.regularizer import WeightDecayRegularizer

from . import arguments, native
from .fused import Bucket, FusedOptimizer
from .state import StateTensor


class ASGD(FusedOptimizer):
    r"""The stochastic average gradient (SAG): descends along the mean of the last gradient of every batch.

    .. math::

        i &= m \bmod n \\
        d &\leftarrow d - y_i + g, \qquad y_i \leftarrow g, \qquad m \leftarrow m + 1 \\
        x &\leftarrow x - \text{learning\_rate}
            \left( \frac{d}{\min(m, n)} + \text{weight\_decay} \cdot x \right)

    with :math:`d = y_i = m = 0` at first, and :math:`n` = ``batch_num``. The same batches must come in the same order
    in every pass, so that slot :math:`i` holds the last gradient of batch :math:`i`. This is not Polyak averaging, the
    method of ``torch.optim.ASGD``.

    Args:
        learning_rate: a number of at least 0, an ``LRScheduler``, or a tensor of one float32 or float64, which is read
            at every step. With batches in a fixed order, ``learning_rate * batch_num`` times the largest curvature of
            the loss must stay below pi^2 / 2.
        batch_num: the number of batches in a pass, a positive int. The history takes as many copies of the parameters.
        parameters: a list of tensors (float16, bfloat16, float32, float64), or of groups: dicts with ``params`` and,
            for this group, ``weight_decay``, ``grad_clip`` and ``learning_rate`` (a multiplier of the optimizer's). In
            static graphs None stands for all trainable parameters.
        weight_decay: a number of at least 0 or a tensor of one element: decays from the present parameter, outside of
            the history, as in the formula. A regularizer (``L2Decay``, ``L1Decay``) is added to the gradient instead
            and enters the history. A parameter's own regularizer wins over both.
        grad_clip: ``paddle.nn.ClipGradByGlobalNorm``, ``ClipGradByNorm`` or ``ClipGradByValue``; acts on the gradient
            before all else. One global norm spans all groups without a clip of their own.
        multi_precision: keep float32 master weights for float16 and bfloat16 parameters.
        name: a prefix for the names of the state.

    Raises:
        TypeError: an argument is of the wrong type, or a parameter is not real floating point.
        ValueError: an argument is out of range, a parameter comes twice, or the history cannot fit into memory.

    Examples:
        >>> import paddle
        >>> from paddle_asgd import ASGD
        >>> linear = paddle.nn.Linear(4, 1)
        >>> batches = [paddle.randn([8, 4]) for _ in range(3)]
        >>> optimizer = ASGD(learning_rate=0.1, batch_num=3, parameters=linear.parameters())
        >>> for _ in range(2):
        ...     for batch in batches:
        ...         loss = linear(batch).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.clear_grad()
        >>> optimizer
        ASGD(learning_rate=0.1, batch_num=3, parameters=2, weight_decay=None, grad_clip=None, multi_precision=False)

    Source: M. Schmidt, N. Le Roux, F. Bach, "Minimizing Finite Sums with the Stochastic Average Gradient", Mathematical
    Programming 162 (2017), Algorithm 1, with the re-weighting of section 4.2 and the exact regularisation of 4.3.
    """

    def __init__(
        self,
        learning_rate: float | paddle.Tensor | LRScheduler = 0.001,
        batch_num: int = 1,
        parameters: Sequence[Any] | None = None,
        weight_decay: float | paddle.Tensor | WeightDecayRegularizer | None = None,
        grad_clip: GradientClipBase | None = None,
        multi_precision: bool = False,
        name: str | None = None,
    ) -> None:
        self._n = arguments.check_count("batch_num", batch_num)
        layout = (
            StateTensor("d", "compute", lambda shape: shape),
            StateTensor("y", "gradient", lambda shape: [self._n, *shape]),
            StateTensor("m", "int64", lambda shape: [1]),
        )
        super().__init__(
            learning_rate, parameters, weight_decay, grad_clip, multi_precision, name, layout, {"batch_num": self._n}
        )
        arguments.check_history("batch_num", self._n, self._parameter_list or [])
        self.type = "asgd"

    def _update(
        self, bucket: Bucket, learning_rate: Any, weight_decay: Any, found_inf: Any, check_only: bool = False
    ) -> None:
        native.asgd_update(
            bucket.params,
            bucket.grads,
            *bucket.state,
            bucket.masters,
            learning_rate,
            weight_decay,
            found_inf,
            check_only,
        )

    def __repr__(self) -> str:
        count = "all" if self._parameter_list is None else len(self._parameter_list)
        clip = getattr(self._grad_clip, "default", self._grad_clip)
        return (
            f"ASGD(learning_rate={_brief(self._learning_rate)}, batch_num={self._n}, parameters={count}, "
            f"weight_decay={_brief(self._weight_decay)}, grad_clip={_brief(clip)}, "
            f"multi_precision={self._multi_precision})"
        )


def _brief(value: Any) -> str:
    """A number as itself, anything else by its kind."""
    return repr(value) if value is None or isinstance(value, float) else type(value).__name__
