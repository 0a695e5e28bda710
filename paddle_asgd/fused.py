# SPDX-License-Identifier: Apache-2.0
"""FusedOptimizer: what any Paddle optimizer needs whose step is one native call. Must not know a formula.

It holds the ways to a step in dygraph and in both formats of static graphs, GradScaler's protocol, sparse gradients,
and differences between versions of Paddle. Options, state, checkpoints and checks of arguments have their own files.
"""

from __future__ import annotations

import inspect
import math
import warnings
from functools import partial
from typing import Any, Callable, NoReturn

import paddle
from paddle.base.framework import in_dygraph_mode, name_scope
from paddle.base.layer_helper import LayerHelper
from paddle.optimizer import Optimizer
from paddle.optimizer.lr import LRScheduler
from paddle.regularizer import WeightDecayRegularizer

from . import arguments, checkpoint
from .arguments import NO_CHECKS, GroupChecks, dtype_name, is_tensor
from .caller import warn
from .distributed_tensors import is_cleared
from .gradients import dense, native_form, shaped
from .hooks import Hooked
from .options import Bucket, ClipByGroup, Pairs, ParameterOptions, sort_into_buckets
from .sharded_checkpoint import ShardedCheckpoint
from .sharding import parts_group, state_for_part, state_of_part
from .shortcut import Shortcut
from .state import ParameterState, StateTensor, expected_gradient
from .tracing import leave_trace
from .uninterrupted import uninterrupted


def _brief(value: Any) -> str:
    """A number or None as it is, anything else as the name of its type, for a repr."""
    return repr(value) if value is None or isinstance(value, float) else type(value).__name__


