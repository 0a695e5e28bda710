# SPDX-License-Identifier: Apache-2.0
"""AveragedModel: the averages of a live model's weights: when they are updated, swapped in, saved and loaded.

Must not know any rule of averaging (rules.py) nor which tensors there are (averaged_tensors.py).
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, Callable, NamedTuple

import paddle
from paddle.base.framework import in_dygraph_mode
from paddle.optimizer import Optimizer

from ..arguments import check_flag, check_int, shown
from ..caller import warn
from ..sharding import parts_group
from ..step_counter import StepCounter
from ..tracing import leave_trace
from ..uninterrupted import uninterrupted
from .averaged_state import check_state
from .averaged_tensors import AveragedTensors, named_tensors
from .rules import check_rule, ema, state_of, weight_of

#: The ids of all tensors that hold an average now, of whichever AveragedModel.
_HOLDING_AN_AVERAGE: set[int] = set()
#: A decay of 0.9999, whose weight a subtraction gives a little too small, is not above it.
_STALLING = 0.9999e-4


class _Progress(NamedTuple):
    """One object, so that one assignment changes all of it."""

    #: calls of ``update`` that counted, and those of them that updated the average
    calls: int = 0
    updates: int = 0
    #: the optimizer's steps at the last call
    steps: int = 0


class _Applied(NamedTuple):
    """What ``restore`` needs."""

    swap_out: Callable[[], None]
    #: of every layer, and whether it was in training
    flags: list[tuple[dict[str, Any], bool]]


class AveragedModel:
    r"""Averages of the weights of a model in training, which can be evaluated, saved and resumed in their place.

    .. math::

        \bar{x}_0 = x_0, \quad \bar{x}_t = \bar{x}_{t-1} + (1 - d_t) (x_t - \bar{x}_{t-1})

    with the weights :math:`x_t` at update t = 1, 2, ... and the decay :math:`d_t` of the rule. One update is one native
    call for all tensors, without temporaries.

    Trainable parameters are averaged. Frozen parameters, BatchNorm's statistics and persistable buffers are copied at
    each update. BatchNorm's are then those of the last weights; where these are far from the average, as with ``swa``,
    call ``update_bn`` within ``averaged_parameters``. Parameters that are shared are averaged once. The averages follow
    the tensors themselves, so neither renamed tensors nor ``to_static``, ``DataParallel`` or casts of the model by
    ``paddle.amp.decorate`` disturb them, and the model need not be one that can be deep-copied. A parameter that is
    frozen now and trained later is averaged from then on.

    Where fleet's sharding has divided ``optimizer`` among ranks, each rank keeps the averages of its part alone from
    the first update on. That update, swapping in, ``state_dict``, ``averaged_state_dict`` and ``copy_to`` are then
    collectives: every rank of the sharding group must call them, and all get the whole average. Leaving a swap is not.

    Args:
        model: the ``paddle.nn.Layer`` in training. Load pretrained weights into it before.
        average: the rule: ``ema``, ``swa``, ``power_ema``, or a callable that takes t = 1, 2, ... and returns the decay
            in [0, 1].
        optimizer: the optimizer that trains the model. ``update()`` then acts only if a step has been taken since the
            last call, so steps that ``GradScaler`` skips and batches that only accumulate gradients do not count; the
            average follows the float32 master weights of 16-bit parameters; and a step is refused while the average is
            in the model. None: each ``update()`` counts, and 16-bit weights are followed as they are.
        update_after: how many steps, or calls of ``update()`` without ``optimizer``, come before the averaging. Until
            then the average is a copy of the weights.
        update_every: of the steps after that, each so many-th updates the average. ``ema`` takes its decay once for
            each update, so a decay of d becomes d ** update_every for the same span of steps.
        exclude: what is left as it is in the model, neither averaged nor copied nor swapped: a callable that takes a
            structured name, or a list of structured names and parameters. ``state_dict`` leaves it out,
            ``averaged_state_dict`` holds its present values.
        buffers: "copy", or "average" to average all floating-point tensors that are not trained, too.
        dtype: of the averages: "float32" or "float64". Those of float64 parameters are always float64. Above a decay of
            0.9999 float32 stalls: a change smaller than the rounding of the average is lost each time.

    Attributes:
        decay: the decay of the last update; None before the first.
        num_updates: the number of updates of the average so far.
        average: the rule.
        is_divided: whether several ranks share the averages among them.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``exclude`` names what the model does not have.
        RuntimeError: the model is in static graph mode; the average is swapped in before the first update or twice; it
            is updated or loaded while it is swapped in; it is restored while it is not.

    Examples:
        >>> import paddle
        >>> from paddle_asgd import AveragedModel, ema
        >>> model = paddle.nn.Linear(4, 1)
        >>> optimizer = paddle.optimizer.Adam(0.01, parameters=model.parameters())
        >>> averaged = AveragedModel(model, ema(0.9), optimizer=optimizer)
        >>> for _ in range(3):
        ...     model(paddle.randn([8, 4])).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.clear_grad()
        ...     averaged.update()
        >>> averaged.num_updates, averaged.decay
        (3, 0.9)
        >>> with averaged.averaged_parameters():
        ...     prediction = model(paddle.ones([1, 4]))
        >>> weights = averaged.averaged_state_dict()  # for paddle.save, or another model's set_state_dict

    Source: B. T. Polyak, A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control and
    Optimization 30(4), 1992; the sources of the rules are theirs.
    """

    def __init__(
        self,
        model: paddle.nn.Layer,
        average: Callable[[int], float] = ema(0.999),
        *,
        optimizer: Optimizer | None = None,
        update_after: int = 0,
        update_every: int = 1,
        exclude: Any = None,
        buffers: str = "copy",
        dtype: str = "float32",
    ) -> None:
        if not in_dygraph_mode():
            raise RuntimeError(
                "AveragedModel: received a call in static graph mode, expected dygraph; paddle.disable_static() before"
            )
        self._model = _check_model(model)
        self._average = check_rule("average", average)
        self._update_after = check_int("update_after", update_after, 0)
        self._update_every = check_int("update_every", update_every, 1)
        _check_word("buffers", buffers, ("copy", "average"))
        self._dtype = _check_word("dtype", dtype, ("float32", "float64"))
        _check_optimizer(optimizer)
        with paddle.no_grad():
            self._tensors = AveragedTensors(model, optimizer, exclude, buffers == "average", dtype)
        self._ids = self._tensors.ids
        self._progress = _Progress()
        #: whether the ranks have told each other which of them updates what
        self._is_settled = optimizer is None
        self._applied: _Applied | None = None
        self._warned = False
        self._counter = None if optimizer is None else StepCounter(optimizer, self._refuse_step)
        # Raw weights that nobody can bring back any more must not forbid the model to anybody else.
        weakref.finalize(self, _HOLDING_AN_AVERAGE.difference_update, self._ids)

    @property
    def average(self) -> Callable[[int], float]:
        return self._average

    @property
    def num_updates(self) -> int:
        return self._progress.updates

    @property
    def decay(self) -> float | None:
        return self._average(self.num_updates) if self.num_updates else None

    @property
    def is_divided(self) -> bool:
        return self._tensors.is_divided

    # ---- Updates ----------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Update the average after a step of the optimizer; at a call without a step since the last nothing is done."""
        leave_trace()
        self._refuse_while_applied("update")
        steps = self._counter.steps if self._counter is not None else self._progress.steps + 1
        if steps == self._progress.steps:
            return
        self._settle()
        calls, updates = self._progress.calls + 1, self._progress.updates
        since = calls - self._update_after
        weight = 1.0
        if since > 0 and since % self._update_every == 0:
            updates += 1
            weight = weight_of(self._average, updates)
            self._warn_of_stall(weight)
        note = partial(setattr, self, "_progress", _Progress(calls, updates, steps))
        if since == 0 or updates > self._progress.updates:
            self._tensors.update(weight, note)
        else:
            note()

    def _settle(self) -> None:
        """Divide the averages as fleet has divided the optimizer, which it may do until the first step."""
        if not self._is_settled:
            group = parts_group()
            if group is not None:
                self._tensors.divide(group)
            self._is_settled = True

    def _warn_of_stall(self, weight: float) -> None:
        if not self._warned and 0.0 < weight < _STALLING and self._tensors.has_float32:
            self._warned = True
            warn(
                f"AveragedModel: a decay of {1.0 - weight:.8g} loses small changes of a float32 average, which then "
                'stalls short of the weights. dtype="float64" keeps it exact.'
            )

    # ---- Swaps ------------------------------------------------------------------------------------------------------

    def averaged_parameters(self) -> _Context:
        """Return a context in which the model has the averages for its weights.

        However the context ends, the weights, the copied tensors and the training flags of all layers are then as they
        were, to the bit. What ``update_bn`` or a forward pass in training mode makes of BatchNorm's statistics within
        the context stays with the average until the next update.
        """
        return _Context(self, True)

    def apply(self, need_restore: bool = True) -> _Context:
        """Put the averages into the model at once, for ``restore()`` to take them out again.

        Args:
            need_restore: as a context, ``with averaged.apply():``, whether its end restores.
        """
        check_flag("need_restore", need_restore)
        self._swap_in("apply")
        return _Context(self, need_restore, self._applied)

    def restore(self) -> None:
        """Put the weights back that were in the model before."""
        leave_trace()
        if self._applied is None:
            raise RuntimeError("restore: received a call while the weights are in the model, expected apply() before")
        swap_out, flags = self._applied
        uninterrupted(
            swap_out,
            partial(_HOLDING_AN_AVERAGE.difference_update, self._ids),
            *[partial(layer.__setitem__, "training", flag) for layer, flag in flags],
            partial(setattr, self, "_applied", None),
        )
        self._tensors.drop_fetched()

    @paddle.no_grad()
    def _swap_in(self, caller: str) -> None:
        leave_trace()
        self._refuse_while_applied(caller)
        if self.num_updates == 0:
            raise RuntimeError(f"{caller}: received a call before the first update, expected an average; call update()")
        self._tensors.fetch()
        into, out_again = self._tensors.swap_calls()
        flags = [(vars(layer), layer.training) for layer in self._model.sublayers(include_self=True)]
        uninterrupted(
            into,
            partial(_HOLDING_AN_AVERAGE.update, self._ids),
            partial(setattr, self, "_applied", _Applied(out_again, flags)),
        )

    def _refuse_while_applied(self, caller: str) -> None:
        if self._applied is not None:
            raise RuntimeError(
                f"{caller}: received a call while the average is in the model, expected the weights; restore() before"
            )
        if _HOLDING_AN_AVERAGE and not _HOLDING_AN_AVERAGE.isdisjoint(self._ids):
            raise RuntimeError(
                f"{caller}: received a call while the average of another AveragedModel is in the model, expected the "
                "weights; restore() that one before"
            )

    def _refuse_step(self) -> None:
        if self._applied is not None:
            raise RuntimeError(
                "step: received a call while the average is in the model, expected the weights; leave the context, or "
                "restore(), before"
            )

    # ---- What is saved ----------------------------------------------------------------------------------------------

    @paddle.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """All that ``set_state_dict`` needs to go on: copies of the averages by structured name, counts and the rule.

        The rule is there by its settings; a callable of your own cannot be described and is None.
        """
        self._follow_weights()
        swapped = self._applied is not None
        with self._tensors.fetched(swapped):
            averages = self._tensors.averages(swapped)
        return {
            "averages": averages,
            "num_updates": self._progress.updates,
            "num_calls": self._progress.calls,
            "rule": state_of(self._average),
            "dtype": self._dtype,
        }

    @paddle.no_grad()
    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, by copying; all of it, or nothing. The names of tensors do not matter.

        A rule that is a callable of your own is loaded without a comparison, for only you know whether it is the same.

        Raises:
            TypeError: it is not a dict.
            ValueError: an entry is missing, misshapen or of another dtype, or the rule or the dtype of the averages is
                another. Nothing has been loaded.
            RuntimeError: the average is in the model.
        """
        self._refuse_while_applied("set_state_dict")
        expected = {"rule": state_of(self._average), "dtype": self._dtype}
        kept = self._tensors.kept_here
        others = {entry.name for entry in self._tensors.held} - kept.keys()
        copies, calls, updates = check_state(state_dict, expected, kept, others)
        progress = _Progress(calls, updates, self._progress.steps)
        uninterrupted(*copies, partial(setattr, self, "_progress", progress))

    load_state_dict = set_state_dict

    @paddle.no_grad()
    def averaged_state_dict(self) -> dict[str, Any]:
        """The model's ``state_dict()`` with copies of the averages in place of the weights, in the model's dtypes.

        Ready for ``paddle.save`` and for ``set_state_dict`` of a model, also while the average is in the model.
        """
        self._follow_weights()
        swapped = self._applied is not None
        with self._tensors.fetched(swapped):
            return self._tensors.as_in_model(swapped)

    @paddle.no_grad()
    def copy_to(self, model: paddle.nn.Layer) -> None:
        """Write the averages into a model with the same structured names, for good: all of them, or nothing.

        Into the model in training, that is how to go on from the average; the master weights that the optimizer keeps
        are written, too.
        """
        _check_model(model)
        targets = named_tensors(model)
        differing = sorted(set(self._tensors.names).symmetric_difference(targets))
        if differing:
            raise ValueError(
                f"model: received one {'with' if differing[0] in targets else 'without'} {differing[0]!r}, expected "
                f"the names of the averaged model ({len(differing)} differ)"
            )
        if not self._ids.isdisjoint(map(id, targets.values())):
            self._refuse_while_applied("copy_to")
        self._follow_weights()
        swapped = self._applied is not None
        with self._tensors.fetched(swapped):
            self._tensors.write_call(targets, swapped)()

    def _follow_weights(self) -> None:
        """Make the average the copy of the weights that it is before ``update_after``."""
        if self._progress.calls < self._update_after:
            self._tensors.update(1.0)

    def __repr__(self) -> str:
        return (
            f"AveragedModel({type(self._model).__name__}, {self._average!r}, update_after={self._update_after}, "
            f"update_every={self._update_every}, dtype={self._dtype!r}, num_updates={self.num_updates})"
        )


class _Context:
    """What ``with`` is given. A class, and no generator, which would leave a gap for interrupts behind the swap."""

    def __init__(self, averaged: AveragedModel, restores: bool, entered: _Applied | None = None) -> None:
        self._averaged, self._restores = averaged, restores
        #: what apply() has put in already
        self._entered = entered

    def __enter__(self) -> AveragedModel:
        averaged, before = self._averaged, self._averaged._applied
        try:
            if before is None or before is not self._entered:
                averaged._swap_in("averaged_parameters")
            return averaged
        except BaseException:
            # A swap that was refused changed nothing, but an interrupt may come right behind one that was made.
            if averaged._applied is not before:
                averaged.restore()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._leave()
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        if self._restores and self._averaged._applied is not None:
            self._averaged.restore()


def _check_model(model: Any) -> Any:
    if isinstance(model, paddle.nn.Layer):
        return model
    remedy = "; pass model.network" if isinstance(model, paddle.Model) else ""
    raise TypeError(f"model: received {shown(model)}, expected a paddle.nn.Layer{remedy}")


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: received {shown(optimizer)}, expected a paddle.optimizer.Optimizer or None; of a wrapper pass "
            "the optimizer within"
        )


def _check_word(argument: str, value: Any, words: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in words:
        return value
    raise (ValueError if isinstance(value, str) else TypeError)(
        f"{argument}: received {shown(value)}, expected {' or '.join(map(repr, words))}"
    )
