"""FusedOptimizer: what any Paddle optimizer needs whose step is one native call. Knows no formula.

Groups, master weights, found_inf, sparse gradients, dygraph and both kinds of static graph, differences between
versions of Paddle. Checkpoints are in checkpoint.py, checks of the constructor's arguments in arguments.py.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, Callable, NamedTuple, NoReturn, Optional

import paddle
from paddle import _C_ops
from paddle.base.framework import dygraph_guard_if_declarative, in_dygraph_mode, in_pir_mode, name_scope
from paddle.base.layer_helper import LayerHelper
from paddle.optimizer import Optimizer
from paddle.regularizer import WeightDecayRegularizer

from . import arguments, checkpoint
from .arguments import dtype_name, is_tensor

Pairs = list[tuple[Any, Any]]


class StateTensor(NamedTuple):
    """One tensor of state that an optimizer keeps for every parameter."""

    name: str
    #: "compute" (float32, and float64 for float64 parameters), "gradient" (what arrives as gradient), or a dtype
    dtype: str
    #: from the parameter's shape to the state's
    shape: Callable[[list[int]], list[int]]


class Bucket(NamedTuple):
    """Parameters that one native call updates: lists that run parallel."""

    params: list
    grads: list
    #: a list for every entry of ``FusedOptimizer._state_layout``
    state: tuple[list, ...]
    masters: Optional[list]


class Options(NamedTuple):
    """What one parameter is updated with, besides what all share."""

    #: multiplier of the optimizer's learning rate; a variable replaces it
    learning_rate: Any
    #: decay outside of the gradient, a number or a tensor
    weight_decay: Any
    #: decay inside of the gradient, by Paddle's own path
    regularizer: Optional[WeightDecayRegularizer]


class _ClipByGroup(paddle.nn.clip.GradientClipBase):
    """Clips each group with its own clip, and all groups without one together, by the optimizer's."""

    def __init__(self, optimizer: FusedOptimizer, default: Any) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._default = default

    def __call__(self, params_grads: Pairs) -> Pairs:
        by_clip: dict[int, tuple[Any, Pairs]] = {}
        for pair in params_grads:
            clip = self._optimizer._group_of.get(pair[0].name, {}).get("grad_clip", self._default)
            by_clip.setdefault(id(clip), (clip, []))[1].append(pair)
        return [pair for clip, pairs in by_clip.values() for pair in (pairs if clip is None else clip(pairs))]


