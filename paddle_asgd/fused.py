"""FusedOptimizer: what any Paddle optimizer needs whose step is one native call. Knows no formula.

The ways to a step in dygraph and in both kinds of static graph, GradScaler's protocol, sparse gradients, differences
between versions of Paddle. Options, state, checkpoints and checks of arguments have files of their own.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Callable, NamedTuple, NoReturn

import paddle
from paddle import _C_ops
from paddle.base.framework import in_dygraph_mode, name_scope
from paddle.base.layer_helper import LayerHelper
from paddle.optimizer import Optimizer
from paddle.regularizer import WeightDecayRegularizer

from . import arguments, checkpoint
from .arguments import is_tensor
from .options import ClipByGroup, Pairs, ParameterOptions
from .shortcut import StepPlan
from .state import ParameterState, StateTensor, state_guard


class Bucket(NamedTuple):
    """Parameters that one native call updates: lists that run parallel."""

    params: list
    grads: list
    #: a list for every entry of the layout
    state: tuple[list, ...]
    masters: list | None
    #: what all of them share: the multiplier of the learning rate, and the decay
    learning_rate: Any
    weight_decay: Any


def _numel(bucket: Bucket) -> int:
    return sum(math.prod(param.shape) for param in bucket.params)


def _shaped(param: Any, grad: Any) -> Any:
    """The gradient in its parameter's shape: clipping makes [1] of the [] of a parameter without dimensions."""
    return grad.reshape([]) if len(param.shape) == 0 and len(grad.shape) == 1 else grad


