# SPDX-License-Identifier: Apache-2.0
"""The tensors that an optimizer keeps for each parameter, in Paddle's own dictionaries and under Paddle's names.

Creates, finds and drops them, and the float32 master weights of 16-bit parameters. Must not know any formula.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, NamedTuple

import numpy as np
import paddle
from paddle.base.framework import dygraph_guard_if_declarative, in_dygraph_mode
from paddle.optimizer import Optimizer

from .arguments import BYTES, dtype_name
from .caller import warn
from .distributed_tensors import (
    is_distributed,
    is_sharded,
    local,
    local_shape,
    placed_beside,
    placed_like,
    rebuilt_like,
)

#: A length that no number of slots and no clock has, to find out what a shape depends on.
_LENGTH = 1 << 40


class StateTensor(NamedTuple):
    """One tensor of state that an optimizer keeps for each parameter: an entry of its layout.

    Examples:
        >>> history = StateTensor("y", "gradient", lambda shape: [3, *shape])
        >>> history.shape([2, 5]), history.counts_steps
        ([3, 2, 5], False)
    """

    name: str
    #: "compute" (float32, and float64 for float64 parameters), "gradient" (the gradients' dtype), or a dtype's name; or
    #: a function from a parameter to one of these
    dtype: str | Callable[[Any], str | None]
    #: a function from the parameter's shape to the shape of this tensor
    shape: Callable[[list[int]], list[int]]
    #: whether its first element, an int64, counts the parameter's steps; 0 in a checkpoint means that there were none
    counts_steps: bool = False
    #: whether it is made later, by ``ParameterState.entry_of``, and not with the others before the first step
    later: bool = False
    #: whether some parameters never have it: those for which the function ``dtype`` returns None
    partial: bool = False

    def dtype_of(self, param: Any) -> str | None:
        """What ``dtype`` says of one parameter; None if the parameter never has this tensor."""
        return self.dtype(param) if callable(self.dtype) else self.dtype

    def is_due(self, param: Any) -> bool:
        """Whether the parameter has this tensor from its first step on."""
        return not self.later and not (self.partial and self.dtype_of(param) is None)

    def follows(self) -> tuple[int, int]:
        """How its shape follows the parameter's.

        Returns:
            The number of dimensions before the parameter's, or before one that counts blocks of its elements; and the
            number of elements in a block, 1 without blocks, 0 if the shape does not depend on the parameter's.

        Examples:
            >>> StateTensor("y", "gradient", lambda shape: [3, *shape]).follows()
            (1, 1)
            >>> StateTensor("y_scale", "float32", lambda shape: [3, -(-shape[0] // 128)]).follows()
            (1, 128)
            >>> StateTensor("m", "int64", lambda shape: [1]).follows()
            (0, 0)
        """
        once, twice = self.shape([_LENGTH]), self.shape([2 * _LENGTH])
        return len(once) - 1, _LENGTH // once[-1] if twice[-1] == 2 * once[-1] else 0


#: Bytes of an element of every dtype that state may have.
_BYTES = {**BYTES, "int8": 1, "int16": 2, "int64": 8}
#: Each of them may be what the user or a wrapper calls for a step in dygraph; some call others.
WAYS_TO_A_STEP = ("step", "minimize", "_apply_optimize")


_NO_MASTERS: dict[str, Any] = {}


def is_16_bit(param: Any) -> bool:
    """Whether a tensor is float16 or bfloat16."""
    return dtype_name(param.dtype) in ("float16", "bfloat16")


def masters_of(optimizer: Any) -> dict[str, Any]:
    """The master weights of any Paddle optimizer, by the names of their parameters; its own dictionary."""
    masters = getattr(optimizer, "_master_weights", None)
    return _NO_MASTERS if masters is None else masters


def parameters_of(optimizer: Any) -> list:
    """The parameters that any Paddle optimizer updates: those of this rank, once a wrapper has divided them."""
    return getattr(optimizer, "_parameter_list", None) or []


def skipped_its_step(optimizer: Any) -> bool:
    """Whether the last step of any Paddle optimizer changed nothing because GradScaler had found an Inf or a NaN."""
    return bool(getattr(optimizer, "_auxiliary_vars", {}).get("found_inf"))


class ParameterState:
    """The state of all parameters of one optimizer.

    Args:
        optimizer: the optimizer, whose dictionaries hold the tensors.
        layout: what each parameter has; exactly one entry counts the parameter's steps.
        on_change: is called before tensors are made or dropped, so that nobody goes on using those that were there.
    """

    def __init__(self, optimizer: Optimizer, layout: tuple[StateTensor, ...], on_change: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._on_change = on_change
        self.layout = layout
        (self.counter,) = (entry for entry in layout if entry.counts_steps)
        #: whether there is state of a parameter of which other ranks of a mesh have other parts
        self.in_shards = False
        #: the names of entries that come later and that a step makes now where they are missing
        self.due: frozenset[str] = frozenset()
        self._warned_of_16_bit = False
        #: all parameters that were given state, by name: in static graphs the optimizer may have no list of its own
        self._created: dict[str, Any] = {}

    @property
    def created(self) -> list:
        """All parameters that were ever given state, in the order in which they were."""
        return list(self._created.values())

    @property
    def prefix(self) -> str | None:
        """The ``name`` that the user gave to the optimizer; None without one."""
        return self._optimizer._name

    @property
    def multi_precision(self) -> bool:
        """Whether 16-bit parameters have master weights. ``paddle.amp.decorate`` may switch this on after the
        constructor.
        """
        return self._optimizer._multi_precision

    @property
    def masters(self) -> dict[str, Any]:
        """Master weights, float32 tensors, by the names of their parameters."""
        return self._optimizer._master_weights

    @property
    def dictionaries(self) -> list[dict]:
        """All dictionaries that hold these tensors, and the one that holds those of the accumulators."""
        accumulators = self._optimizer._accumulators
        return [accumulators, *accumulators.values(), self._optimizer._master_weights]

    def key(self, name: str) -> str:
        """Key of an entry of the layout in Paddle's dictionary of accumulators."""
        prefix = self._optimizer._name
        return name if prefix is None else f"{prefix}_{name}"

    def named(self, param: Any) -> dict[str, Any] | None:
        """The tensors of ``of``, by their names in the layout; None before the parameter's first step."""
        tensors = self.of(param)
        return None if tensors is None else {entry.name: tensor for entry, tensor in zip(self.layout, tensors)}

    def of(self, param: Any) -> list | None:
        """The parameter's tensors in the order of the layout; None before its first step.

        An entry that is made later is None until then, and one that the parameter never has stays None. Tensors that an
        interrupt has left incomplete count as none, and ``create`` makes all of them again.
        """
        owner = self._owner_name(param)
        accumulators = self._optimizer._accumulators
        tensors = [accumulators.get(self.key(entry.name), {}).get(owner) for entry in self.layout]
        missing = [entry for entry, tensor in zip(self.layout, tensors) if tensor is None]
        return None if any(entry.is_due(param) for entry in missing) else tensors

    def held(self, param: Any, name: str) -> Any | None:
        """The parameter's tensor of one entry as it is, even if options have since made the others incomplete."""
        return self._optimizer._accumulators.get(self.key(name), {}).get(self._owner_name(param))

    def _owner_name(self, param: Any) -> str:
        """Name under which Paddle's dictionaries hold the parameter's state.

        As in Paddle, that is the name of the master weight if there was one when the state was made.
        """
        master = self._optimizer._master_weights.get(param.name)
        if master is None or param.name in self._optimizer._accumulators.get(self.key(self.layout[0].name), ()):
            return param.name
        return master.name

    def create(self, param: Any, gradient_dtype: Any) -> list:
        """Make state of zeros for one parameter, and its master weight if it is to have one.

        Args:
            param: the parameter; state that it has is dropped.
            gradient_dtype: the dtype of its gradients, which the history then has, too.

        Returns:
            The tensors in the order of the layout.

        Raises:
            ValueError: gradients of a parameter of this dtype cannot have ``gradient_dtype``.
        """
        _check_gradient_dtype(param, gradient_dtype)
        master = self.master_of(param)
        self.drop(param)
        if master is None and is_16_bit(param):
            self._warn_of_16_bit(param)
        for entry in self.layout:
            if entry.is_due(param):
                self._make(param, entry, gradient_dtype)
        self._created[param.name] = param
        return self.of(param)

    def _make(self, param: Any, entry: StateTensor, gradient_dtype: Any = None) -> Any:
        """Make the tensor of one entry of the layout, of zeros, on the parameter's device.

        Args:
            param: the parameter.
            entry: the entry.
            gradient_dtype: what replaces "gradient" as the dtype of an entry.
        """
        if is_distributed(param):
            _check_shards(param, entry)
            self.in_shards = self.in_shards or is_sharded(param)
        master = self.held_master(param)
        owner = param if master is None or self._owner_name(param) == param.name else master
        tensor = self._optimizer._add_accumulator(
            entry.name,
            owner,
            dtype=_dtype_made(entry, param, gradient_dtype),
            shape=entry.shape(local_shape(param)),
            device=_device_of(param),
        )
        if is_distributed(param) and entry.follows()[1] == 1:
            tensor = placed_beside(tensor, param, entry.follows()[0])
            self._optimizer._accumulators[self.key(entry.name)][owner.name] = tensor
        return tensor

    def bytes_of(self, param: Any) -> dict[str, int]:
        """Bytes of each entry of the layout, by its name, that the parameter has or will have from its first step on.

        Of tensors on a mesh, this rank's part counts.

        Args:
            param: the parameter. Before its first step its gradients are taken to be those of ``expected_gradient``.
        """
        held = self.named(param) or {}
        found = {}
        for entry in self.layout:
            tensor = held.get(entry.name)
            if tensor is not None:
                found[entry.name] = math.prod(local_shape(tensor)) * _BYTES[dtype_name(tensor.dtype)]
            elif entry.is_due(param):
                dtype = _dtype_made(entry, param, expected_gradient(param))
                found[entry.name] = math.prod(entry.shape(local_shape(param))) * _BYTES[dtype_name(dtype)]
        return found

    def entry_of(self, param: Any, entry: StateTensor, undo: list[Callable[[], Any]]) -> Any:
        """One tensor of a parameter that has state; made first if it is an entry that comes later.

        Args:
            param: the parameter.
            entry: the entry of the layout.
            undo: gets the calls that drop the tensor, if it is made here.
        """
        tensor = self.named(param)[entry.name]
        if tensor is None:
            self._on_change()
            undo += self.dropping(param, entry.name)
            tensor = self._make(param, entry)
        return tensor

    def of_step(self, param: Any, gradient_dtype: Any, undo: list[Callable[[], Any]]) -> tuple[list, Any | None]:
        """The parameter's tensors and its master weight for a step, made where they are missing.

        A step that is refused must leave no state behind: a later gradient might have another dtype, and a master
        weight an outdated value.

        Args:
            param: the parameter.
            gradient_dtype: the dtype of the gradient of this step.
            undo: gets, before anything is made, the calls that drop it.
        """
        state = self.of(param)
        if state is None:
            undo.append(partial(self.drop, param))
        if self.has_master(param) and self.held_master(param) is None:
            undo.append(self.dropping_master(param))
        if state is None:
            state = self.create(param, gradient_dtype)
        late = [e for e, tensor in zip(self.layout, state) if tensor is None and e.name in self.due]
        if late:
            for entry in late:
                self.entry_of(param, entry, undo)
            state = self.of(param)
        return state, self.master_of(param)

    def place_beside(self, param: Any, name: str, shape: list[int], dtype: str) -> Any:
        """A tensor of zeros on the parameter's device that no checkpoint holds; the same tensor at every call.

        Args:
            param: the parameter beside which it lies.
            name: its name, in place of an entry of the layout.
            shape: its shape.
            dtype: the name of its dtype.
        """
        held = self._optimizer._accumulators.get(self.key(name), {}).get(param.name)
        if held is None:
            held = self._optimizer._add_accumulator(name, param, dtype=dtype, shape=shape, device=_device_of(param))
        return held

    def value_of(self, tensor: Any) -> np.ndarray | None:
        """Value that a tensor of state has now, as an array. Waits for the tensor's device.

        Args:
            tensor: a tensor, or a variable of a static graph, whose value lies in the current scope.

        Returns:
            A copy; None for a variable before the graph has run.
        """
        if isinstance(tensor, paddle.Tensor):
            return tensor.numpy()
        variable = paddle.static.global_scope().find_var(tensor.name)
        return None if variable is None else np.array(variable.get_tensor())

    def replacement(self, param: Any, name: str, value: Any) -> Callable[[], Any]:
        """Prepare to replace one of the parameter's tensors by one of another shape or dtype; dygraph only.

        Args:
            param: the parameter.
            name: the name of the entry.
            value: the tensor whose value the new one gets, on any device. It stays the caller's.

        Returns:
            The C call that puts the new tensor, which has the old one's name and device, in the old one's place.
        """
        owner = self._owner_name(param)
        held = self._optimizer._accumulators[self.key(name)]
        before = held[owner]
        tensor = rebuilt_like(local(placed_like(value, before))._copy_to(before.place, True), before)
        tensor.name = before.name  # by which checkpoints are matched
        tensor.persistable = tensor.stop_gradient = True
        return partial(held.__setitem__, owner, tensor)

    def dropping(self, param: Any, name: str | None = None) -> list[Callable[[], Any]]:
        """C calls that forget the parameter's history.

        Args:
            param: the parameter.
            name: the entry to forget; None for all of the layout.
        """
        owner = self._owner_name(param)
        names = [entry.name for entry in self.layout] if name is None else [name]
        return [partial(self._optimizer._accumulators[self.key(name)].pop, owner, None) for name in names]

    def dropping_master(self, param: Any) -> Callable[[], Any]:
        """C call that forgets the parameter's master weight; the next step makes one from the parameter."""
        return partial(self._optimizer._master_weights.pop, param.name, None)

    def drop(self, param: Any) -> None:
        """Forget the parameter's history: its next step is its first."""
        self._on_change()
        for call in self.dropping(param):
            call()

    def stored_form(self, param: Any, state: list, grad: Any) -> Any:
        """Gradient in the dtype of its history, if that is the wider one because the parameter has become 16-bit since.

        Args:
            param: the parameter.
            state: its tensors, as ``of`` returns them.
            grad: its gradient.
        """
        if not is_16_bit(grad):
            return grad
        dtypes = (tensor.dtype for entry, tensor in zip(self.layout, state) if entry.dtype_of(param) == "gradient")
        return grad.astype("float32") if dtype_name(next(dtypes, grad.dtype)) == "float32" else grad

    def held_master(self, param: Any) -> Any | None:
        """The parameter's master weight, if there is one and steps are taken with it; otherwise None."""
        return self._optimizer._master_weights.get(param.name) if self.has_master(param) else None

    def master_of(self, param: Any) -> Any | None:
        """The parameter's master weight, made from the parameter if there is none yet; None if it is to have none.

        It may be missing after the first step, since ``paddle.amp.decorate`` may switch master weights on at any time.
        """
        master = self.held_master(param)
        if master is None and self.has_master(param):
            with paddle.no_grad():
                master = self._optimizer._create_master_weight(param)
            master.stop_gradient = True
        return master

    def has_master(self, param: Any) -> bool:
        """Whether the parameter is to have a master weight: it is 16-bit, and ``multi_precision`` is on."""
        return self._optimizer._multi_precision and is_16_bit(param)

    def _warn_of_16_bit(self, param: Any) -> None:
        """Warn, once for each optimizer, that a 16-bit parameter without a master weight loses small updates."""
        if self._warned_of_16_bit:
            return
        self._warned_of_16_bit = True
        warn(
            f"{type(self._optimizer).__name__}: parameter {param.name!r} is {dtype_name(param.dtype)} and is rounded "
            "to it after every step, which loses small updates. multi_precision=True keeps a float32 copy instead."
        )


def _check_shards(param: Any, entry: StateTensor) -> None:
    """Refuse a parameter on a mesh whose parts cannot have an entry of their own.

    Raises:
        ValueError: the entry has one number for a block of elements, and a rank has only a part of the parameter.
    """
    elements = entry.follows()[1]
    if elements > 1 and is_sharded(param):
        raise ValueError(
            f"parameters: received {param.name!r} with {param.placements}, expected Replicate, because {entry.name!r} "
            f"has one number for every {elements} elements of the whole parameter"
        )


def state_guard() -> Any:
    """Context in which state is made as dygraph tensors, even while a whole step is traced to a static graph."""
    return nullcontext() if in_dygraph_mode() else dygraph_guard_if_declarative()


def _dtype_made(entry: StateTensor, param: Any, gradient_dtype: Any) -> Any:
    """The dtype with which a parameter's tensor of an entry is made.

    Args:
        entry: the entry of the layout.
        param: the parameter.
        gradient_dtype: the dtype of its gradients.
    """
    dtype = entry.dtype_of(param)
    compute = "float64" if dtype_name(param.dtype) == "float64" else "float32"
    return {"compute": compute, "gradient": gradient_dtype}.get(dtype, dtype)


def expected_gradient(param: Any) -> Any:
    """The dtype that a parameter's first gradient is to have: where fleet keeps float32 gradients beside 16-bit
    parameters, the history stores those.
    """
    return paddle.float32 if is_16_bit(param) and hasattr(param, "main_grad") else param.dtype


def _device_of(param: Any) -> str | None:
    """Device for a parameter's state, as Paddle's ``device`` argument: "cpu", or None for the current device.

    Left to itself, Paddle places the state of a parameter on the host on the current device, which may be a GPU.
    """
    return "cpu" if isinstance(param, paddle.Tensor) and param.place.is_cpu_place() else None


def gradient_dtypes(param: Any) -> tuple[str, ...]:
    """Names of the dtypes that a parameter's gradients may have.

    Gradients of 16-bit parameters may be float32, as mixed precision keeps them in ``main_grad``.

    Examples:
        >>> gradient_dtypes(paddle.zeros([2], "bfloat16"))
        ('bfloat16', 'float32')
    """
    dtype = dtype_name(param.dtype)
    return (dtype, "float32") if is_16_bit(param) else (dtype,)


def _check_gradient_dtype(param: Any, dtype: Any) -> None:
    """Refuse a first gradient of a wrong dtype, before the history takes that dtype over and refuses every right one.

    Raises:
        ValueError: gradients of this parameter cannot have this dtype.
    """
    allowed = gradient_dtypes(param)
    if dtype_name(dtype) not in allowed:
        raise ValueError(
            f"dtype of the gradient of parameter {param.name!r}: received {dtype_name(dtype)}, expected "
            f"{' or '.join(allowed)}"
        )