class FusedOptimizer(Optimizer):
    """Base of optimizers that update all parameters in one native call.

    A subclass sets ``_state_layout``, and ``_hyperparameters`` (kept in checkpoints), before it calls this
    constructor, and implements ``_update``.
    """

    _state_layout: tuple[StateTensor, ...]
    _hyperparameters: dict[str, int]

    def __init__(
        self,
        learning_rate: Any,
        parameters: Any,
        weight_decay: Any,
        grad_clip: Any,
        multi_precision: bool,
        name: Optional[str],
    ) -> None:
        learning_rate = arguments.check_learning_rate(learning_rate)
        weight_decay = arguments.check_weight_decay(weight_decay)
        flat, groups = arguments.check_parameters(parameters)
        in_gradient = isinstance(weight_decay, WeightDecayRegularizer)
        super().__init__(
            # Paddle's constructor refuses a tensor, which its documentation allows.
            learning_rate=0.0 if is_tensor(learning_rate) else learning_rate,
            parameters=flat,
            weight_decay=weight_decay if in_gradient else None,
            grad_clip=arguments.check_grad_clip(grad_clip),
            name=arguments.check_name(name),
        )
        # Paddle 2.6 makes one in a method that is overridden here.
        self.helper = LayerHelper(type(self).__name__)
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self._multi_precision = arguments.check_flag("multi_precision", multi_precision)
        # Paddle's constructor, given groups, would write their options onto the parameters, where the next optimizer
        # finds them. It got a flat list; the groups stay here.
        if groups is not None:
            self._param_groups = groups
        self._group_of = {param.name: group for group in groups or () for param in group["params"]}
        if any("grad_clip" in group for group in groups or ()):
            self._grad_clip = _ClipByGroup(self, grad_clip)
        self._warned_of_16_bit = False

    # ---- What a subclass provides -----------------------------------------------------------------------------------

    def _update(self, bucket: Bucket, learning_rate: Any, weight_decay: Any, found_inf: Any) -> None:
        """Make the native call of this optimizer."""
        raise NotImplementedError

    # ---- Options ----------------------------------------------------------------------------------------------------

    def _options(self, param: Any) -> Options:
        """A parameter's own regularizer wins over its group's weight_decay, and that over the optimizer's."""
        group = self._group_of.get(param.name, {})
        attributes = getattr(param, "optimize_attr", None) or {}
        multiplier = group.get("learning_rate", attributes.get("learning_rate", 1.0))
        decay = getattr(param, "regularizer", None)
        if decay is None:
            decay = group.get("weight_decay")
        if decay is None:
            decay = self._weight_decay
        if isinstance(decay, WeightDecayRegularizer):
            return Options(multiplier, 0.0, decay)
        return Options(multiplier, 0.0 if decay is None else decay, None)

    def append_regularization_ops(self, parameters_and_grads: Pairs, regularization: Any = None) -> Pairs:
        """Add each parameter's regularizer, if it has one, to its gradient; weight decay by a number is not here."""
        regularized: Pairs = []
        for pair in parameters_and_grads:
            regularizer = self._options(pair[0]).regularizer
            if regularizer is None:
                regularized.append(pair)
            else:
                regularized += super().append_regularization_ops([pair], regularizer)
        return regularized

    def _learning_rate_of_step(self, multiplier: Any) -> Any:
        """The learning rate as the native call takes it: a number in dygraph, a variable in static graphs."""
        if is_tensor(multiplier):
            return multiplier
        rate = self._learning_rate
        if in_dygraph_mode():
            if not is_tensor(rate):
                return arguments.check_step_learning_rate(self.get_lr()) * multiplier
            if rate.place.is_cpu_place():
                return arguments.check_step_learning_rate(rate.item()) * multiplier
            return rate if multiplier == 1.0 else rate * multiplier  # on a device: no wait for its value
        if not is_tensor(rate):
            rate = self._global_learning_rate()
        # Not rate * multiplier, whose factor is a float32 attribute in the older graph format.
        return rate if multiplier == 1.0 else paddle.multiply(rate, paddle.full([], multiplier, dtype=rate.dtype))

    def _create_global_learning_rate(self) -> None:
        """Static graphs: the variable that holds the learning rate, in float64 whatever the parameters are."""
        if is_tensor(self._learning_rate):
            return
        self._dtype = paddle.float64
        super()._create_global_learning_rate()

    # ---- State ------------------------------------------------------------------------------------------------------

    def _is_16_bit(self, param: Any) -> bool:
        return dtype_name(param.dtype) in ("float16", "bfloat16")

    def _owner(self, param: Any) -> Any:
        """The tensor whose name a parameter's state bears: its master weight, as Paddle has it, or itself."""
        master = self._master_weights.get(param.name)
        if master is None or self._has_state(param):
            return param
        return master

    def _has_state(self, target: Any) -> bool:
        return target.name in self._accumulators.get(self._key(self._state_layout[0].name), {})

    def _key(self, name: str) -> str:
        """How Paddle's dictionary of accumulators spells the name of a state tensor."""
        return name if self._name is None else f"{self._name}_{name}"

    def _state_of(self, param: Any) -> Optional[list]:
        """The parameter's state tensors in the order of the layout; None before its first step."""
        owner = self._owner(param)
        if not self._has_state(owner):
            return None
        return [self._accumulators[self._key(entry.name)][owner.name] for entry in self._state_layout]

    def _create_state(self, param: Any, gradient_dtype: Any) -> list:
        """State of zeros for one parameter, and its master weight if it shall have one."""
        if self._is_16_bit(param):
            if self._multi_precision:
                self._create_master_weight(param).stop_gradient = True
            elif not self._warned_of_16_bit:
                self._warned_of_16_bit = True
                warnings.warn(
                    f"{type(self).__name__}: parameter {param.name!r} is {dtype_name(param.dtype)} and is rounded to it "
                    "after every step, which loses small updates. multi_precision=True keeps a float32 copy instead.",
                    UserWarning,
                    stacklevel=2,
                )
        compute = "float64" if dtype_name(param.dtype) == "float64" else "float32"
        dtypes = {"compute": compute, "gradient": gradient_dtype}
        # Paddle would place the state on the current device, whatever device the parameter is on.
        place = getattr(param, "place", None)
        on_cpu = in_dygraph_mode() and place is not None and place.is_cpu_place()
        owner = self._owner(param)
        for entry in self._state_layout:
            self._add_accumulator(
                entry.name,
                owner,
                dtype=dtypes.get(entry.dtype, entry.dtype),
                shape=entry.shape(list(param.shape)),
                device="cpu" if on_cpu else None,
            )
        return self._state_of(param)

    def _drop_state(self, param: Any) -> None:
        """Forget the parameter's history, as if it had taken no step."""
        owner = self._owner(param).name
        for entry in self._state_layout:
            del self._accumulators[self._key(entry.name)][owner]

    def _create_master_weight(self, param: Any) -> Any:
        """Paddle's, but never part of an autograd graph."""
        with paddle.no_grad():
            return super()._create_master_weight(param)

    # ---- The update -------------------------------------------------------------------------------------------------

    @paddle.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Update all parameters that have a gradient, once.

        Args:
            closure: called first, with gradients enabled, to compute the loss and its gradients anew.

        Returns:
            What ``closure`` returned; None without one.
        """
        loss = None
        if closure is not None:
            with paddle.enable_grad():
                loss = closure()
        if paddle.base.dygraph.base.in_to_static_mode():
            self._declarative_step()
            return loss
        pairs = []
        for param in self._parameter_list:
            if param.stop_gradient:
                continue
            grad = getattr(param, "main_grad", None)
            grad = param._grad_ivar() if grad is None else grad
            if grad is not None:
                pairs.append((param, grad))
        self._apply_optimize(loss=None, startup_program=None, params_grads=pairs)
        return loss

    def _apply_optimize(self, loss: Any, startup_program: Any, params_grads: Any, param_group_idx: int = 0) -> Any:
        """Clip, regularize, update. Wrappers that shard the state call this, some with a group instead of a list."""
        if isinstance(params_grads, dict):
            params_grads = params_grads["params"]
        return super()._apply_optimize(loss, startup_program, params_grads)

    @paddle.no_grad()
    def _create_optimization_pass(self, parameters_and_grads: Pairs, param_group_idx: int = 0) -> list:
        """Where every way to a step meets: dygraph updates at once, static graphs append the operator."""
        pairs = [(p, g) for p, g in parameters_and_grads if g is not None and not p.stop_gradient]
        if in_dygraph_mode():
            if not self._skips_step():
                self._update_buckets([(p, self._dense(p, g)) for p, g in pairs], None)
            return []
        block = paddle.static.default_main_program().global_block()
        before = len(block.ops)
        # The role tells Paddle which operators to drop when the program is cloned for evaluation.
        roles = [item for pair in pairs for item in pair]
        with paddle.static.default_main_program()._optimized_guard(roles), name_scope("optimizer"):
            self._create_global_learning_rate()
            self._update_buckets(pairs, self._get_auxiliary_var("found_inf"))
        return list(block.ops)[before:]

    _pir_create_optimization_pass = _create_optimization_pass

    def _skips_step(self) -> bool:
        """GradScaler's protocol: it leaves a tensor in found_inf and expects to find its truth there."""
        found_inf = self._get_auxiliary_var("found_inf")
        if isinstance(found_inf, paddle.Tensor):
            found_inf = bool(found_inf)
            self._set_auxiliary_var("found_inf", found_inf)
        return bool(found_inf)

    def _dense(self, param: Any, grad: Any) -> Any:
        """The gradient as the native call takes it: dense, in one piece, duplicate rows of a sparse one added up."""
        if grad.is_selected_rows():
            return _C_ops.add_n([paddle.zeros(param.shape, dtype=grad.dtype), grad])
        return grad if grad.is_contiguous() else grad.contiguous()

    def _update_buckets(self, pairs: Pairs, found_inf: Any) -> None:
        """One native call for all parameters that share learning rate and decay; almost always that is one call."""
        buckets: dict[tuple, Bucket] = {}
        shared: dict[tuple, tuple] = {}
        with dygraph_guard_if_declarative() if not in_dygraph_mode() else nullcontext():
            for param, grad in pairs:
                options = self._options(param)
                state = self._state_of(param) or self._create_state(param, grad.dtype)
                master = self._master_of(param)
                rate, decay = options.learning_rate, options.weight_decay
                key = (*(id(value) if is_tensor(value) else value for value in (rate, decay)), master is None)
                if key not in buckets:
                    buckets[key] = Bucket([], [], tuple([] for _ in state), None if master is None else [])
                    shared[key] = (rate, decay)
                bucket = buckets[key]
                bucket.params.append(param)
                bucket.grads.append(grad)
                for values, value in zip(bucket.state, state):
                    values.append(value)
                if master is not None:
                    bucket.masters.append(master)
        for key, bucket in buckets.items():
            rate, decay = shared[key]
            if not in_dygraph_mode() and not is_tensor(decay):
                decay = paddle.full([1], decay, dtype="float64")
            self._update(bucket, self._learning_rate_of_step(rate), decay, found_inf)

    def _master_of(self, param: Any) -> Optional[Any]:
        """The parameter's master weight. Mixed precision may have been switched on (amp.decorate) after a first step."""
        if not self._multi_precision or not self._is_16_bit(param):
            return None
        return self._create_master_weight(param)

    # ---- What users call besides ------------------------------------------------------------------------------------

    def get_lr(self) -> float:
        """The learning rate that the next step will use, before the multipliers of groups and parameters."""
        return self._learning_rate.item() if is_tensor(self._learning_rate) else super().get_lr()

    def set_lr(self, value: float) -> None:
        """Set the learning rate; an optimizer with an LRScheduler refuses (RuntimeError)."""
        if is_tensor(value):
            raise TypeError("learning_rate: received a tensor in set_lr, expected a number; pass float(tensor)")
        super().set_lr(arguments.check_learning_rate(value))

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
        checkpoint.load(self, state_dict)

    load_state_dict = set_state_dict

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: an optimizer is tied to its parameters and cannot be copied or pickled. Create one for "
            "the copied parameters with the same arguments, and give it this one's state: "
            "copy.set_state_dict(optimizer.state_dict())"
        )
