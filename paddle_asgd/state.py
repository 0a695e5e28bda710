# SPDX-License-Identifier: Apache-2.0
"""The tensors that an optimizer keeps for each parameter, in Paddle's own dictionaries and under Paddle's names.

Creates, finds and drops them, and the float32 master weights of 16-bit parameters. Must not know any formula.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, NamedTuple

import numpy as np
import paddle
from paddle.base.framework import dygraph_guard_if_declarative, in_dygraph_mode
from paddle.optimizer import Optimizer

from .arguments import dtype_name
from .caller import warn


class StateTensor(NamedTuple):
    """One tensor of state that an optimizer keeps for every parameter."""

    name: str
    #: "compute" (float32, and float64 for float64 parameters), "gradient" (what arrives as gradient), or a dtype
    dtype: str
    #: from the parameter's shape to the state's
    shape: Callable[[list[int]], list[int]]
    #: int64, 0 before the first step; a checkpoint tells by it that a parameter has taken none
    counts_steps: bool = False
    #: not made with the others before the first step, but by ``ParameterState.entry_of``
    later: bool = False


#: Each of them may be what the user or a wrapper calls for a step in dygraph; some call others.
WAYS_TO_A_STEP = ("step", "minimize", "_apply_optimize")


def is_16_bit(param: Any) -> bool:
    """Whether the parameter is float16 or bfloat16."""
    return dtype_name(param.dtype) in ("float16", "bfloat16")


def masters_of(optimizer: Any) -> dict[str, Any]:
    """The master weights of any Paddle optimizer, by the names of their parameters."""
    return getattr(optimizer, "_master_weights", None) or {}


def skipped_its_step(optimizer: Any) -> bool:
    """Whether the last step of any Paddle optimizer changed nothing because GradScaler had found an Inf or a NaN."""
    return bool(getattr(optimizer, "_auxiliary_vars", {}).get("found_inf"))


class ParameterState:
    """The state of all parameters of one optimizer.

    Args:
        optimizer: whose dictionaries hold it.
        layout: what each parameter has, one entry of which counts its steps.
        on_change: called before tensors come or go, for what still holds those that were there.
    """

    def __init__(self, optimizer: Optimizer, layout: tuple[StateTensor, ...], on_change: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._on_change = on_change
        self.layout = layout
        (self.counter,) = (entry for entry in layout if entry.counts_steps)
        self._warned_of_16_bit = False
        #: every parameter that was given state, by its name: in static graphs the optimizer may have no list of its own
        self._created: dict[str, Any] = {}

    @property
    def created(self) -> list:
        """The parameters that were ever given state."""
        return list(self._created.values())

    @property
    def prefix(self) -> str | None:
        """What the user named the optimizer."""
        return self._optimizer._name

    @property
    def multi_precision(self) -> bool:
        """Whether 16-bit parameters have master weights; ``amp.decorate`` may switch it on."""
        return self._optimizer._multi_precision

    @property
    def masters(self) -> dict[str, Any]:
        """The master weights, by the names of their parameters."""
        return self._optimizer._master_weights

    def key(self, name: str) -> str:
        """How Paddle's dictionary of accumulators spells the name of a state tensor."""
        prefix = self._optimizer._name
        return name if prefix is None else f"{prefix}_{name}"

    def named(self, param: Any) -> dict[str, Any] | None:
        """The same by their names."""
        tensors = self.of(param)
        return None if tensors is None else {entry.name: tensor for entry, tensor in zip(self.layout, tensors)}

    def of(self, param: Any) -> list | None:
        """The parameter's tensors in the order of the layout, None for one to come later; None before the first step.

        An interrupt may have left some of them. These count as none, and ``create`` makes all of them again.
        """
        owner = self._owner_name(param)
        accumulators = self._optimizer._accumulators
        tensors = [accumulators.get(self.key(entry.name), {}).get(owner) for entry in self.layout]
        made = (tensor is not None or entry.later for entry, tensor in zip(self.layout, tensors))
        return tensors if all(made) else None

    def _owner_name(self, param: Any) -> str:
        """State bears the name of the parameter's master weight, as Paddle has it, if that came first."""
        master = self._optimizer._master_weights.get(param.name)
        if master is None or param.name in self._optimizer._accumulators.get(self.key(self.layout[0].name), ()):
            return param.name
        return master.name

    def create(self, param: Any, gradient_dtype: Any) -> list:
        """State of zeros for one parameter, and its master weight if it shall have one."""
        _check_gradient_dtype(param, gradient_dtype)
        master = self.master_of(param)
        self.drop(param)
        if master is None and is_16_bit(param):
            self._warn_of_16_bit(param)
        for entry in self.layout:
            if not entry.later:
                self._make(param, entry, gradient_dtype)
        self._created[param.name] = param
        return self.of(param)

    def _make(self, param: Any, entry: StateTensor, gradient_dtype: Any = None) -> Any:
        """Zeros for one entry of the layout."""
        master = self.held_master(param)
        compute = "float64" if dtype_name(param.dtype) == "float64" else "float32"
        return self._optimizer._add_accumulator(
            entry.name,
            param if master is None or self._owner_name(param) == param.name else master,
            dtype={"compute": compute, "gradient": gradient_dtype}.get(entry.dtype, entry.dtype),
            shape=entry.shape(list(param.shape)),
            device=_device_of(param),
        )

    def entry_of(self, param: Any, entry: StateTensor, undo: list[Callable[[], Any]]) -> Any:
        """One tensor of a parameter that has state, made if it was to come later; ``undo`` gets what unmakes it."""
        tensor = self.named(param)[entry.name]
        if tensor is None:
            self._on_change()
            undo += self.dropping(param, entry.name)
            tensor = self._make(param, entry)
        return tensor

    def of_step(self, param: Any, gradient_dtype: Any, undo: list[Callable[[], Any]]) -> tuple[list, Any | None]:
        """The parameter's tensors and its master weight, made where they are missing.

        What unmakes them is appended to ``undo`` before they are made: a step that is not taken must leave no state,
        which would be of the wrong dtype or of an outdated value if a later gradient or parameter is another.
        """
        state = self.of(param)
        if state is None:
            undo.append(partial(self.drop, param))
        if self.has_master(param) and self.held_master(param) is None:
            undo.append(self.dropping_master(param))
        if state is None:
            state = self.create(param, gradient_dtype)
        return state, self.master_of(param)

    def place_beside(self, param: Any, name: str, shape: list[int], dtype: str) -> Any:
        """Zeros where the parameter is, which no checkpoint holds; the same tensor each time it is asked for."""
        held = self._optimizer._accumulators.get(self.key(name), {}).get(param.name)
        if held is None:
            held = self._optimizer._add_accumulator(name, param, dtype=dtype, shape=shape, device=_device_of(param))
        return held

    def value_of(self, tensor: Any) -> np.ndarray | None:
        """What a tensor of state holds now; in static graphs, where it lies in the scope, None before the first run."""
        if isinstance(tensor, paddle.Tensor):
            return tensor.numpy()
        variable = paddle.static.global_scope().find_var(tensor.name)
        return None if variable is None else np.array(variable.get_tensor())

    def replacement(self, param: Any, name: str, value: Any) -> Callable[[], Any]:
        """Make a tensor for the place of one that the parameter has, of another shape or dtype; dygraph only.

        Returns:
            The call, of C alone, that puts it there.
        """
        owner = self._owner_name(param)
        held = self._optimizer._accumulators[self.key(name)]
        tensor = value._copy_to(held[owner].place, True)
        tensor.name = held[owner].name  # which checkpoints are matched by
        tensor.persistable = tensor.stop_gradient = True
        return partial(held.__setitem__, owner, tensor)

    def dropping(self, param: Any, name: str | None = None) -> list[Callable[[], Any]]:
        """The calls, of C alone, that forget the parameter's history, or one tensor of it."""
        owner = self._owner_name(param)
        names = [entry.name for entry in self.layout] if name is None else [name]
        return [partial(self._optimizer._accumulators[self.key(name)].pop, owner, None) for name in names]

    def dropping_master(self, param: Any) -> Callable[[], Any]:
        """The call, of C alone, that forgets the master weight; the next step makes one from the parameter."""
        return partial(self._optimizer._master_weights.pop, param.name, None)

    def drop(self, param: Any) -> None:
        """Forget the parameter's history."""
        self._on_change()
        for call in self.dropping(param):
            call()

    def stored_form(self, state: list, grad: Any) -> Any:
        """The gradient in the dtype of its history, if that is the wider: of a parameter that became 16-bit since."""
        dtypes = (tensor.dtype for entry, tensor in zip(self.layout, state) if entry.dtype == "gradient")
        stored = next(dtypes, grad.dtype)
        if stored == grad.dtype or dtype_name(stored) != "float32" or not is_16_bit(grad):
            return grad
        return grad.astype("float32")

    def held_master(self, param: Any) -> Any | None:
        """The parameter's master weight, if it has one and is updated with it."""
        return self._optimizer._master_weights.get(param.name) if self.has_master(param) else None

    def master_of(self, param: Any) -> Any | None:
        """The parameter's master weight, made at need: amp.decorate may switch them on after a first step."""
        master = self.held_master(param)
        if master is None and self.has_master(param):
            with paddle.no_grad():
                master = self._optimizer._create_master_weight(param)
            master.stop_gradient = True
        return master

    def has_master(self, param: Any) -> bool:
        """Whether the parameter shall have a master weight."""
        return self._optimizer._multi_precision and is_16_bit(param)

    def _warn_of_16_bit(self, param: Any) -> None:
        if self._warned_of_16_bit:
            return
        self._warned_of_16_bit = True
        warn(
            f"{type(self._optimizer).__name__}: parameter {param.name!r} is {dtype_name(param.dtype)} and is rounded "
            "to it after every step, which loses small updates. multi_precision=True keeps a float32 copy instead."
        )


def state_guard() -> Any:
    """While a whole step is traced to a static graph, state is made in dygraph all the same."""
    return nullcontext() if in_dygraph_mode() else dygraph_guard_if_declarative()


def _device_of(param: Any) -> str | None:
    """Paddle would place state on the current device, whatever device the parameter is on."""
    return "cpu" if isinstance(param, paddle.Tensor) and param.place.is_cpu_place() else None


def gradient_dtypes(param: Any) -> tuple[str, ...]:
    """The dtypes that the parameter's gradients may have; mixed precision may keep them in float32."""
    dtype = dtype_name(param.dtype)
    return (dtype, "float32") if is_16_bit(param) else (dtype,)


def _check_gradient_dtype(param: Any, dtype: Any) -> None:
    """Before the history takes it over: afterwards every right gradient would be refused."""
    allowed = gradient_dtypes(param)
    if dtype_name(dtype) not in allowed:
        raise ValueError(
            f"dtype of the gradient of parameter {param.name!r}: received {dtype_name(dtype)}, expected "
            f"{' or '.join(allowed)}"
        )