class FusedOptimizer(Hooked, ShardedCheckpoint, Optimizer):
    """Base of optimizers that update all parameters in one native call.

    A subclass implements ``_native_call``. The constructor checks its arguments and keeps them.

    Args:
        learning_rate: a number of at least 0, an ``LRScheduler``, or a tensor of one float32 or float64.
        parameters: a list of tensors or of groups; in static graph mode None stands for all trainable parameters.
        weight_decay: None, a number of at least 0, a tensor of one element, or a regularizer.
        grad_clip: None or one of ``paddle.nn.ClipGradBy...``.
        multi_precision: whether 16-bit parameters have float32 master weights.
        name: a prefix for the names of the state; None for no prefix.
        layout: the tensors that the optimizer keeps for each parameter.
        hyperparameters: those arguments of the subclass that the state depends on. A checkpoint holds them, and one
            with other values is refused.
        maximize: whether steps go along the gradient.
        group_checks: the options that a group has besides those of every optimizer, each with its check.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    #: names of tensors of ``ParameterState.place_beside``: files of static graphs hold them, checkpoints do not
    _unsaved: tuple[str, ...] = ()
    #: keys of numbers in a checkpoint that belong to no parameter, besides the hyperparameters; for subclasses
    _number_entries: tuple[str, ...] = ()
    #: what the error about a closure that cannot be called adds; for subclasses
    _closure_remedy = ""

    def __init__(
        self,
        learning_rate: Any,
        parameters: Any,
        weight_decay: Any,
        grad_clip: Any,
        multi_precision: bool,
        name: str | None,
        layout: tuple[StateTensor, ...],
        hyperparameters: dict[str, int | float],
        maximize: bool = False,
        group_checks: GroupChecks = NO_CHECKS,
    ) -> None:
        learning_rate = arguments.check_learning_rate(learning_rate)
        weight_decay = arguments.check_weight_decay(weight_decay)
        grad_clip = arguments.check_grad_clip(grad_clip)
        reserved = inspect.signature(type(self)).parameters.keys() - {"name"}
        flat, groups = arguments.check_parameters(parameters, reserved, group_checks)
        super().__init__(
            # Paddle's constructor refuses a tensor, which its documentation allows.
            learning_rate=0.0 if is_tensor(learning_rate) else learning_rate,
            # If it got groups, it would write their options onto the parameters.
            parameters=flat,
            weight_decay=weight_decay if isinstance(weight_decay, WeightDecayRegularizer) else None,
            grad_clip=grad_clip,
            name=arguments.check_name(name),
        )
        # Paddle 2.6 makes one in a method that is overridden here.
        self.helper = LayerHelper(type(self).__name__)
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self._multi_precision = arguments.check_flag("multi_precision", multi_precision)
        self._maximize = arguments.check_flag("maximize", maximize)
        #: the list that this optimizer was given or made; a wrapper that divides the parameters replaces it
        self._own_list = self._parameter_list
        self._shortcut: Shortcut | None = None
        self._take_options(ParameterOptions(groups, weight_decay, reserved, group_checks))
        self._state = ParameterState(self, layout, self._forget_shortcut)
        self._hyperparameters = hyperparameters
        #: for wrappers that call group by group: whether a call is the last of its step, and the first that updates
        self._ends_step = True
        self._first_part = True
        #: whether the room for the state is still to be checked
        self._room_unchecked = False

    def _native_call(
        self, bucket: Bucket, rates: tuple[Any, Any], found_inf: Any, leads: bool, check_only: bool = False
    ) -> Callable[[], None]:
        """Prepare the native call of this optimizer, or of its checks alone. In dygraph it must be a single C call.

        Args:
            bucket: the parameters to update, their gradients, state and master weights.
            rates: the learning rate and the weight decay of this step: floats or tensors of one element; in static
                graphs tensors.
            found_inf: None; in static graphs a variable of one bool, or None. Where it is True the step changes
                nothing.
            leads: True for one call of a step, that of the most elements, for what belongs to the step as a whole.
            check_only: check everything, and change nothing.
        """
        raise NotImplementedError

    def _take_planned(self, plan: Any, bucket: Bucket, rates: tuple[Any, Any]) -> None:
        """Take a step by a plan, and note it behind the update in the same native call, as ``_step_taken`` does. For
        subclasses; without it every step goes the full way.

        Args:
            plan: of the bucket's lists: the parameters, those of its state, the master weights, and last the lists of
                partial entries.
            bucket: the same as in the last step, but for the gradients.
            rates: the learning rate and the weight decay.

        Raises:
            ValueError: the plan does not hold. Nothing has been done.
        """
        raise NotImplementedError

    def _begin_step(self) -> None:
        """Refuse a step that cannot be taken, before anything is done. For subclasses; one step may call it twice."""

    def _step_taken(self) -> list[Callable[[], Any]]:
        """C calls that note a step which was taken, or skipped because of an Inf, beside its tensors. For subclasses.

        They run with the native call: no interrupt can come in between.
        """
        return []

    def _end_step(self) -> None:
        """Do what follows a step that was taken or skipped, and may be left out if an interrupt comes first. For
        subclasses.
        """

    def _adapt_loaded(self, states: dict[str, dict[str, Any]], undo: list[Callable[[], Any]]) -> None:
        """Bring a checkpoint's state into the form that this optimizer keeps. For subclasses.

        Args:
            states: what the checkpoint holds for each parameter, by the names of the parameter and of the entry;
                changed in place.
            undo: gets the calls that undo changes of the optimizer, in case the checkpoint is refused later.
        """

    def _check_parameters(self, parameters: list, options: ParameterOptions) -> None:
        """Refuse parameters without state whose state there would be no room for. For subclasses.

        Args:
            parameters: those whose state is still to be made.
            options: of all parameters; of edited groups those that are about to be taken.
        """

    def _check_options(self, options: ParameterOptions) -> None:
        """Refuse options of edited groups that the state which is there does not allow. For subclasses."""

    def _check_room(self) -> None:
        """Check the parameters of a constructor, or later those that are left when fleet has divided them."""
        self._room_unchecked = parts_group() is not None
        if not self._room_unchecked:
            self._check_parameters(self._parameter_list or [], self._options)

    def _check_room_of_part(self) -> None:
        """Make up for the check that the constructor has put off, before any state is made."""
        if self._room_unchecked:
            self._check_parameters([p for p in self._parameter_list or [] if self._state.of(p) is None], self._options)
            self._room_unchecked = False

    # ---- Groups -----------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups: dicts of ``params`` and the options given for them. A list of parameters becomes the first group.

        The groups may be edited between two steps: the next step checks them and follows. A key that is not an option
        is kept and has no effect.

        Raises:
            ValueError: the optimizer was made with ``parameters=None``, or a wrapper has divided the parameters.
        """
        if self._options.groups is None:
            if self._parameter_list is None:
                raise ValueError(
                    "param_groups: received parameters=None when the optimizer was made, expected a list of tensors"
                )
            self._refuse_where_divided()
            group = {"params": list(self._parameter_list)}
            self._take_options(self._options.of_groups([group]))
        return self._param_groups

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Train one more group of parameters from the next step on.

        Args:
            group: a dict with ``params``, a list of tensors or one tensor, and options for them, those that a group of
                the constructor may have: ``weight_decay``, ``grad_clip``, ``learning_rate``, a multiplier of the
                optimizer's, and those that only this optimizer has.

        Raises:
            TypeError, ValueError: the group is such as the constructor would refuse, or a wrapper has already divided
                the parameters among processes.
            RuntimeError: ``minimize`` has built a static graph's step.
        """
        leave_trace()
        if not in_dygraph_mode() and self._state.created:
            raise RuntimeError(
                "add_param_group: received a group after minimize() had built a step, expected it before the first"
            )
        self._refuse_where_divided()
        groups = self.param_groups
        self._follow_groups()
        groups.append(dict(group) if isinstance(group, dict) else group)
        try:
            self._follow_groups()
        except BaseException:
            groups.pop()
            raise

    _add_param_group = add_param_group

    def _follow_groups(self) -> None:
        """Train the parameters that are in the groups now, since the user may have edited them after the last step."""
        if self._param_groups is not self._options.groups:
            return  # a list, or a wrapper's groups
        options = self._options.edited()
        if options is None:
            return
        self._check_options(options)
        before, after = ({id(p) for p in o.parameters} for o in (self._options, options))
        if before != after:
            self._refuse_where_divided()
        params = [p for p in self._parameter_list if id(p) in after or id(p) not in before]
        held = {id(p) for p in params}
        params += [p for p in options.parameters if id(p) not in held and id(p) not in before]
        self._check_parameters([p for p in params if self._state.of(p) is None], options)
        # The order matters: after an interrupt between the two, the groups still count as edited.
        self._parameter_list[:] = params
        self._take_options(options)

    def _take_options(self, options: ParameterOptions) -> None:
        """Use other options from the next step on. If a group has a clip, the optimizer's becomes one that acts by
        group.
        """
        self._shortcut = None
        if options.has_clips:
            self._grad_clip = ClipByGroup(options, getattr(self._grad_clip, "default", self._grad_clip))
        self._options = options
        if options.groups is not None:
            self._param_groups = options.groups

    @property
    def is_divided(self) -> bool:
        """Whether a wrapper such as fleet's sharding has replaced the list of parameters by this process's part."""
        return self._parameter_list is not self._own_list

    def _parts_group(self) -> Any | None:
        """The ranks that have the other parts of the parameters; None if this process has all of them."""
        if self._state.in_shards:
            return paddle.distributed.get_group(0)
        return parts_group() if self.is_divided else None

    def _refuse_where_divided(self) -> None:
        """Refuse to change the parameters after a wrapper has replaced the list of them by its own part."""
        if self.is_divided:
            raise ValueError(
                "param_groups: received a change after a wrapper had replaced the list of parameters, expected it "
                "before; add groups before the optimizer is sharded"
            )

    # ---- The ways to a step -----------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, once.

        Args:
            closure: called first, with gradients enabled, to compute the loss and its gradients anew.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            TypeError: ``closure`` cannot be called, or a gradient or an option on a parameter is of the wrong type.
            ValueError: a gradient's shape or dtype does not fit, or the learning rate of this step is not a finite
                number of at least 0. The error names the parameter, and nothing has been written.
            RuntimeError: Paddle is in static graph mode, where ``minimize`` builds the step.
        """
        leave_trace()
        if self._hooks is not None and self._calls_hooks():
            return self._step_with_hooks(closure)
        loss = None
        if closure is not None:
            arguments.check_closure(closure, self._closure_remedy)
            with paddle.enable_grad():
                loss = closure()
        # Nothing of the shortcut computes with tensors, so it needs no guard against autograd.
        if self._shortcut is None or not self._step_by_shortcut(self._shortcut):
            self._step_in_full()
        return loss

    @paddle.no_grad()
    def _step_in_full(self) -> None:
        """Take a step that owes nothing to the last one."""
        if paddle.base.dygraph.base.in_to_static_mode():
            self._declarative_step()
            return
        if not in_dygraph_mode():
            raise RuntimeError(
                "step: received a call in static graph mode, expected dygraph; build the step by minimize()"
            )
        self._require_parameters()
        self._follow_groups()
        pairs = []
        for param in self._parameter_list:
            if param.stop_gradient:
                continue
            # Mixed precision may leave a float32 gradient beside the 16-bit one.
            grad = getattr(param, "main_grad", None)
            if grad is None:
                # Not _grad_ivar(), which Paddle 3.0 leaves None for a gradient without elements: sparse, of no rows.
                grad = param.grad
            if grad is not None:
                pairs.append((param, grad))
        self._apply_optimize(loss=None, startup_program=None, params_grads=pairs)

    def _step_by_shortcut(self, shortcut: Shortcut) -> bool:
        """Take a step that is like the last one.

        Returns:
            False if the step has to go the full way. Nothing has been done in that case.
        """
        if not in_dygraph_mode():
            return False
        bucket = shortcut.bucket
        try:
            self._begin_step()
            if self._shortcut is not shortcut:
                return False  # the subclass has changed the state
            self._take_planned(shortcut.plan, bucket, self._rates_of_step(bucket))
        except ValueError:
            # Something differs, or a gradient is strided. The full way makes a copy of it or says what is wrong.
            self._shortcut = None
            return False
        self._end_step()
        return True

    def _make_shortcut(self, buckets: list[Bucket]) -> None:
        """Spare the next step what this one has found out, if it will be like this one."""
        if not self._is_plain() or type(self)._take_planned is FusedOptimizer._take_planned:
            return
        own = ("_parameter_list", "_multi_precision", "_first_part", "_grad_clip", "_accumulators", "_master_weights")
        seen = [(vars(self), (*own, "_auxiliary_vars")), (self._auxiliary_vars, ("found_inf",))]
        seen += self._state.dictionaries
        self._shortcut = Shortcut.of(self._parameter_list, buckets, self._options, self._state.layout, seen)

    def _forget_shortcut(self) -> None:
        """Send the next step the full way, because tensors that the shortcut holds are about to change."""
        self._shortcut = None

    def _is_plain(self) -> bool:
        """Whether nothing stands between the gradients and the native call: no clip, and no Inf found."""
        found_inf = self._auxiliary_vars.get("found_inf")
        return self._grad_clip is None and (found_inf is None or found_inf is False)

    def backward(self, loss: Any, *args: Any, **options: Any) -> Pairs:
        """Compute the gradients, or append the operators that compute them to a static graph: the first half of
        ``minimize``.

        Args:
            loss: a tensor or a variable of one element.
            args: further arguments of Paddle's ``Optimizer.backward``: ``startup_program``, ``parameters``,
                ``no_grad_set``, ``callbacks``.
            options: the same by name.

        Returns:
            Parameters, each with its gradient, for ``apply_gradients``.
        """
        self._follow_groups()
        if in_dygraph_mode():
            return super().backward(loss, *args, **options)
        with warnings.catch_warnings():
            # Paddle 3.2 and 3.3 ask a variable of the graph for its place here and warn of that; no caller can help it.
            warnings.filterwarnings("ignore", ".* do not have 'place' interface", UserWarning)
            return super().backward(loss, *args, **options)

    def _apply_optimize(self, loss: Any, startup_program: Any, params_grads: Any, param_group_idx: int = 0) -> Any:
        """Clip, regularize and update. Wrappers that shard the state call this, some with a group in place of a list.

        Args:
            loss: None in dygraph.
            startup_program: None in dygraph.
            params_grads: parameters, each with its gradient or None; or a group, which holds such a list under
                ``params``.
            param_group_idx: the number of that group.
        """
        # A wrapper may pass one group at a time, the last of which ends the step, or one group that holds everything.
        by_group = isinstance(params_grads, dict) and isinstance(self._param_groups[0], dict)
        self._ends_step = not by_group or param_group_idx == len(self._param_groups) - 1
        # An interrupt may have ended the last step between two groups.
        self._first_part = self._first_part or not by_group or param_group_idx == 0
        if isinstance(params_grads, dict):
            params_grads = params_grads["params"]
        params_grads = [pair for pair in params_grads if not is_cleared(pair[1])]
        if self._first_part and self._calls_hooks():
            self._before_step()
        if in_dygraph_mode() and isinstance(self._grad_clip, (ClipByGroup, paddle.nn.ClipGradByValue)):
            # Paddle's clip by value reads a sparse gradient as if it were dense, beyond its end.
            params_grads = [(p, dense(p, g)) for p, g in params_grads if g is not None]
        return super()._apply_optimize(loss, startup_program, params_grads)

    def apply_gradients(self, params_grads: Pairs) -> list:
        """Clip, regularize and update: the second half of ``minimize``, for gradients that the caller has."""
        if self._first_part and self._calls_hooks():
            self._before_step()
        return super().apply_gradients(params_grads)

    def _calls_hooks(self) -> bool:
        """Whether a step begins here that calls hooks, and no call of ``step`` around this one does so."""
        return self._has_step_hooks() and in_dygraph_mode() and not self._skips_step()

    def append_regularization_ops(self, parameters_and_grads: Pairs, regularization: Any = None) -> Pairs:
        """Add each parameter's regularizer, if it has one, to its gradient. Weight decay by a number is not added here.

        ``regularization``, the optimizer's own, is ignored, because the parameters' options already contain it.
        """
        regularized: Pairs = []
        for pair in parameters_and_grads:
            regularizer = self._options.of(pair[0]).regularizer
            if regularizer is None:
                regularized.append(pair)
            elif not self._maximize:
                regularized += super().append_regularization_ops([pair], regularizer)
            else:
                # The step turns the gradient round, and must not turn what the regularizer adds to it.
                turned = super().append_regularization_ops([(pair[0], -pair[1])], regularizer)
                regularized += [(param, -grad) for param, grad in turned]
        return regularized

    @paddle.no_grad()
    def _create_optimization_pass(self, parameters_and_grads: Pairs, param_group_idx: int = 0) -> list:
        """Update at once in dygraph, or append the operator to a static graph. All ways to a step but the shortcut meet
        here.

        Returns:
            The operators appended; none in dygraph.
        """
        ends, self._ends_step = self._ends_step, True
        self._begin_step()
        pairs = [(p, shaped(p, g)) for p, g in parameters_and_grads if g is not None and not p.stop_gradient]
        if in_dygraph_mode():
            if self._skips_step():
                uninterrupted(*self._account_for([], ends))
            else:
                self._shortcut = None
                self._check_room_of_part()
                pairs = [(p, native_form(p, g)) for p, g in pairs]
                buckets = self._update_buckets(pairs, None, ends)
                self._make_shortcut(buckets)
            if ends:
                self._end_step()
                if self._calls_hooks():
                    self._after_step()
            return []
        program = paddle.static.default_main_program()
        before = len(program.global_block().ops)
        # By this role Paddle knows which operators to drop when the program is cloned for evaluation.
        with program._optimized_guard([item for pair in pairs for item in pair]), name_scope("optimizer"):
            self._create_global_learning_rate()
            self._update_buckets(pairs, self._get_auxiliary_var("found_inf"), True)
        self._end_step()
        return list(program.global_block().ops)[before:]

    _pir_create_optimization_pass = _create_optimization_pass

    def _require_parameters(self) -> None:
        """Refuse a dygraph call if the optimizer was made in static graph mode without parameters, to stand for all of
        a program.
        """
        if in_dygraph_mode() and self._parameter_list is None:
            raise ValueError(
                "parameters: received None when the optimizer was made in static graph mode, expected a list of tensors"
            )

    def _skips_step(self) -> bool:
        """Whether an Inf was found, so that the step is skipped.

        GradScaler leaves a tensor in ``found_inf`` and expects a bool in its place afterwards.
        """
        found_inf = self._get_auxiliary_var("found_inf")
        if isinstance(found_inf, paddle.Tensor):
            found_inf = bool(found_inf)
            self._set_auxiliary_var("found_inf", found_inf)
        return bool(found_inf)

    def _update_buckets(self, pairs: Pairs, found_inf: Any, ends: bool) -> list[Bucket]:
        """Make the state that is missing, and update. A step that is refused or interrupted leaves no state behind.

        Args:
            pairs: parameters, each with its gradient in its native form.
            found_inf: None; in static graphs a variable, or None.
            ends: whether this is the last part of the step.

        Returns:
            What was updated.
        """
        undo: list[Callable[[], Any]] = []
        try:
            buckets = sort_into_buckets(pairs, self._options, self._state, undo)
            # A step that was taken is not undone, even if an interrupt comes immediately after it.
            self._take(buckets, found_inf, ends, undo.clear)
        except BaseException:
            for call in undo:
                call()
            raise
        return buckets

    def _take(self, buckets: list[Bucket], found_inf: Any, ends: bool, *more: Callable[[], Any]) -> None:
        """Update the buckets, by one native call for each; almost always there is one.

        In dygraph no interrupt can come between these calls, nor between them and what is noted of the step.

        Args:
            buckets: what to update.
            found_inf: None; in static graphs a variable, or None.
            ends: whether this is the last part of the step.
            more: further C calls that belong to the step.
        """
        buckets = [bucket.on_this_rank() for bucket in buckets]
        rates = [self._rates_of_step(bucket) for bucket in buckets]
        if len(buckets) > 1 and in_dygraph_mode():
            # All or nothing: if the last call would be refused, the first must not have begun.
            for bucket, pair in zip(buckets, rates):
                self._native_call(bucket, pair, found_inf, leads=False, check_only=True)()
        leading = max(buckets, key=Bucket.numel) if len(buckets) > 1 else buckets[0] if buckets else None
        calls = [
            self._native_call(bucket, pair, found_inf, leads=self._first_part and bucket is leading)
            for bucket, pair in zip(buckets, rates)
        ]
        uninterrupted(*calls, *self._account_for(calls, ends), *more)

    def _account_for(self, calls: list, ends: bool) -> list[Callable[[], Any]]:
        """C calls that note a step, or one part of a step, as taken.

        Args:
            calls: the native calls; empty if the step is skipped, or a part of it has no gradient.
            ends: whether this is the last part of the step.
        """
        first_again = ends or (self._first_part and not calls)
        return [partial(setattr, self, "_first_part", first_again), *(self._step_taken() if ends else ())]

    # ---- What multiplies --------------------------------------------------------------------------------------------

    def _rates_of_step(self, bucket: Bucket) -> tuple[Any, Any]:
        """Learning rate and weight decay of a bucket as the native call takes them.

        Raises:
            TypeError, ValueError: one of them is not a finite number of at least 0.
        """
        rate, multiplier, decay = self._learning_rate, bucket.learning_rate, bucket.weight_decay
        rate = rate() if isinstance(rate, LRScheduler) else rate
        # This comes first because it is nearly always so, and because the question for a tensor takes longer.
        plain = type(rate) is type(multiplier) is type(decay) is float and 0.0 <= rate < math.inf
        if plain and in_dygraph_mode():
            return rate * multiplier, decay
        return self._learning_rate_of_step(multiplier), self._decay_of_step(decay)

    def _learning_rate_of_step(self, multiplier: Any) -> Any:
        """Learning rate as the native call takes it: a number in dygraph, a variable in static graphs.

        Args:
            multiplier: a bucket's; a tensor replaces the learning rate altogether.

        Returns:
            In dygraph a float, or a tensor if the learning rate lies on a device, since reading it would wait.

        Raises:
            TypeError, ValueError: the learning rate of this step is not a finite number of at least 0.
        """
        rate = self._learning_rate
        if is_tensor(multiplier):
            rate, multiplier = multiplier, 1.0
        if in_dygraph_mode():
            if not is_tensor(rate) or rate.place.is_cpu_place():
                number = rate.item() if is_tensor(rate) else self.get_lr()
                return arguments.check_number("learning_rate of this step", number) * multiplier
            return rate if multiplier == 1.0 else rate * multiplier  # on a device: no wait for its value
        if not is_tensor(rate):
            rate = self._global_learning_rate()
            if isinstance(self._learning_rate, LRScheduler):
                # The executor writes a scheduler's value as bytes of the variable's dtype, whatever dtype a loaded file
                # left in its place. Paddle's sum refuses two dtypes, where our operator would read what it finds.
                rate = paddle.add_n([paddle.zeros([], rate.dtype), rate])
        # ``rate * multiplier`` would make the factor a float32 attribute in the older graph format.
        return rate if multiplier == 1.0 else rate * paddle.full([], multiplier, dtype=rate.dtype)

    def _decay_of_step(self, decay: Any) -> Any:
        """Weight decay as the native call takes it: a number, or a tensor on a device; in static graphs a variable."""
        if not is_tensor(decay):
            # In a static graph it is a tensor, because an operator's attribute cannot hold a float64.
            return decay if in_dygraph_mode() else paddle.full([1], decay, dtype="float64")
        if in_dygraph_mode() and decay.place.is_cpu_place():
            return arguments.check_number("weight_decay of this step", decay.item())
        return decay

    def _create_global_learning_rate(self) -> None:
        """Create the variable of a static graph that holds the learning rate.

        Paddle's own optimizers choose the same dtype, so that each loads the other's files: the dtype of the first
        parameter or of the loss, and float32 in place of 16 bits.
        """
        if is_tensor(self._learning_rate):
            return
        dtype = paddle.get_default_dtype() if self._dtype is None else self._dtype
        if dtype_name(dtype) in ("float16", "bfloat16"):
            # If the default dtype has 16 bits, Paddle uses it here, which is too few for a learning rate.
            self._dtype = paddle.float32
        super()._create_global_learning_rate()

    def get_lr(self) -> float:
        """The learning rate that the next step will use, before the multipliers of groups and parameters."""
        leave_trace()
        rate = self._learning_rate if is_tensor(self._learning_rate) else super().get_lr()
        # A scheduler of the user's own may give an array or a tensor.
        return rate.item() if hasattr(rate, "item") else rate

    def set_lr(self, value: float) -> None:
        """Set the learning rate, unless it is an ``LRScheduler``, which sets it itself.

        Args:
            value: a number of at least 0.

        Raises:
            TypeError, ValueError: the value is not a finite number of at least 0.
            RuntimeError: the optimizer's learning rate is an ``LRScheduler``.
        """
        leave_trace()
        super().set_lr(arguments.check_number("learning_rate", value))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters: to none, or with ``set_to_none=False`` to zeros."""
        self.clear_grad(not set_to_none)

    # ---- State ------------------------------------------------------------------------------------------------------

    def _create_accumulators(self, block: Any, parameters: list) -> None:
        """Make all state before the first step, so that ``state_dict`` names every entry that a load may fill."""
        self._check_room_of_part()
        for param in parameters:
            if self._state.of(param) is None and not param.stop_gradient:
                self._state.create(param, expected_gradient(param))

    def state_dict(self) -> dict[str, Any]:
        """All state by the names that Paddle gives it, and the hyperparameters that it depends on.

        The tensors are the optimizer's own and change with its next step: save or copy them before that.
        """
        leave_trace()
        return self._collect_for_rank() if self._hooks is None else self._collect_with_hooks()

    def _collect_for_rank(self) -> dict[str, Any]:
        """What ``state_dict`` returns, in a form that wrappers load whole if they have divided the parameters."""
        collected = self._collect()
        if not self.is_divided:
            return collected
        return state_of_part(collected, self._number_keys(), self._own_list, self._parameter_list)

    def _number_keys(self) -> list[str]:
        """Keys of all entries of a checkpoint that belong to no parameter."""
        return [*self._hyperparameters, *self._number_entries]

    def _collect(self) -> dict[str, Any]:
        """What ``state_dict`` returns; a subclass may add entries."""
        return checkpoint.collect(self._kept())

    def _kept(self) -> checkpoint.Kept:
        """What a checkpoint holds of this optimizer, for ``checkpoint.collect`` and ``checkpoint.load``."""
        self._require_parameters()
        return checkpoint.Kept(
            *(self._state, self._parameter_list or [], self._hyperparameters, self._learning_rate, self._unsaved),
            self._own_list or [],
        )

    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this or of Paddle's own optimizer gave, by copying; all of it, or nothing.

        Args:
            state_dict: entries by name, tensors or arrays. They stay the caller's.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: an entry is missing, misshapen, or belongs to no parameter; nothing has been written.
            RuntimeError: Paddle is in static graph mode.
        """
        leave_trace()
        if self._hooks is None:
            self._load_of_rank(state_dict)
        else:
            self._load_with_hooks(state_dict)

    def _load_of_rank(self, state_dict: dict[str, Any]) -> None:
        """What ``set_state_dict`` does, for a state that a wrapper may have divided or shortened."""
        self._follow_groups()  # what a checkpoint must hold may depend on a group's options
        if isinstance(state_dict, dict):
            lists = (self._own_list or [], self._parameter_list or [])
            state_dict = state_for_part(state_dict, self._number_keys(), *lists)
            missing = [name for name in self._hyperparameters if name not in state_dict]
            if missing and self.is_divided:
                warn(
                    f"set_state_dict: no entry {missing[0]!r}, so what the state was made with cannot be compared; a "
                    "wrapper such as fleet's drops it from a state of a single process: load that by the "
                    "set_state_dict of the optimizer that was wrapped"
                )
        self._load_entries(state_dict)

    def _load_entries(self, state_dict: dict[str, Any], load: Callable[..., None] | None = None) -> None:
        """What ``set_state_dict`` does; a subclass may take entries of its own out before.

        Args:
            state_dict: all entries.
            load: takes the others, and further C calls to make with the loading; ``_load`` by default.
        """
        (load or self._load)(state_dict)

    def _load(self, state_dict: dict[str, Any], *more: Callable[[], Any]) -> None:
        """Load a state_dict as ``set_state_dict`` does.

        Args:
            state_dict: the entries that the ground knows.
            more: further C calls, which are made together with the copying.
        """
        self._shortcut = None
        self._check_room_of_part()
        checkpoint.load(self._kept(), state_dict, self._adapt_loaded, *more)

    load_state_dict = set_state_dict

    def _shown(self) -> dict[str, str]:
        """Text of the arguments that are not at their defaults, by name, for a repr. For subclasses."""
        return {}

    def __repr__(self) -> str:
        clip = getattr(self._grad_clip, "default", self._grad_clip)
        shown = {
            "learning_rate": _brief(self._learning_rate),
            **{name: repr(value) for name, value in self._hyperparameters.items()},
            "parameters": "all" if self._parameter_list is None else len(self._parameter_list),
            "weight_decay": _brief(self._weight_decay),
            "grad_clip": _brief(clip),
            "multi_precision": self._multi_precision,
            **({"maximize": True} if self._maximize else {}),
            **self._shown(),
        }
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in shown.items())})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: an optimizer is tied to its parameters and cannot be copied or pickled. Create "
            "one for the copied parameters with the same arguments, and give it this one's state: "
            "copy.set_state_dict(optimizer.state_dict())"
        )
