"""The tensors that an optimizer keeps for each parameter, in Paddle's own dictionaries and under Paddle's names.

Creates, finds and drops them, and the float32 master weights of 16-bit parameters. Must not know any formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

import numpy as np
import paddle
from paddle.base.framework import dygraph_guard_if_declarative, in_dygraph_mode

from .arguments import dtype_name
from .caller import warn

if TYPE_CHECKING:
    from .fused import FusedOptimizer


class StateTensor(NamedTuple):
    """One tensor of state that an optimizer keeps for every parameter."""

    name: str
    #: "compute" (float32, and float64 for float64 parameters), "gradient" (what arrives as gradient), or a dtype
    dtype: str
    #: from the parameter's shape to the state's
    shape: Callable[[list[int]], list[int]]


def is_16_bit(param: Any) -> bool:
    """Whether the parameter is float16 or bfloat16."""
    return dtype_name(param.dtype) in ("float16", "bfloat16")


class ParameterState:
    """The state of all parameters of one optimizer.

    The last tensor of the layout counts the parameter's steps: int64 ``[1]``, 0 before the first.
    """

    def __init__(self, optimizer: FusedOptimizer, layout: tuple[StateTensor, ...]) -> None:
        self._optimizer = optimizer
        self.layout = layout
        self._warned_of_16_bit = False
        #: every parameter that was given state, by its name: in static graphs the optimizer may have no list of its own
        self._created: dict[str, Any] = {}

    @property
    def created(self) -> list:
        """The parameters that were ever given state."""
        return list(self._created.values())

    def key(self, name: str) -> str:
        """How Paddle's dictionary of accumulators spells the name of a state tensor."""
        prefix = self._optimizer._name
        return name if prefix is None else f"{prefix}_{name}"

    def of(self, param: Any) -> list | None:
        """The parameter's tensors in the order of the layout; None before its first step."""
        owner = self._owner_name(param)
        accumulators = self._optimizer._accumulators
        if owner not in accumulators.get(self.key(self.layout[0].name), ()):
            return None
        return [accumulators[self.key(entry.name)][owner] for entry in self.layout]

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
        if master is None and is_16_bit(param):
            self.warn_of_16_bit(param)
        compute = "float64" if dtype_name(param.dtype) == "float64" else "float32"
        dtypes = {"compute": compute, "gradient": gradient_dtype}
        for entry in self.layout:
            self._optimizer._add_accumulator(
                entry.name,
                param if master is None else master,
                dtype=dtypes.get(entry.dtype, entry.dtype),
                shape=entry.shape(list(param.shape)),
                device=_device_of(param),
            )
        self._created[param.name] = param
        return self.of(param)

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

    def reshape(self, param: Any, name: str, value: Any) -> None:
        """Put a tensor of another shape in the place of one that the parameter has."""
        owner = self._owner_name(param)
        entry = next(entry for entry in self.layout if entry.name == name)
        old = self._optimizer._accumulators[self.key(entry.name)].pop(owner)
        master = self.master_of(param)
        tensor = self._optimizer._add_accumulator(
            name,
            param if master is None or owner == param.name else master,
            dtype=entry.dtype,
            shape=list(value.shape),
            device=_device_of(param),
        )
        tensor.set_value(value)
        tensor.name = old.name  # which checkpoints are matched by

    def drop(self, param: Any) -> None:
        """Forget the parameter's history, as if it had taken no step."""
        owner = self._owner_name(param)
        for entry in self.layout:
            self._optimizer._accumulators[self.key(entry.name)].pop(owner, None)

    def forget(self, param: Any) -> None:
        """The same with the master weight, which a first step makes from the parameter."""
        self.drop(param)
        self._optimizer._master_weights.pop(param.name, None)

    def stored_form(self, state: list, grad: Any) -> Any:
        """The gradient in the dtype of its history, if that is the wider: of a parameter that became 16-bit since."""
        stored = next(tensor.dtype for entry, tensor in zip(self.layout, state) if entry.dtype == "gradient")
        if stored == grad.dtype or dtype_name(stored) != "float32" or not is_16_bit(grad):
            return grad
        return grad.astype("float32")

    def master_of(self, param: Any) -> Any | None:
        """The parameter's master weight, made at need: amp.decorate may switch them on after a first step."""
        if not self._optimizer._multi_precision or not is_16_bit(param):
            return None
        master = self._optimizer._master_weights.get(param.name)
        if master is None:
            with paddle.no_grad():
                master = self._optimizer._create_master_weight(param)
            master.stop_gradient = True
        return master

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Where state is made for several parameters: all of it, or the tensors that were there before."""
        optimizer = self._optimizer
        accumulators = {name: dict(held) for name, held in optimizer._accumulators.items()}
        masters = dict(optimizer._master_weights)
        try:
            yield
        except BaseException:
            for name, held in optimizer._accumulators.items():
                held.clear()
                held.update(accumulators.get(name, {}))
            optimizer._master_weights.clear()
            optimizer._master_weights.update(masters)
            raise

    def warn_of_16_bit(self, param: Any) -> None:
        """Warn once that a 16-bit parameter has no master weight."""
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
