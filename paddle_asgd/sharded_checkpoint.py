# SPDX-License-Identifier: Apache-2.0
"""An optimizer's state in the form of Paddle's distributed checkpoints, which any number of ranks can load.

Must not know any optimizer's layout, nor write files: ``paddle.distributed.save_state_dict`` does that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import paddle

from . import checkpoint
from .arguments import dtype_name, refuse_state, shown
from .distributed_tensors import is_distributed
from .entries import SCHEDULER, entry_value, number_entry
from .sharding import give_memory_to_slices
from .state import ParameterState, StateTensor, expected_gradient, is_16_bit
from .tracing import leave_trace
from .uninterrupted import uninterrupted

try:
    from paddle.distributed.flex_checkpoint.dcp.sharded_weight import ShardedWeight
except ImportError:  # a Paddle without this form
    ShardedWeight = None

#: The number that says whether the history holds float32 gradients of 16-bit parameters.
_WIDE = "float32_gradients"


class _Part(NamedTuple):
    """Which elements of a parameter this rank's tensors are of."""

    #: where the model's own part of the parameter lies in the whole one
    model: Any
    #: the range of its elements, in one row, that a wrapper has left this rank; None for all of them
    flat: slice | None


class ShardedCheckpoint:
    """Gives an optimizer's state to Paddle's distributed checkpoints.

    A subclass has the attributes of ``FusedOptimizer``, and may extend ``_form`` and ``_take_form``.
    """

    _state: ParameterState

    @paddle.no_grad()
    def sharded_state_dict(self, model_sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state of this rank's parameters in the form of ``paddle.distributed.save_state_dict``.

        Any number of ranks can load what any other number has saved, with or without fleet's sharding. The values are
        the optimizer's own memory: loading writes into it, and the next step changes it. State that is missing is made.
        Each slot of the history has an entry of its own. The numbers that belong to no parameter are not part of it
        (``numbers_state_dict``). Call it on the optimizer that was wrapped, not on fleet's wrapper.

        Args:
            model_sharded_state_dict: what ``sharded_state_dict()`` of the model returned.

        Returns:
            ``ShardedWeight`` by keys such as ``linear.weight.d_0``: the model's name of the parameter, and that of the
            state.

        Raises:
            TypeError: the argument is not what the model returns, or ``shard_tensor`` has put parameters on a mesh.
            ValueError: it lacks a parameter, or a part of one cannot be saved alone.
            RuntimeError: this Paddle has no such checkpoints, Paddle is in static graph mode, or a wrapper gives the
                parameters memory only with the first step.
        """
        leave_trace()
        if ShardedWeight is None:
            raise RuntimeError(
                "sharded_state_dict: received a call under a Paddle without paddle.distributed's ShardedWeight, "
                "expected one that has it; save state_dict() instead"
            )
        if any(is_distributed(param) for param in self._parameter_list or ()):
            raise TypeError(
                "sharded_state_dict: received a call where parameters are on a mesh, expected tensors of this process; "
                "save the tensors of state_dict(), which are on the mesh, too"
            )
        named = _by_parameter(model_sharded_state_dict)
        params = self._make_state()
        whole = {param.name: param for param in self._own_list}
        sharded: dict[str, Any] = {}
        for param in params:
            if param.name not in named:
                raise ValueError(
                    f"model_sharded_state_dict: received no entry of parameter {param.name!r}, expected the "
                    "sharded_state_dict() of the model whose parameters the optimizer has"
                )
            name, model = named[param.name]
            part = _Part(model, _flat_range(param, whole[param.name]))
            for entry, tensor in zip(self._state.layout, self._state.of(param)):
                if entry.dtype_of(param) != entry.dtype_of(whole[param.name]):
                    raise ValueError(
                        f"model_sharded_state_dict: received a slice of parameter {param.name!r}, whose {entry.name!r} "
                        "is stored in another form than the whole parameter's would be, expected whole parameters; use "
                        "sharding without split_param"
                    )
                if tensor is not None:
                    sharded.update(_weights(f"{name}.{entry.name}", entry, tensor, part))
            master = self._state.held_master(param)
            if master is not None:
                sharded.update(_weights(f"{name}.w", StateTensor("w", "float32", list), master, part))
        return sharded

    def numbers_state_dict(self) -> dict[str, Any]:
        """What ``sharded_state_dict`` leaves out: the numbers that belong to no parameter, and the scheduler's state.

        They are the same on every rank: let one of them write them to a file, by ``paddle.save``.
        """
        leave_trace()
        collected = self._collect()
        numbers = {name: collected[name] for name in (*self._number_keys(), SCHEDULER) if name in collected}
        return {**numbers, **{name: number_entry([value], "int64") for name, value in self._form().items()}}

    def set_numbers_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``numbers_state_dict`` gave, and make state of the form that the checkpoint has.

        Call it on every rank before ``sharded_state_dict``, whose entries ``paddle.distributed.load_state_dict`` then
        fills.

        Args:
            state_dict: entries by name. They stay the caller's.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: an entry is missing or unknown, or differs from what the optimizer was made with; nothing has
                been loaded.
        """
        leave_trace()
        if not isinstance(state_dict, dict):
            raise TypeError(f"set_numbers_state_dict: received {type(state_dict).__name__}, expected a dict")
        self._follow_groups()
        rest, form = dict(state_dict), {}
        for name in self._form():
            value = entry_value(rest.pop(name, None))
            if not isinstance(value, int) or value < 0:
                refuse_state(f"{name} is {shown(value)}, expected a number of numbers_state_dict()")
            form[name] = value
        self._check_form(form)
        self._held_parameters()  # refuses what could not be made
        self._load_entries(rest, self._load_numbers)
        self._take_form(form)

    def _load_numbers(self, numbers: dict[str, Any], *more: Callable[[], Any]) -> None:
        """Load the entries that belong to no parameter."""
        checkpoint.load_numbers(self._kept(), numbers, *more)

    def _form(self) -> dict[str, int]:
        """Numbers of at least 0 that tell which tensors there are and what they look like, beside the constructor's
        arguments. A subclass may add more.
        """
        held = [(param, self._state.of(param)) for param in self._parameter_list or ()]
        made = [(param, tensors) for param, tensors in held if tensors is not None]
        form = {
            f"has_{entry.name}": int(any(tensors[place] is not None for _, tensors in made))
            for place, entry in enumerate(self._state.layout)
            if entry.later
        }
        wide = any(
            is_16_bit(param) and entry.dtype_of(param) == "gradient" and dtype_name(tensor.dtype) == "float32"
            for param, tensors in made
            for entry, tensor in zip(self._state.layout, tensors)
        )
        return {**form, _WIDE: int(wide)}

    def _check_form(self, form: dict[str, int]) -> None:
        """Refuse a checkpoint whose form this optimizer's state cannot take. For subclasses."""

    def _take_form(self, form: dict[str, int]) -> None:
        """Make all state, in the form of a checkpoint."""
        params = self._make_state(bool(form[_WIDE]))
        self._make_later_entries(params, form)
        for entry in self._state.layout:
            if entry.later and not form[f"has_{entry.name}"]:
                # Of a later step: Paddle fails on a tensor that the checkpoint lacks.
                self._forget_shortcut()
                for param in params:
                    uninterrupted(*self._state.dropping(param, entry.name))

    def _make_state(self, wide: bool = False) -> list:
        """Make the state that is missing.

        Args:
            wide: whether histories of 16-bit parameters hold float32 gradients.

        Returns:
            The parameters that are trained and of which this rank has anything.
        """
        self._follow_groups()  # the form of what is made may depend on a group's options
        params = [param for param in self._held_parameters() if not param.stop_gradient]
        for param in params:
            dtype = paddle.float32 if wide and is_16_bit(param) else expected_gradient(param)
            self._state.of_step(param, dtype, [])
        # What one has, all have: a checkpoint says only whether there is such an entry.
        self._make_later_entries(params, self._form())
        return params

    def _make_later_entries(self, params: list, form: dict[str, int]) -> None:
        """Make for all of these parameters the entries that come later and that a form has."""
        for entry in self._state.layout:
            if entry.later and form[f"has_{entry.name}"]:
                for param in params:
                    self._state.entry_of(param, entry, [])

    def _held_parameters(self) -> list:
        """The parameters of which this rank has anything, all of them in memory."""
        self._kept()  # refuses a static graph and an optimizer without a list
        self._check_room_of_part()
        give_memory_to_slices(self._own_list, self._parameter_list)
        # A slice of which this rank has nothing has no memory, and neither has a parameter of no elements.
        return [param for param in self._parameter_list if param._is_initialized() or 0 in param.shape]


def _by_parameter(model_sharded_state_dict: Any) -> dict[str, tuple[str, Any]]:
    """The model's entries by the names of the tensors, each with its key.

    If the model uses a parameter in several places, the first key in alphabetical order is taken, as Paddle's own
    optimizers do.
    """
    given = model_sharded_state_dict
    if not isinstance(given, dict) or not all(isinstance(v, ShardedWeight) for v in given.values()):
        raise TypeError(
            f"model_sharded_state_dict: received {shown(given)}, expected a dict of ShardedWeight, such as the model's "
            "sharded_state_dict() returns"
        )
    named: dict[str, tuple[str, Any]] = {}
    for key in sorted(given):
        named.setdefault(given[key].local_tensor.name, (key, given[key]))
    return named


def _flat_range(param: Any, whole: Any) -> slice | None:
    """Which elements of a parameter a wrapper has left to this rank in a slice of its memory.

    Args:
        param: the parameter of the optimizer's list.
        whole: the parameter of that name that the optimizer was made with.

    Returns:
        The range, without the padding; empty if there is only padding. None if the rank has the whole parameter.
    """
    if param is whole:
        return None
    numel = math.prod(whole.shape)
    begin = min((param.data_ptr() - whole.data_ptr()) // whole.element_size(), numel)
    return slice(begin, min(begin + math.prod(param.shape), numel))


def _weights(key: str, entry: StateTensor, tensor: Any, part: _Part) -> Iterator[tuple[str, Any]]:
    """Entries of a sharded state_dict that one tensor of state makes.

    Args:
        key: their keys without the number.
        entry: the tensor's place in the layout.
        tensor: the tensor.
        part: which elements of the parameter it is of.
    """
    before, elements = entry.follows()
    if not elements:
        shape = tuple(tensor.shape)
        yield f"{key}_0", ShardedWeight(f"{key}_0", tensor, shape, shape, (0,) * len(shape))
    elif math.prod(tensor.shape) == 0 or (part.flat is not None and part.flat.start == part.flat.stop):
        return
    elif before == 0:
        yield f"{key}_0", _weight(f"{key}_0", tensor, elements, part)
    else:
        for slot in range(tensor.shape[0]):
            numbered = f"{key}_{slot}_0"
            # Of a slot, this gives the same memory whatever Paddle's flags say of views.
            view = tensor._slice(slot, slot + 1)
            yield numbered, _weight(numbered, view.reshape_(tensor.shape[1:]), elements, part)


def _weight(key: str, tensor: Any, elements: int, part: _Part) -> Any:
    """Entry of a tensor that has one number for each element of a parameter, or for each block of elements.

    Args:
        key: its key.
        tensor: the tensor.
        elements: how many elements of the parameter each of its numbers stands for.
        part: which elements of the parameter it is of.
    """
    local, whole, offset = (
        tuple(v) for v in (part.model.local_shape, part.model.global_shape, part.model.global_offset)
    )
    if part.flat is not None:
        tensor = tensor._slice(0, -(-(part.flat.stop - part.flat.start) // elements))
    if elements == 1:
        return ShardedWeight(key, tensor, local, whole, offset, part.flat is not None, part.flat)
    numel = math.prod(local)
    begin, end = (0, numel) if part.flat is None else (part.flat.start, part.flat.stop)
    if local != whole or begin % elements or (end % elements and end != numel):
        raise ValueError(
            f"model_sharded_state_dict: received a part of a parameter, of which {key!r} has one number for every "
            f"{elements} elements, that begins or ends within {elements} of them, expected whole parameters; use "
            "sharding without split_param"
        )
    return ShardedWeight(key, tensor, tuple(tensor.shape), (-(-numel // elements),), (begin // elements,))