class FusedOptimizer(Optimizer):
    """Base of optimizers that update all parameters in one native call.

    A subclass implements ``_update``, and says what it keeps for each parameter (``layout``) and which of its arguments
    a checkpoint depends on (``hyperparameters``).
    """

    def __init__(
        self,
        learning_rate: Any,
        parameters: Any,
        weight_decay: Any,
        grad_clip: Any,
        multi_precision: bool,
        name: str | None,
        layout: tuple[StateTensor, ...],
        hyperparameters: dict[str, int],
    ) -> None:
        learning_rate = arguments.check_learning_rate(learning_rate)
        weight_decay = arguments.check_weight_decay(weight_decay)
        grad_clip = arguments.check_grad_clip(grad_clip)
        flat, groups = arguments.check_parameters(parameters)
        super().__init__(
            # Paddle's constructor refuses a tensor, which its documentation allows.
            learning_rate=0.0 if is_tensor(learning_rate) else learning_rate,
            # Given groups, it would write their options onto the parameters.
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
        self._options = ParameterOptions(groups, weight_decay)
        if groups is not None:
            self._param_groups = groups
        if any("grad_clip" in group for group in groups or ()):
            self._grad_clip = ClipByGroup(self._options, grad_clip)
        self._state = ParameterState(self, layout)
        self._hyperparameters = hyperparameters
        self._plan: StepPlan | None = None
        self._ends_step = True

    def _update(
        self, bucket: Bucket, learning_rate: Any, weight_decay: Any, found_inf: Any, check_only: bool = False
    ) -> None:
        """Make the native call of this optimizer, or only its checks."""
        raise NotImplementedError

    def _begin_step(self) -> None:
        """Refuse a step that cannot be taken, before anything is done; for subclasses."""

    def _end_step(self) -> None:
        """After a step that was taken, or skipped for an Inf; for subclasses."""

    def _adapt_loaded(self, states: dict[str, dict[str, Any]]) -> None:
        """Bring what a checkpoint holds for each parameter into the form of this optimizer's state; for subclasses."""

    # ---- The ways to a step -----------------------------------------------------------------------------------------

    @paddle.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, once.

        Args:
            closure: called first, with gradients enabled, to compute the loss and its gradients anew.

        Returns:
            What ``closure`` returned; None without one.
        """
        loss = None
        if closure is not None:
            arguments.check_closure(closure)
            with paddle.enable_grad():
                loss = closure()
        if paddle.base.dygraph.base.in_to_static_mode():
            self._declarative_step()
            return loss
        if not in_dygraph_mode():
            raise RuntimeError(
                "step: received a call in static graph mode, expected dygraph; build the step by minimize()"
            )
        self._require_parameters()
        if self._plan is not None and self._plan.run(self):
            return loss
        pairs = []
        for param in self._parameter_list:
            if param.stop_gradient:
                continue
            # Mixed precision may leave a float32 gradient beside the 16-bit one.
            grad = getattr(param, "main_grad", None)
            if grad is None:
                grad = param._grad_ivar()
            if grad is not None:
                pairs.append((param, grad))
        self._apply_optimize(loss=None, startup_program=None, params_grads=pairs)
        return loss

    def backward(self, loss: Any, *args: Any, **options: Any) -> Pairs:
        """Compute the gradients, or append what computes them to a static graph: the first half of ``minimize``."""
        if in_dygraph_mode():
            return super().backward(loss, *args, **options)
        with warnings.catch_warnings():
            # Paddle 3.2 and 3.3 ask a variable of the graph for its place here, and warn of it. No caller can help it.
            warnings.filterwarnings("ignore", ".* do not have 'place' interface", UserWarning)
            return super().backward(loss, *args, **options)

    def _apply_optimize(self, loss: Any, startup_program: Any, params_grads: Any, param_group_idx: int = 0) -> Any:
        """Clip, regularize, update. Wrappers that shard the state call this, some with a group instead of a list."""
        # A wrapper may come with one group at a time, of which the last ends the step, or with one group for all.
        by_group = isinstance(params_grads, dict) and isinstance(self._param_groups[0], dict)
        self._ends_step = not by_group or param_group_idx == len(self._param_groups) - 1
        if isinstance(params_grads, dict):
            params_grads = params_grads["params"]
        if in_dygraph_mode() and isinstance(self._grad_clip, (ClipByGroup, paddle.nn.ClipGradByValue)):
            # Paddle's clip by value takes a sparse gradient for a dense one and reads what is not there.
            params_grads = [(p, self._dense(p, g)) for p, g in params_grads if g is not None]
        return super()._apply_optimize(loss, startup_program, params_grads)

    def append_regularization_ops(self, parameters_and_grads: Pairs, regularization: Any = None) -> Pairs:
        """Add each parameter's regularizer, if it has one, to its gradient; weight decay by a number is not here."""
        regularized: Pairs = []
        for pair in parameters_and_grads:
            regularizer = self._options.of(pair[0]).regularizer
            if regularizer is None:
                regularized.append(pair)
            else:
                regularized += super().append_regularization_ops([pair], regularizer)
        return regularized

    @paddle.no_grad()
    def _create_optimization_pass(self, parameters_and_grads: Pairs, param_group_idx: int = 0) -> list:
        """Where every way to a step meets: dygraph updates at once, static graphs append the operator."""
        self._begin_step()
        pairs = [(p, _shaped(p, g)) for p, g in parameters_and_grads if g is not None and not p.stop_gradient]
        if in_dygraph_mode():
            if not self._skips_step():
                pairs = [(p, self._native_form(p, g)) for p, g in pairs]
                self._plan = StepPlan.of(self, self._update_buckets(pairs, None))
            if self._ends_step:
                self._end_step()
            return []
        program = paddle.static.default_main_program()
        before = len(program.global_block().ops)
        # The role tells Paddle which operators to drop when the program is cloned for evaluation.
        with program._optimized_guard([item for pair in pairs for item in pair]), name_scope("optimizer"):
            self._create_global_learning_rate()
            self._update_buckets(pairs, self._get_auxiliary_var("found_inf"))
        self._end_step()
        return list(program.global_block().ops)[before:]

    _pir_create_optimization_pass = _create_optimization_pass

    def _require_parameters(self) -> None:
        """An optimizer made in static mode may stand for all parameters of a program, which dygraph does not have."""
        if in_dygraph_mode() and self._parameter_list is None:
            raise ValueError(
                "parameters: received None when the optimizer was made in static graph mode, expected a list of tensors"
            )

    def _skips_step(self) -> bool:
        """GradScaler's protocol: it leaves a tensor in found_inf and expects to find its truth there."""
        found_inf = self._get_auxiliary_var("found_inf")
        if isinstance(found_inf, paddle.Tensor):
            found_inf = bool(found_inf)
            self._set_auxiliary_var("found_inf", found_inf)
        return bool(found_inf)

    def _native_form(self, param: Any, grad: Any) -> Any:
        """The gradient as the native call takes it: in one piece, and dense unless it is sparse on the CPU.

        The kernel of the CPU reads the rows of a sparse gradient where they are, which takes no memory of the
        parameter's size. On a GPU each step makes a dense copy.
        """
        if grad.is_selected_rows() and param.place.is_cpu_place():
            return grad
        return self._dense(param, grad)

    def _dense(self, param: Any, grad: Any) -> Any:
        """The gradient dense and in one piece, duplicate rows of a sparse one added up."""
        if grad.is_selected_rows():
            return _C_ops.add_n([paddle.zeros_like(param, dtype=grad.dtype), grad])
        return grad if grad.is_contiguous() else grad.contiguous()

    def _update_buckets(self, pairs: Pairs, found_inf: Any) -> list[Bucket]:
        """One native call for all parameters that share learning rate and decay; almost always that is one call."""
        fresh: list = []
        try:
            buckets = self._fill_buckets(pairs, fresh)
            rate, decay = self._learning_rate_of_step, self._decay_of_step
            calls = [(b, rate(b.learning_rate), decay(b.weight_decay), found_inf) for b in buckets]
            if len(calls) > 1 and in_dygraph_mode():
                # All or nothing: what the last call would refuse, the first must not have begun.
                for call in calls:
                    self._update(*call, check_only=True)
            for call in calls:
                self._update(*call)
        except Exception:
            # State made for a gradient that does not fit would refuse every one that does, and memory may have run out
            # between two tensors of a state.
            for param in fresh:
                self._state.forget(param)
            raise
        return buckets

    def _fill_buckets(self, pairs: Pairs, fresh: list) -> list[Bucket]:
        """Sort the parameters into buckets; those whose state has to be made are added to ``fresh``."""
        buckets: dict[tuple, Bucket] = {}
        with state_guard():
            for param, grad in pairs:
                options = self._options.of(param)
                state = self._state.of(param)
                if state is None:
                    fresh.append(param)
                    state = self._state.create(param, grad.dtype)
                master = self._state.master_of(param)
                key = (*(id(o) if is_tensor(o) else o for o in options[:2]), master is None)
                bucket = buckets.get(key)
                if bucket is None:
                    bucket = Bucket([], [], tuple([] for _ in state), None if master is None else [], *options[:2])
                    buckets[key] = bucket
                bucket.params.append(param)
                bucket.grads.append(self._state.stored_form(state, grad))
                for values, value in zip(bucket.state, state):
                    values.append(value)
                if master is not None:
                    bucket.masters.append(master)
        found = list(buckets.values())
        # The largest first: a subclass may look at one bucket of a step only.
        return sorted(found, key=_numel, reverse=True) if len(found) > 1 else found

    # ---- What multiplies --------------------------------------------------------------------------------------------

    def _learning_rate_of_step(self, multiplier: Any) -> Any:
        """The learning rate as the native call takes it: a number in dygraph, a variable in static graphs."""
        if is_tensor(multiplier):
            return multiplier
        rate = self._learning_rate
        if in_dygraph_mode():
            if not is_tensor(rate) or rate.place.is_cpu_place():
                return arguments.check_number("learning_rate of this step", self.get_lr()) * multiplier
            return rate if multiplier == 1.0 else rate * multiplier  # on a device: no wait for its value
        if not is_tensor(rate):
            rate = self._global_learning_rate()
        # Not rate * multiplier, whose factor is a float32 attribute in the older graph format.
        return rate if multiplier == 1.0 else paddle.multiply(rate, paddle.full([], multiplier, dtype=rate.dtype))

    def _decay_of_step(self, decay: Any) -> Any:
        """The weight decay, likewise."""
        if not is_tensor(decay):
            # In static graphs a tensor: an operator's attribute cannot hold a float64.
            return decay if in_dygraph_mode() else paddle.full([1], decay, dtype="float64")
        if in_dygraph_mode() and decay.place.is_cpu_place():
            return arguments.check_number("weight_decay of this step", decay.item())
        return decay

    def _create_global_learning_rate(self) -> None:
        """Static graphs: the variable that holds the learning rate, in float64 whatever the parameters are."""
        if is_tensor(self._learning_rate):
            return
        self._dtype = paddle.float64
        super()._create_global_learning_rate()

    def get_lr(self) -> float:
        """The learning rate that the next step will use, before the multipliers of groups and parameters."""
        rate = self._learning_rate if is_tensor(self._learning_rate) else super().get_lr()
        # A scheduler of the user's own may give an array or a tensor.
        return rate.item() if hasattr(rate, "item") else rate

    def set_lr(self, value: float) -> None:
        """Set the learning rate; an optimizer with an LRScheduler refuses (RuntimeError)."""
        super().set_lr(arguments.check_number("learning_rate", value))

    # ---- State ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All state by the names that Paddle gives it, and the hyperparameters that it depends on.

        The tensors are the optimizer's own and change with its next step: save them, or copy them, before.
        """
        return checkpoint.collect(self)

    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this or of Paddle's own optimizer gave, by copying; all of it, or nothing.

        Raises:
            ValueError: an entry is missing, misshapen, or belongs to no parameter; nothing has been written.
        """
        self._plan = None
        checkpoint.load(self, state_dict)

    load_state_dict = set_state_dict

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: an optimizer is tied to its parameters and cannot be copied or pickled. Create "
            "one for the copied parameters with the same arguments, and give it this one's state: "
            "copy.set_state_dict(optimizer.state_dict())"
        )
