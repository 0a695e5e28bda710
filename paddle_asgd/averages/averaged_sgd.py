# SPDX-License-Identifier: Apache-2.0
"""AveragedSGD: the method of torch.optim.ASGD, whose averages one can reach.

Must not hold Paddle's plumbing (fused.py) nor the update itself (csrc/average_formula.h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import paddle
from paddle.base.framework import in_dygraph_mode
from paddle.nn.clip import GradientClipBase
from paddle.optimizer.lr import LRScheduler
from paddle.regularizer import WeightDecayRegularizer

from .. import arguments, native
from ..distributed_tensors import local
from ..entries import as_tensor, entry_value, number_entry
from ..fused import FusedOptimizer
from ..options import Bucket
from ..sharding import add_in_place, gathered, parts_group
from ..state import StateTensor
from ..tracing import leave_trace
from ..uninterrupted import uninterrupted

#: An entry of a checkpoint, of an optimizer whose ``start_averaging`` was called.
STARTED = "averaging_started"


class AveragedSGD(FusedOptimizer):
    r"""Averaged SGD: steps with a falling rate, and the mean of the weights that they passed through.

    .. math::

        \eta &= \frac{\text{learning\_rate}}{(1 + \text{lambd} \cdot \text{learning\_rate} \cdot k)^\text{alpha}},
            \qquad \mu = \frac{1}{\max(1, k - t_0)} \\
        x &\leftarrow (1 - \text{lambd} \cdot \eta) \, x - \eta \, (g + \text{weight\_decay} \cdot x) \\
        ax &\leftarrow ax + \mu \, (x - ax)

    with :math:`k` the number of steps that the parameter has taken before this one. So ``ax`` is the mean of all
    weights from the step ``t0 + 2`` on. This is the method of ``torch.optim.ASGD``; ``paddle_asgd.ASGD``, which has
    Paddle's name, is the stochastic average gradient. ``averaged_parameters`` puts the averages into the model.

    Two things differ from torch unless ``torch_compatible`` is set. A changed learning rate acts at once, in place of
    one step late; under a constant rate all numbers are the same. And ``ax`` takes no memory before averaging begins:
    in dygraph it is made by the step before, by the count of the optimizer's steps, which may be some steps early for a
    parameter that has taken fewer. A static graph has it from the beginning, because no Python counts its steps.

    Args:
        learning_rate: a number of at least 0, an ``LRScheduler``, or a tensor of one float32 or float64.
        lambd: how fast the weights decay, and the rate falls; a number of at least 0.
        alpha: the power of the rate's fall; a number of at least 0.
        t0: the number of steps after which averaging begins; a number of at least 0. ``start_averaging`` sets it to
            the present step.
        parameters: a list of tensors (float16, bfloat16, float32, float64), or of groups: dicts with ``params`` and,
            for this group, ``weight_decay``, ``grad_clip`` and ``learning_rate`` (a multiplier of the optimizer's).
            ``lambd``, ``alpha`` and ``t0`` are the same for all groups. In static graphs None stands for all trainable
            parameters.
        weight_decay: a number of at least 0 or a tensor of one element, as in the formula; or a regularizer
            (``L2Decay``, ``L1Decay``), which is added to the gradient. A parameter's own regularizer wins over both.
        grad_clip: ``paddle.nn.ClipGradByGlobalNorm``, ``ClipGradByNorm`` or ``ClipGradByValue``; acts on the gradient
            before all else.
        multi_precision: keep float32 master weights for float16 and bfloat16 parameters; the averages follow them.
        name: a prefix for the names of the state.
        maximize: step along the gradient instead of against it; the decays still make the weights smaller.
        torch_compatible: reproduce torch step for step: :math:`\eta` is kept from one step to the next, so that a
            changed learning rate acts one step late, and ``ax`` exists, as a copy, from the first step on. Where
            Paddle's default dtype is float32, :math:`\eta` and :math:`\mu` are rounded to it, as torch rounds them.

    Raises:
        TypeError: an argument is of the wrong type, or a parameter is not real floating point.
        ValueError: an argument is out of range, or a parameter comes twice.

    Examples:
        >>> import paddle
        >>> from paddle_asgd import AveragedSGD
        >>> linear = paddle.nn.Linear(4, 1)
        >>> optimizer = AveragedSGD(learning_rate=0.1, t0=10, parameters=linear.parameters())
        >>> for _ in range(20):
        ...     loss = linear(paddle.randn([8, 4])).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.clear_grad()
        >>> with optimizer.averaged_parameters():
        ...     loss = linear(paddle.randn([8, 4])).square().mean()

    Source: B. T. Polyak, A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on
    Control and Optimization 30 (1992); L. Bottou, "Large-Scale Machine Learning with Stochastic Gradient Descent"
    (2010), for the schedule.
    """

    _number_entries = (STARTED,)

    def __init__(
        self,
        learning_rate: float | paddle.Tensor | LRScheduler = 0.01,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        parameters: Sequence[Any] | None = None,
        weight_decay: float | paddle.Tensor | WeightDecayRegularizer | None = None,
        grad_clip: GradientClipBase | None = None,
        multi_precision: bool = False,
        name: str | None = None,
        *,
        maximize: bool = False,
        torch_compatible: bool = False,
    ) -> None:
        self._lambd = arguments.check_number("lambd", lambd)
        self._alpha = arguments.check_number("alpha", alpha)
        self._t0 = arguments.check_number("t0", t0)
        self._compatible = arguments.check_flag("torch_compatible", torch_compatible)
        layout = [
            StateTensor("ax", "compute", lambda shape: shape, later=not self._compatible),
            StateTensor("step", "int64", lambda shape: [1], counts_steps=True),
            StateTensor("t0", "float64", lambda shape: [1], later=True),
        ]
        if self._compatible:
            wide = arguments.dtype_name(paddle.get_default_dtype()) == "float64"
            layout.append(StateTensor("eta", "float64" if wide else "float32", lambda shape: [1]))
        hyperparameters = {"lambd": self._lambd, "alpha": self._alpha, "t0": self._t0}
        hyperparameters["torch_compatible"] = self._compatible
        super().__init__(
            *(learning_rate, parameters, weight_decay, grad_clip, multi_precision, name),
            *(tuple(layout), hyperparameters, maximize),
        )
        #: at least as many as any parameter has taken that has no average yet
        self._steps = 0
        self._started = False
        #: the same of the checkpoint that is being loaded
        self._loads_started = False
        self._swapped = False
        #: whether a graph holds this optimizer's step, with t0 as a constant
        self._in_graph = False
        self.type = "averaged_sgd"

    # ---- A step -----------------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        if self._swapped:
            raise RuntimeError(
                "step: received a call within averaged_parameters(), expected it outside, where the parameters are "
                "the ones that are trained"
            )
        # The average begins as a copy of the parameter, made by a step while mu is still 1: the last such step has
        # been preceded by t0 + 1 others.
        averages = self._started or self._steps > self._t0 or not in_dygraph_mode()
        due = frozenset(("ax",) if averages and not self._compatible else ())
        if due != self._state.due:
            self._state.due = due
            self._forget_shortcut()

    def _step_taken(self) -> list[Callable[[], Any]]:
        # A step that an Inf kept from being taken counts as well: the averages may come earlier than needed, not later.
        return [partial(setattr, self, "_steps", self._steps + 1)]

    def _native_call(
        self, bucket: Bucket, rates: tuple[Any, Any], found_inf: Any, leads: bool, check_only: bool = False
    ) -> Callable[[], None]:
        ax, steps, t0s, etas = (*bucket.state, None)[:4]
        numbers = self._numbers()
        if not in_dygraph_mode():
            self._in_graph = True
            numbers = tuple(paddle.full([1], number, "float64") for number in numbers)
        return native.averaged_sgd_call(
            *(bucket.params, bucket.grads, steps, ax, t0s, etas, bucket.masters, *rates, found_inf, check_only),
            *numbers,
        )

    def _take_planned(self, plan: Any, bucket: Bucket, rates: tuple[Any, Any]) -> None:
        ax, _, t0s, etas = (*bucket.state, None)[:4]
        kept = tuple(tensors is not None for tensors in (ax, t0s, etas, bucket.masters))
        native.averaged_sgd_planned(plan, kept, *rates, *self._numbers(), self._step_taken())

    def _numbers(self) -> tuple[float, float, float, float]:
        """lambd, alpha, t0 where a parameter has none of its own, and 1, or -1 to climb."""
        t0 = 0.0 if self._started else self._t0
        return (self._lambd, self._alpha, t0, -1.0 if self._maximize else 1.0)

    # ---- The averages -----------------------------------------------------------------------------------------------

    def start_averaging(self) -> None:
        """Set t0 to now: the averages are the means of the weights from the second step on that follows.

        Each parameter's own steps count, and parameters that have taken none average from their second step on. Called
        again, it begins new averages. Dygraph only; checkpoints keep it.

        Raises:
            RuntimeError: a static graph holds the step of this optimizer, and t0 in it is a constant.
        """
        leave_trace()
        if not in_dygraph_mode() or self._in_graph:
            raise RuntimeError(
                "start_averaging: received a call where a static graph holds the step, expected dygraph; pass t0=... "
                "when the optimizer is made"
            )
        entry = next(entry for entry in self._state.layout if entry.name == "t0")
        undo: list[Callable[[], Any]] = []
        try:
            with paddle.no_grad():
                calls = []
                for param in self._parameter_list or ():
                    state = self._state.named(param)
                    if state is not None:
                        now = state["step"].astype("float64")
                        calls.append(partial(self._state.entry_of(param, entry, undo).copy_, now, True))
                uninterrupted(*calls, partial(setattr, self, "_started", True), undo.clear)
        except BaseException:
            for call in undo:
                call()
            raise

    @property
    def has_averages(self) -> bool:
        """Whether averaging has begun, so that ``averaged_parameters`` can be called. It waits for the device.

        Where fleet's sharding has divided the parameters among ranks, this is a collective: every rank of the sharding
        group must ask, and all get the same answer.
        """
        return in_dygraph_mode() and self._averaged_on_ranks()[1]

    def _averaged(self) -> list[tuple[Any, dict[str, Any]]]:
        """The parameters that have an average, with their state."""
        # Not those that the state knows: of a traced step it knows the variables of a graph.
        held = [(param, self._state.named(param)) for param in self._parameter_list or ()]
        return [(param, state) for param, state in held if state is not None and state["ax"] is not None]

    def _averaged_on_ranks(self) -> tuple[list[Any], bool]:
        """The parameters that have an average on any rank, whole, and whether averaging has begun on any."""
        averaged = self._averaged()
        begun = any(self._has_begun(state) for _, state in averaged)
        group = parts_group() if self.is_divided else None
        if group is None:
            return [param for param, _ in averaged], begun
        # By name: where fleet divides by elements, this rank's part of a parameter is another tensor of that name.
        here = {param.name for param, _ in averaged}
        rows = gathered([float(param.name in here) for param in self._own_list] + [float(begun)], group)
        *anywhere, begun_anywhere = (any(column) for column in zip(*rows))
        return [param for param, has_average in zip(self._own_list, anywhere) if has_average], begun_anywhere

    def _has_begun(self, state: dict[str, Any]) -> bool:
        """Whether the average is one of weights that it averages, and no copy that leads to it."""
        return state["step"].item() >= self._t0_of(state, self._started) + 2

    def _t0_of(self, state: dict[str, Any], started: bool) -> float:
        t0 = state.get("t0")
        return (0.0 if started else self._t0) if t0 is None else t0.item()

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Hold the averages in the parameters while the context lasts, and put the weights back on every way out of it.

        Parameters that never had a gradient since averaging began keep their values. 16-bit parameters hold their
        averages rounded; master weights stay as they are. ``step`` and ``set_state_dict`` are refused within. What is
        written to the parameters within is lost.

        Where fleet's sharding has divided the parameters among ranks, entering is a collective: every rank of the
        sharding group must enter, and then has all averages. Leaving is not, so it cannot wait for anybody.

        Raises:
            RuntimeError: averaging has not begun, the averages are in the parameters already, or the mode is static.
        """
        self._refuse_swap()
        averaged, group = self._averaged(), parts_group() if self.is_divided else None
        everywhere, begun = self._averaged_on_ranks()
        if not begun:
            raise RuntimeError(
                f"averaged_parameters: received a call before averaging had begun (t0 = {self._t0:g}), expected it "
                "after; call start_averaging(), or pass a smaller t0"
            )
        params, averages = [local(param) for param, _ in averaged], [local(state["ax"]) for _, state in averaged]
        with paddle.no_grad():
            whole = params if group is None else everywhere
            kept = [param.clone() for param in whole]
        swap = native.average_swap_call([], [], params, averages)
        restore = native.average_swap_call([], [], whole, kept)
        leave = partial(uninterrupted, restore, partial(setattr, self, "_swapped", False))
        try:
            with paddle.no_grad():
                # The sum over the ranks is exact: each element has its average on one of them, and is 0 on the others.
                others = [] if group is None else [partial(param.zero_) for param in whole]
                uninterrupted(partial(setattr, self, "_swapped", True), *others, swap)
                for param in whole if group is not None else ():
                    add_in_place(param, group)
            yield
        finally:
            try:
                leave()
            except BaseException:
                # An interrupt can come within the call of leave(), before the weights are back or behind that.
                leave()
                raise

    def _refuse_swap(self) -> None:
        if not in_dygraph_mode():
            raise RuntimeError(
                "averaged_parameters: received a call in static graph mode, expected dygraph; there the averages are "
                "the variables <parameter>_ax_0 of the scope"
            )
        if self._swapped:
            raise RuntimeError(
                "averaged_parameters: received a call while the averages are in the parameters, expected it after "
                "the context of the first call"
            )

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def _collect(self) -> dict[str, Any]:
        started = {STARTED: number_entry([1], "int64")} if self._started else {}
        return {**super()._collect(), **started}

    def _load_entries(self, state_dict: dict[str, Any], load: Callable[..., None] | None = None) -> None:
        if self._swapped:
            raise RuntimeError("set_state_dict: received a call within averaged_parameters(), expected it outside")
        started, rest = False, state_dict
        if isinstance(state_dict, dict):
            started = self._check_started(state_dict.get(STARTED))
            rest = {key: value for key, value in state_dict.items() if key != STARTED}
        self._loads_started = started
        (load or self._load)(rest, partial(setattr, self, "_started", started))

    def _form(self) -> dict[str, int]:
        form = {**super()._form(), "steps_taken": self._steps}
        # All ranks must say the same, and of one whose part of the parameters is frozen no state tells it.
        if "ax" in self._state.due:
            form["has_ax"] = 1
        if self._started:
            form["has_t0"] = 1
        return form

    def _make_state(self, wide: bool = False) -> list:
        before = {param.name for param, _ in self._averaged()}
        params = super()._make_state(wide)
        made = [(param, state["ax"]) for param, state in self._averaged() if param.name not in before]
        # A parameter that takes no step is its own average; of zeros the weights would become zeros in a swap.
        weights = [local(param if (w := self._state.held_master(param)) is None else w) for param, _ in made]
        native.average_update([local(ax) for _, ax in made], weights, 1.0)
        return params

    def _take_form(self, form: dict[str, int]) -> None:
        self._state.due = frozenset(("ax",) if form.get("has_ax") else ())
        super()._take_form(form)
        self._steps = form["steps_taken"]

    @staticmethod
    def _check_started(entry: Any) -> bool:
        value = 0 if entry is None else entry_value(entry)
        if not isinstance(value, int) or value not in (0, 1):
            arguments.refuse_state(f"{STARTED} is {arguments.shown(value)}, expected 1")
        return bool(value)

    def _adapt_loaded(self, states: dict[str, dict[str, Any]], undo: list[Callable[[], Any]]) -> None:
        """Learn the steps that were taken. A missing average is no error before there can be one."""
        taken = 0
        for name, state in states.items():
            if "step" not in state:
                continue
            step = as_tensor(name, "step", state["step"])
            steps = int(step.max().item()) if math.prod(step.shape) else 0
            t0 = {"t0": as_tensor(name, "t0", state["t0"])} if "t0" in state else {}
            if "ax" not in state and math.prod(step.shape) == 1 and steps >= self._t0_of(t0, self._loads_started) + 2:
                arguments.refuse_state(f"entry 'ax' of parameter {name!r} is missing, and averaging has begun")
            taken = max(taken, steps)
        undo.append(partial(setattr, self, "_steps", self._steps))
        self._steps = taken
