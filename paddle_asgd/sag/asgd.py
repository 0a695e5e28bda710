# SPDX-License-Identifier: Apache-2.0
"""ASGD, the stochastic average gradient: the algorithm's arguments and state.

Must not hold Paddle's plumbing (fused.py) nor the update itself (csrc/asgd_formula.h).

The letters are those of Schmidt, Le Roux and Bach, Algorithm 1: ``n`` batches; ``y_i``, the last gradient seen of batch
``i``; ``d``, the sum of all ``y_i``; ``m``, the steps taken so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import paddle
from paddle.nn.clip import GradientClipBase
from paddle.optimizer.lr import LRScheduler
from paddle.regularizer import WeightDecayRegularizer

from .. import native
from ..arguments import refuse_state
from ..entries import as_tensor
from ..fused import FusedOptimizer
from ..options import Bucket, ParameterOptions
from ..state import StateTensor
from .checks import check_count, check_history
from .gradient_norm import gradient_norm
from .history import (
    HISTORY_DTYPES,
    check_history_dtype,
    check_kept_history,
    check_loaded_history,
    narrow_dtype,
    scale_shape,
)
from .state_bytes import StateBytes, state_bytes
from .step_inputs import INDEX_USED, THETA_STEP, WATCH, WEIGHTS, StepInputs


class ASGD(FusedOptimizer):
    r"""The stochastic average gradient (SAG): descends along the mean of the last gradient of every batch.

    .. math::

        i &= m \bmod n \quad \text{or batch\_index} \\
        d &\leftarrow d - y_i + g, \qquad y_i \leftarrow g, \qquad m \leftarrow m + 1 \\
        x &\leftarrow x - \text{learning\_rate}
            \left( \frac{d}{\text{seen}} + \text{weight\_decay} \cdot x \right)

    where :math:`d = y_i = m = 0` initially, :math:`n` = ``batch_num``, and ``seen`` is the number of distinct slots
    that hold a gradient, which is :math:`\min(m, n)` while they take turns. Slot :math:`i` must hold the last gradient
    of batch :math:`i`: either the same batches come in the same order in every pass, or ``optimizer.batch_index = i``
    says before every step which batch comes. This is not Polyak averaging, the method of ``torch.optim.ASGD``.

    Args:
        learning_rate: a number of at least 0, an ``LRScheduler``, or a tensor of one float32 or float64, which every
            step reads. With ``theta=0.3`` and a ``FixedBatchSampler`` of ``order="reshuffle"``, use the learning rate
            of SGD. Without theta, ``learning_rate * batch_num`` times the largest curvature of the loss must stay below
            5.4 in that order, and below pi^2 / 2 = 4.93 if the batches always come in the same order.
        batch_num: the number of batches in a pass, a positive int. The history takes the memory of as many copies of
            the parameters, unless there is a ``history_dtype``.
        parameters: a list of tensors (float16, bfloat16, float32, float64), or of groups: dicts with ``params`` and,
            for this group, ``weight_decay``, ``grad_clip``, ``history_dtype`` and ``learning_rate`` (a multiplier of
            the optimizer's). In static graphs None stands for all trainable parameters.
        weight_decay: a number of at least 0 or a tensor of one element. It multiplies the present parameter, outside
            the history, as in the formula. A regularizer (``L2Decay``, ``L1Decay``) is added to the gradient instead
            and enters the history. A parameter's own regularizer wins over both.
        grad_clip: ``paddle.nn.ClipGradByGlobalNorm``, ``ClipGradByNorm`` or ``ClipGradByValue``. It is applied to the
            gradient before weight decay. One global norm spans all groups without a clip of their own.
        multi_precision: keep float32 master weights for float16 and bfloat16 parameters.
        name: a prefix for the names of the state.
        batch_weights: for batches of unequal size, ``batch_num`` positive numbers proportional to the sizes, such as
            ``FixedBatchSampler.batch_weights``: :math:`d` and its divisor become weighted sums, so that a short last
            batch does not move the optimum.
        theta: how much of the change of a gradient enters the direction, ``theta * (g - y_i) + d_old / seen``. None
            is SAG, ``1 / seen``; 1 is SAGA. 0.3 is recommended: it removes the limit that a reshuffled order sets to
            the learning rate, and raises that of a fixed order two- to threefold. A number of at least 0, or, in
            dygraph, a callable that returns one. It is called with the number of steps before this one, including
            those that were skipped because of an Inf.
        watch: sample whether the stored gradients fit their batches, and warn (``SlotMismatchWarning``) if in most
            of the last eight passes they do not and the gradients' spread has stopped falling. Of several groups with
            options of their own, only the largest is sampled. A ``batch_num`` that is a multiple of the right one goes
            unnoticed. This costs up to 2 % of a step, or 2 us, and up to 9 us with cold caches. None means True in
            dygraph. In static graphs it means True only if a ``batch_index`` is used, because the watch adds a
            variable, which ``paddle.static.load`` does not find in files of Paddle's own optimizer.
        maximize: step along the gradient instead of against it; weight decay still makes the parameters smaller.
        history_dtype: how the gradients are stored. None keeps them exactly. ``"int16"`` takes 16.25 bits for each
            number and slot, and loses nothing that float32 parameters could show. ``"int8"`` takes 8.25 bits; the loss
            then stops falling at about 1e-6 of its first distance to the optimum, and lower with ``theta=1``. Every 128
            consecutive numbers share a float32 scale. Tensors with fewer than 4,096 elements are stored exactly in any
            case. A group's own value wins, even None. It needs a ``batch_num`` of at least 2, and cannot change once
            there is a history.

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

    _unsaved = (WATCH,)
    _number_entries = (WEIGHTS, THETA_STEP)
    _closure_remedy = "the number of a batch goes into optimizer.batch_index"

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
        watch: bool | None = None,
        maximize: bool = False,
        history_dtype: str | None = None,
    ) -> None:
        self._n = check_count("batch_num", batch_num)
        self._history_dtype = check_history_dtype("history_dtype", history_dtype, self._n)
        self._inputs = StepInputs(self._n, batch_weights, theta, watch)
        layout = (
            StateTensor("d", "compute", lambda shape: shape),
            StateTensor("y", lambda param: self._narrow_dtype(param) or "gradient", lambda shape: [self._n, *shape]),
            StateTensor("m", "int64", lambda shape: [self._inputs.clock_length()], counts_steps=True),
            StateTensor(
                *("y_scale", lambda param: "float32" if self._narrow_dtype(param) else None),
                lambda shape: scale_shape(shape, self._n),
                partial=True,
            ),
        )
        hyperparameters = {"batch_num": self._n}
        super().__init__(
            *(learning_rate, parameters, weight_decay, grad_clip, multi_precision, name, layout, hyperparameters),
            maximize=maximize,
            group_checks={"history_dtype": partial(check_history_dtype, n=self._n)},
        )
        self._check_room()
        self.type = "asgd"

    # ---- Which slot -------------------------------------------------------------------------------------------------

    @property
    def batch_num(self) -> int:
        """The number of slots n."""
        return self._n

    @property
    def theta(self) -> float | Callable[[int], float] | None:
        """The ``theta`` that was passed: None, a number or a callable."""
        return self._inputs.given_theta

    @property
    def batch_index(self) -> int | Any | None:
        """The slot of the next step's batch, an int or a tensor of one int64; None if it has not been set.

        A step uses it up: once an index has been used, every step needs one. In static graphs set it to a fed variable
        before ``minimize``. If it is never set, the slots take turns. Set it on this optimizer, since a wrapper would
        keep the attribute to itself (``set_batch_index``).

        Raises:
            TypeError: the value set is neither an int nor a tensor of one int64.
            ValueError: it is out of range, or a step has no index although an earlier one had. An index in a tensor on
                a GPU is checked there: such a step changes nothing, and the error follows a later step of the next
                pass, or in static graphs the next reading of ``variance_ratio``.

        Examples:
            >>> weight = paddle.create_parameter([4], "float32")
            >>> optimizer = ASGD(0.1, 3, [weight])
            >>> optimizer.batch_index = 2
            >>> weight.sum().backward()
            >>> optimizer.step()
            >>> optimizer.batch_index is None
            True
        """
        return self._inputs.index.next

    @batch_index.setter
    def batch_index(self, value: int | Any) -> None:
        self._inputs.give_index(value, self._state, self._parameter_list)

    def clear_grad(self, set_to_zero: bool = True) -> None:
        """Clear the gradients of all parameters: set them to zero, or remove them with ``set_to_zero=False``."""
        # The tracer of full_graph=True cannot transcribe super().
        FusedOptimizer.clear_grad(self, set_to_zero)
        self._inputs.index.mixed = None  # the mixture has gone with the gradients

    def set_batch_index(self, value: int | Any) -> None:
        """Set ``batch_index`` through a wrapper such as fleet's, which forwards methods and keeps attributes to itself.

        Args:
            value: an int or a tensor of one int64.
        """
        self.batch_index = value

    # ---- How gradients are stored -----------------------------------------------------------------------------------

    def _history_dtype_of(self, param: Any, options: ParameterOptions) -> str | None:
        """What the user has chosen for a parameter: its group's ``history_dtype``, or else the optimizer's."""
        return options.further(param, "history_dtype", self._history_dtype)

    def _narrow_dtype(self, param: Any) -> str | None:
        """The dtype in which a parameter's history is stored if it is narrow; None if it is exact."""
        return narrow_dtype(param, self._history_dtype_of(param, self._options))

    def _check_parameters(self, parameters: list, options: ParameterOptions) -> None:
        check_history("batch_num", self._n, parameters, lambda param: self._history_dtype_of(param, options))

    def _check_options(self, options: ParameterOptions) -> None:
        for param in options.parameters:
            history = self._state.held(param, "y")
            if history is not None:
                check_kept_history(param, history, self._history_dtype_of(param, options))

    # ---- A step -----------------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self._inputs.begin()

    def _step_taken(self) -> list[Callable[[], Any]]:
        return self._inputs.step_taken()

    def _end_step(self) -> None:
        inputs = self._inputs
        if inputs.watch is not None and inputs.steps % self._n == 0:
            # The lists are compared here, because with one batch every step ends a pass, and calls would show.
            whole = self._parameter_list is self._own_list and not self._state.in_shards
            inputs.watch.end_pass(None if whole else self._parts_group())

    def _native_call(
        self, bucket: Bucket, rates: tuple[Any, Any], found_inf: Any, leads: bool, check_only: bool = False
    ) -> Callable[[], None]:
        inputs = self._inputs
        # Only one call of a step gets it, or the watch would count the step several times.
        watch = inputs.watch_of(bucket, self._state) if leads else None
        rates = _turned(rates) if self._maximize else rates
        *state, scales = bucket.state
        return native.asgd_call(
            *(bucket.params, bucket.grads, *state, bucket.masters, *rates, found_inf, check_only),
            *(inputs.index.next, inputs.weights_of(bucket), inputs.theta(), watch, scales),
        )

    def _take_planned(self, plan: Any, bucket: Bucket, rates: tuple[Any, Any]) -> None:
        rates = _turned(rates) if self._maximize else rates
        inputs, narrow = self._inputs, bucket.state[-1] is not None
        native.asgd_planned(plan, *rates, *inputs.of_planned_step(bucket), narrow, inputs.step_taken())

    # ---- What the user may ask --------------------------------------------------------------------------------------

    @property
    def variance_ratio(self) -> float | None:
        """``sum |g - y_i|^2 / sum |g - d / seen|^2`` over the last whole pass, sampled; None if there is none yet.

        Near 0 the stored gradients are right; near 2 they have nothing to do with their batches. A ``batch_num`` that
        is a multiple of the right one gives 0 as well. Reading it waits for the device. In static graphs each reading
        also judges the last nine passes, and the warning comes from here. Where fleet's sharding has divided the
        parameters among ranks, it is that of all parts, summed at the end of each pass, and reading it does not wait.

        Source: A. Defazio, L. Bottou, "On the Ineffectiveness of Variance Reduced Optimization for Deep Learning",
        NeurIPS 2019.
        """
        watch = self._inputs.watch
        if watch is not None and self._parts_group() is not None:
            return watch.ratio_of_parts()
        if watch is None or watch.tensor is None:
            return None
        found = self._state.value_of(watch.tensor)
        return None if found is None else watch.look(found)

    def gradient_norm(self) -> float:
        """The norm of ``d / seen + weight_decay * x`` over all parameters that are trained.

        This is the paper's stopping rule. It tends to the norm of the whole objective's gradient as the steps become
        small, and costs no gradient. It is inf before the first step. Reading it waits for the device.

        Where fleet's sharding has divided the parameters among ranks, this is a collective: every rank of the sharding
        group must call it, and all of them get the same number.

        Returns:
            A float, in units of the loss over those of a parameter.

        Raises:
            TypeError: in a static graph, the weight decay is a variable, which has a value only while the graph runs.

        Examples:
            >>> weight = paddle.create_parameter([4], "float32")
            >>> optimizer = ASGD(0.1, 3, [weight])
            >>> optimizer.gradient_norm()
            inf
            >>> (3 * weight).sum().backward()
            >>> optimizer.step()
            >>> optimizer.gradient_norm()
            6.0

        Source: Schmidt, Le Roux and Bach, section 4 ("Stopping criterion").
        """
        params = self._state.created
        if self._parameter_list is not None:
            # A wrapper that shards the optimizer takes parameters out of the list, and so may a user.
            listed = {param.name for param in self._parameter_list}
            params = [param for param in params if param.name in listed]
        trained = [(param, self._options.of(param).weight_decay) for param in params if not param.stop_gradient]
        if self._maximize:
            trained = [(param, -decay) for param, decay in trained]
        return gradient_norm(trained, self._state, self._inputs, self._parts_group())

    def state_bytes(self) -> StateBytes:
        """Bytes of the state, made or not: a tuple of ``history``, ``scales``, ``sums`` and ``master_weights``, with a
        ``total``.

        The clocks and the watch, a few numbers for each parameter, do not count. Where fleet's sharding has divided the
        parameters among ranks, it is this rank's part. Before the first step, gradients are taken to have the dtype of
        their parameters.

        Raises:
            TypeError, ValueError: groups have been edited, and the next step would refuse them.
            ValueError: the optimizer stands for all parameters of a program, and ``minimize`` has not been called.

        Examples:
            >>> weight = paddle.create_parameter([100, 100], "float32")
            >>> ASGD(0.1, 50, [weight]).state_bytes()
            StateBytes(history=2000000, scales=0, sums=40000, master_weights=0)
            >>> ASGD(0.1, 50, [weight], history_dtype="int8").state_bytes().total
            555800
        """
        self._follow_groups()
        if self._parameter_list is None and not self._state.created:
            raise ValueError(
                "state_bytes: received a call before minimize(), of an optimizer made with parameters=None, expected "
                "it after minimize(); or pass the parameters to the optimizer"
            )
        return state_bytes(self._state.created if self._parameter_list is None else self._parameter_list, self._state)

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All state by Paddle's names, and ``batch_num``, as tensors. Where they are used, there are also the
        ``batch_weights``, of mean 1, with which ``d`` was summed, and the ``theta_step``, the number of steps on which
        a callable ``theta`` depends.

        The tensors are the optimizer's own and change with its next step: save or copy them before that. Paddle's own
        optimizer loads them unless a ``batch_index`` was used, or a ``history_dtype``.
        """
        return super().state_dict()

    def _collect(self) -> dict[str, Any]:
        return {**super()._collect(), **self._inputs.collect()}

    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this or of Paddle's own optimizer gave, by copying; all of it, or nothing.

        An interrupt cannot divide it either: one that comes while tensors are copied takes effect after the last of
        them.

        The history must have been stored with the same ``history_dtype``; Paddle's own optimizer has None.

        State of a fixed cycle may be loaded where batches have an index, and the other way round: in both cases the
        loading optimizer then needs a ``batch_index``. The ``batch_weights`` must be the same.

        Args:
            state_dict: entries by name, tensors or arrays. They stay the caller's.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: an entry is missing, misshapen, or belongs to no parameter; nothing has been written.
            RuntimeError: Paddle is in static graph mode.
        """
        super().set_state_dict(state_dict)

    load_state_dict = set_state_dict

    def _load_entries(self, state_dict: dict[str, Any], load: Callable[..., None] | None = None) -> None:
        inputs, rest, step = self._inputs, state_dict, 0
        if isinstance(state_dict, dict):
            step = inputs.check_loaded(state_dict)
            rest = {key: value for key, value in state_dict.items() if key not in (WEIGHTS, THETA_STEP)}
        (load or self._load)(rest, inputs.going_on_at(step))

    def _adapt_loaded(self, states: dict[str, dict[str, Any]], undo: list[Callable[[], Any]]) -> None:
        for param in self._parameter_list:
            entries = states.get(param.name, {})
            if "y" in entries:
                history = as_tensor(param.name, "y", entries["y"])
                check_loaded_history(param, history, self._history_dtype_of(param, self._options))
        self._inputs.adapt_clocks(states, undo)

    def _form(self) -> dict[str, int]:
        stored = [self._narrow_dtype(param) for param in self._own_list or ()]
        narrow = {f"{dtype}_histories": stored.count(dtype) for dtype in HISTORY_DTYPES}
        return {**super()._form(), INDEX_USED: int(self._inputs.index.in_use), **narrow}

    def _check_form(self, form: dict[str, int]) -> None:
        for name, count in self._form().items():
            if name.endswith("_histories") and form[name] != count:
                refuse_state(f"{name} is {form[name]}, expected {count}; create the optimizer with that history_dtype")
        if self._inputs.index.in_use and not form[INDEX_USED]:
            refuse_state(f"{INDEX_USED} is 0, and a batch_index of this optimizer has been set: set it after loading")

    def _take_form(self, form: dict[str, int]) -> None:
        if form[INDEX_USED]:
            self._inputs.use_index(self._state)
        super()._take_form(form)

    def _shown(self) -> dict[str, str]:
        narrow = {} if self._history_dtype is None else {"history_dtype": repr(self._history_dtype)}
        return {**self._inputs.shown(), **narrow}


def _turned(rates: tuple[Any, Any]) -> tuple[Any, Any]:
    """Turn a step against the gradient round: the formula is ``x - rate * (direction + decay * x)``."""
    return (-rates[0], -rates[1])
