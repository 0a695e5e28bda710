"""ASGD, the stochastic average gradient: the algorithm's arguments and state.

Must not hold Paddle's plumbing (fused.py) nor the update itself (csrc/asgd_formula.h).

The letters are those of Schmidt, Le Roux and Bach, Algorithm 1: ``n`` batches; ``y_i``, the last gradient seen of batch
``i``; ``d``, the sum of all ``y_i``; ``m``, the steps taken so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import paddle
from paddle.base.framework import dygraph_guard_if_declarative, in_dygraph_mode
from paddle.nn.clip import GradientClipBase
from paddle.optimizer.lr import LRScheduler
from paddle.regularizer import WeightDecayRegularizer

from . import arguments, checkpoint, native
from .fused import Bucket, FusedOptimizer
from .norm import gradient_norm
from .slots import BatchIndex, check_clock, clock_length, grown_clock, normalised_weights, static_float64
from .state import StateTensor
from .watch import ENTRIES, Watch


class ASGD(FusedOptimizer):
    r"""The stochastic average gradient (SAG): descends along the mean of the last gradient of every batch.

    .. math::

        i &= m \bmod n \quad \text{or batch\_index} \\
        d &\leftarrow d - y_i + g, \qquad y_i \leftarrow g, \qquad m \leftarrow m + 1 \\
        x &\leftarrow x - \text{learning\_rate}
            \left( \frac{d}{\min(m, n)} + \text{weight\_decay} \cdot x \right)

    with :math:`d = y_i = m = 0` at first, and :math:`n` = ``batch_num``. Slot :math:`i` must hold the last gradient of
    batch :math:`i`: either the same batches come in the same order in every pass, or ``optimizer.batch_index = i`` says
    before every step which batch it is. Then the divisor is the number of distinct batches seen. This is not Polyak
    averaging, the method of ``torch.optim.ASGD``.

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
        batch_weights: for batches of unequal size, ``batch_num`` positive numbers proportional to the sizes, such as
            ``FixedBatchSampler.batch_weights``: :math:`d` and its divisor become weighted sums, so that a short last
            batch does not move the optimum.
        theta: how much of the change of a gradient enters the direction, ``theta * (g - y_i) + d_old / m``. None is
            SAG, ``1 / m``; 1 is SAGA. A number of at least 0, or, in dygraph, a callable that is given the number of
            steps taken before and returns one.
        watch: sample whether the stored gradients fit their batches, and warn (``SlotMismatchWarning``) if in two
            passes in a row they do not. Costs less than 2 % of a step.

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
        *,
        batch_weights: Sequence[float] | np.ndarray | paddle.Tensor | None = None,
        theta: float | Callable[[int], float] | None = None,
        watch: bool = True,
    ) -> None:
        self._n = arguments.check_count("batch_num", batch_num)
        self._batch_index = BatchIndex(self._n)
        self._weights = normalised_weights(batch_weights, self._n)
        self._weights_beside: dict[Any, Any] = {}
        self._theta = arguments.check_theta(theta)
        self._steps = 0
        self._watch = Watch(self._n) if arguments.check_flag("watch", watch) else None
        layout = (
            StateTensor("d", "compute", lambda shape: shape),
            StateTensor("y", "gradient", lambda shape: [self._n, *shape]),
            StateTensor("m", "int64", lambda shape: [clock_length(self._n) if self._batch_index.in_use else 1]),
        )
        super().__init__(
            learning_rate, parameters, weight_decay, grad_clip, multi_precision, name, layout, {"batch_num": self._n}
        )
        arguments.check_history("batch_num", self._n, self._parameter_list or [])
        self.type = "asgd"

    # ---- Which slot -------------------------------------------------------------------------------------------------

    @property
    def batch_num(self) -> int:
        """The number of slots n."""
        return self._n

    @property
    def batch_index(self) -> int | Any | None:
        """The slot of the next step's batch, an int or a tensor of one int64; None if it has not been set.

        A step takes it: once it has been used, every step needs one. In static graphs set it to a fed variable before
        ``minimize``. Never set, the slots take turns.

        Raises:
            TypeError: what is set is neither an int nor a tensor of one int64.
            ValueError: it is out of range, or a step is without one although an earlier one had one. A tensor on a GPU
                is checked there: its step changes nothing, and the error comes with a later step of the next pass.
        """
        return self._batch_index.next

    @batch_index.setter
    def batch_index(self, value: int | Any) -> None:
        self._batch_index.give(value)
        if not self._batch_index.in_use:
            self._use_batch_index()

    def _use_batch_index(self) -> None:
        """From now on the clocks keep which slots have been seen; so far they came in their order."""
        held = [param for param in self._state.created if self._state.of(param) is not None]
        if held and not in_dygraph_mode():
            self._batch_index.next = None
            raise RuntimeError(
                "batch_index: received after minimize() had built a step without one, expected before the first "
                "minimize()"
            )
        self._batch_index.in_use = True
        self._plan = None
        for param in held:
            self._state.reshape(param, "m", grown_clock(self._state.of(param)[2].numpy(), self._n))

    def _begin_step(self) -> None:
        self._batch_index.require()

    def _end_step(self) -> None:
        self._batch_index.take()
        self._steps += 1
        if self._watch is not None:
            self._watch.end_step()

    # ---- The native call --------------------------------------------------------------------------------------------

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
            self._batch_index.next,
            self._weights_of(bucket),
            self._theta_of_step(),
            None if check_only else self._watch_of(bucket),
        )

    def _weights_of(self, bucket: Bucket) -> Any | None:
        """The batches' weights where these parameters are."""
        if self._weights is None or in_dygraph_mode():
            return self._weights_on(bucket.params[0].place if in_dygraph_mode() else None)
        return static_float64(self._weights)

    def _weights_on(self, place: Any) -> Any | None:
        if self._weights is None:
            return None
        held = self._weights_beside.get(str(place))
        if held is None:
            held = self._weights_beside[str(place)] = paddle.to_tensor(self._weights, place=place)
        return held

    def _theta_of_step(self) -> Any | None:
        if self._theta is None:
            return None
        if callable(self._theta):
            if not in_dygraph_mode():
                raise TypeError(
                    "theta: received a callable, expected a number: in a static graph no Python runs in a step"
                )
            return arguments.check_number(f"theta of step {self._steps}", self._theta(self._steps))
        return self._theta if in_dygraph_mode() else paddle.full([1], self._theta, dtype="float64")

    def _watch_of(self, bucket: Bucket) -> Any | None:
        """The watch's numbers, for the first native call of a step."""
        if self._watch is None or not self._watch.claim():
            return None
        if self._watch.tensor is None or not in_dygraph_mode():
            # While a whole step is traced to a static graph, state is made in dygraph all the same.
            with nullcontext() if in_dygraph_mode() else dygraph_guard_if_declarative():
                self._watch.tensor = self._state.place_beside(bucket.params[0], "watch", [len(ENTRIES)], "float64")
        return self._watch.tensor

    # ---- What the user may ask --------------------------------------------------------------------------------------

    @property
    def variance_ratio(self) -> float | None:
        """``sum |g - y_i|^2 / sum |g - d / m|^2`` over the last whole pass, sampled; None if there is none yet.

        Towards 0 the stored gradients are right, about 2 they have nothing to do with their batches. Reading it waits
        for the device; in static graphs the warning, too, comes from here.

        Source: A. Defazio, L. Bottou, "On the Ineffectiveness of Variance Reduced Optimization for Deep Learning",
        NeurIPS 2019.
        """
        if self._watch is None or self._watch.tensor is None:
            return None
        found = self._state.value_of(self._watch.tensor)
        return None if found is None else self._watch.look(found)

    def gradient_norm(self) -> float:
        r"""The norm of :math:`d / m + \text{weight\_decay} \cdot x` over all parameters, the paper's stopping rule.

        It tends to the norm of the whole objective's gradient as the steps become small, and costs no gradient. Inf
        before the first step. Reading it waits for the device.

        Source: Schmidt, Le Roux and Bach, section 4 ("Stopping criterion").
        """
        return gradient_norm(self)

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All state by Paddle's names, ``batch_num``, and ``theta_step`` if ``theta`` depends on the step.

        The tensors are the optimizer's own and change with its next step: save them, or copy them, before.
        """
        collected = super().state_dict()
        if callable(self._theta):
            collected["theta_step"] = self._steps
        return collected

    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this or of Paddle's own optimizer gave, by copying; all of it, or nothing.

        State of a fixed cycle may be loaded where batches have an index, and the other way round: the loading optimizer
        then needs a ``batch_index``, too.

        Raises:
            ValueError: an entry is missing, misshapen, or belongs to no parameter; nothing has been written.
        """
        in_use, rest = self._batch_index.in_use, state_dict
        step = None
        if isinstance(state_dict, dict) and "theta_step" in state_dict:
            rest = {key: value for key, value in state_dict.items() if key != "theta_step"}
            step = arguments.check_step("set_state_dict: 'theta_step'", state_dict["theta_step"])
        try:
            super().set_state_dict(rest)
        except Exception:
            self._batch_index.in_use = in_use
            raise
        if step is not None:
            self._steps = step

    load_state_dict = set_state_dict

    def _adapt_loaded(self, states: dict[str, dict[str, Any]]) -> None:
        """Clocks of a fixed cycle and clocks that know the slots do not go together: the former grow."""
        clocks = [(s, checkpoint.as_tensor(name, "m", s["m"]).numpy()) for name, s in states.items() if "m" in s]
        length = clock_length(self._n)
        for _, clock in clocks:
            wrong = check_clock(clock, self._n) if clock.shape == (length,) else None
            if wrong is not None:
                raise ValueError(f"set_state_dict: a clock m {wrong}. Nothing has been loaded.")
        if not self._batch_index.in_use and not any(clock.shape == (length,) for _, clock in clocks):
            return
        self._batch_index.in_use = True
        for state, clock in clocks:
            if clock.shape == (1,):
                state["m"] = grown_clock(clock, self._n)

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
