# SPDX-License-Identifier: Apache-2.0
"""What an optimizer's state_dict holds, and how one is matched, checked and copied in: all of it, or nothing.

An entry's key is Paddle's: ``<parameter>[_fp32_master_0]_[<name>_]<state>_<number>``. Must not compute any state.
"""

from __future__ import annotations

import math
import numbers
import re
from functools import partial
from typing import Any, Callable, NamedTuple

import paddle
from paddle.base.framework import in_dygraph_mode
from paddle.optimizer.lr import LRScheduler

from .arguments import FLOATING, dtype_name, refuse_state, shown
from .caller import warn
from .distributed_tensors import local, placed_like
from .entries import SCHEDULER, as_tensor, check_scheduler, entry_value, number_entry, set_scheduler
from .state import ParameterState, StateTensor, gradient_dtypes
from .uninterrupted import uninterrupted

_MASTERS = "master_weights"
_MASTER_SUFFIX = re.compile(r"_fp32_master_\d+(_.*)?$")
_MASTER = re.compile(r"(?P<owner>.+)_fp32_master_\d+")
#: paddle.save adds it to a file, and only paddle.load takes it out again.
_NAME_TABLE = "StructuredToParameterName@@"


class Kept(NamedTuple):
    """What a checkpoint holds of an optimizer."""

    state: ParameterState
    parameters: list
    #: the arguments that the state depends on, each an int or a float
    hyperparameters: dict[str, int | float]
    #: a number, a tensor or a scheduler; a checkpoint holds the state of a scheduler only
    learning_rate: Any
    #: names of tensors beside the parameters, which files of static graphs hold and checkpoints do not
    unsaved: tuple[str, ...]
    #: all parameters that the optimizer was made with, of which a wrapper may have left it a part
    whole: list


class _Loaded(NamedTuple):
    """What a state_dict holds for one parameter."""

    #: values by the names of the layout; empty if the parameter has taken no step
    state: dict[str, Any]
    master: Any | None


def collect(kept: Kept) -> dict[str, Any]:
    """Gather all state by Paddle's names, in the order of the parameters.

    Args:
        kept: the optimizer's state, and what goes with it.

    Returns:
        The optimizer's own tensors, which the next step changes; ``master_weights``, a dict by the parameters' names;
        ``LR_Scheduler``, the scheduler's state; and each hyperparameter, as a tensor on the host. The last three are
        there only if the optimizer has them.

    Raises:
        RuntimeError: Paddle is in static graph mode, where the state lies in the scope of a program.
    """
    _require_dygraph("state_dict")
    collected: dict[str, Any] = {}
    counter = kept.state.key(kept.state.counter.name)
    state = [(param, kept.state.of(param)) for param in kept.parameters]
    if any(tensors is not None for _, tensors in state):
        for param, tensors in state:
            if tensors is not None:
                collected.update((tensor.name, tensor) for tensor in tensors if tensor is not None)
            elif not param.stop_gradient:
                # This tells a parameter that has taken no step from one whose entries were lost.
                collected[f"{param.name}_{counter}_0"] = paddle.zeros([1], dtype="int64")
    if kept.state.masters:
        collected[_MASTERS] = dict(kept.state.masters)
    if isinstance(kept.learning_rate, LRScheduler):
        collected[SCHEDULER] = kept.learning_rate.state_dict()
    for name, value in kept.hyperparameters.items():
        collected[name] = number_entry([value], "int64" if isinstance(value, int) else "float64")
    return collected


@paddle.no_grad()
def load(kept: Kept, state_dict: dict[str, Any], adapt: Callable[..., None], *more: Callable[[], Any]) -> None:
    """Match a state_dict with the parameters, check it, then copy it in.

    Args:
        kept: where the state is copied to.
        state_dict: what ``collect`` returned, or the state of Paddle's own optimizer.
        adapt: is called with the state found for each parameter and a list of undo calls. It may bring that state into
            the form that the optimizer keeps, and appends to the list what undoes a change of the optimizer itself.
        more: further C calls, which are made together with the copying: no interrupt can come in between.

    Raises:
        TypeError: ``state_dict`` is not a dict.
        ValueError: an entry is missing, misshapen, or belongs to no parameter. Nothing has been written.
        RuntimeError: Paddle is in static graph mode.
    """
    _require_dygraph("set_state_dict")
    if not isinstance(state_dict, dict):
        raise TypeError(f"set_state_dict: received {type(state_dict).__name__}, expected a dict")
    rest = dict(state_dict)
    scheduler = check_scheduler(kept.learning_rate, rest.pop(SCHEDULER, None))
    rest.pop(_NAME_TABLE, None)
    masters = rest.pop(_MASTERS, {})
    if not isinstance(masters, dict):
        refuse_state(f"{_MASTERS!r} is {type(masters).__name__}, expected a dict")
    masters = dict(masters)
    complete = _check_hyperparameters(kept, rest)
    found = _group_by_owner(kept, rest, masters)
    if not found and not complete:
        refuse_state("it holds no state, expected what state_dict() returned")
    if not any(param.name in found for param in (*kept.parameters, *kept.whole)) and found:
        found, masters = _match_by_position(kept, found, masters)
    loaded = _match_by_name(kept, found, masters, complete)
    undo: list[Callable[[], Any]] = []
    try:
        adapt({name: entry.state for name, entry in loaded.items()}, undo)
        for param in kept.parameters:
            _check_entries(kept, param, loaded[param.name])
        copies = [call for p in kept.parameters for call in _copies(kept, p, loaded[p.name], undo)]
        _change_scheduler(kept, scheduler, undo)
        uninterrupted(*copies, *more, undo.clear)
    except BaseException:
        for call in undo:
            call()
        raise


def load_numbers(kept: Kept, numbers: dict[str, Any], *more: Callable[[], Any]) -> None:
    """Check the entries that belong to no parameter, and load the scheduler's state; the parameters' state stays.

    Args:
        kept: what the optimizer has.
        numbers: the hyperparameters and the state of the scheduler.
        more: further C calls, which are made with the loading.

    Raises:
        ValueError: an entry is missing, unknown, or not the optimizer's own. Nothing has been written.
        RuntimeError: Paddle is in static graph mode.
    """
    _require_dygraph("set_numbers_state_dict")
    rest = dict(numbers)
    scheduler = check_scheduler(kept.learning_rate, rest.pop(SCHEDULER, None))
    if not _check_hyperparameters(kept, rest):
        refuse_state(f"{' or '.join(kept.hyperparameters)} is missing, expected what numbers_state_dict() returned")
    if rest:
        refuse_state(f"entry {next(iter(rest))!r} is unknown, expected what numbers_state_dict() returned")
    undo: list[Callable[[], Any]] = []
    try:
        _change_scheduler(kept, scheduler, undo)
        uninterrupted(*more, undo.clear)
    except BaseException:
        for call in undo:
            call()
        raise


def _change_scheduler(kept: Kept, scheduler: dict[str, Any] | None, undo: list[Callable[[], Any]]) -> None:
    """Load a scheduler's state that has been checked.

    Args:
        kept: what the optimizer has.
        scheduler: the state; None if there is nothing to load.
        undo: gets the calls that undo it.
    """
    if scheduler is not None:
        own = vars(kept.learning_rate)
        undo += [own.clear, partial(own.update, dict(own))]
        set_scheduler(kept.learning_rate, scheduler)


def _require_dygraph(caller: str) -> None:
    """Refuse a call of the method ``caller`` in static graph mode, where the state lies in the scope of a program."""
    if not in_dygraph_mode():
        raise RuntimeError(
            f"{caller}: in static graph mode the state lies in the scope of the program; use paddle.static.save and "
            "paddle.static.load"
        )


def _check_hyperparameters(kept: Kept, rest: dict[str, Any]) -> bool:
    """Compare the hyperparameters in a checkpoint with the optimizer's, and take them out of ``rest``.

    Returns:
        Whether all of them were there, as in what ``collect`` returns. Paddle's own optimizer saves none.

    Raises:
        ValueError: one has another value, or is of another kind than a number.
    """
    complete = True
    for name, value in kept.hyperparameters.items():
        received = rest.pop(name, None)
        complete = complete and received is not None
        if received is None:
            continue
        count = entry_value(received)
        kind = numbers.Integral if isinstance(value, int) else numbers.Real
        if isinstance(count, bool) or not isinstance(count, kind) or count != value:
            text = count if isinstance(count, numbers.Number) else shown(count)
            refuse_state(f"{name} is {text}, expected {value}, with which the optimizer was created")
    return complete


def _group_by_owner(kept: Kept, rest: dict[str, Any], masters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort entries by the parameter that each belongs to.

    Args:
        kept: the optimizer's state, whose layout says which names of state there are.
        rest: all entries except the master weights, the scheduler and the hyperparameters.
        masters: master weights by their parameters' names. Files of static graphs hold them among the other entries;
            those are added here.

    Returns:
        From each parameter's name, as the checkpoint spells it, to its entries by their names in the layout.

    Raises:
        ValueError: an entry comes twice for its parameter, or has no meaning here.
    """
    states = "|".join(re.escape(entry.name) for entry in kept.state.layout)
    pattern = re.compile(rf"(?P<owner>.+)_(?P<state>{states})_\d+")
    # Variables of static graphs that are not state: the learning rate, and what no checkpoint needs.
    ignored = re.compile("|".join([r".*learning_rate_\d+", *(rf".+_{name}_\d+" for name in kept.unsaved)]))
    own_name = "" if kept.state.prefix is None else f"_{kept.state.prefix}"
    params = {param.name for param in (*kept.parameters, *kept.whole)}
    found: dict[str, dict[str, Any]] = {}
    # The values that were read so far, by identity, and the keys that have no meaning here.
    known, unknown = set(), []
    for key, value in rest.items():
        match = pattern.fullmatch(key) if isinstance(key, str) else None
        master = _MASTER.fullmatch(key) if isinstance(key, str) else None
        if match is not None:
            owner = match["owner"]
            owner = owner[: -len(own_name)] if own_name and owner.endswith(own_name) else owner
            owner = _MASTER_SUFFIX.sub("", owner)
            if owner not in params and id(value) in known:
                continue  # paddle.Model's further names may look like state of another parameter
            entries = found.setdefault(owner, {})
            if match["state"] in entries:
                refuse_state(f"entry {key!r} comes a second time for its parameter, under another number")
            entries[match["state"]] = value
        elif master is not None:
            if master["owner"] in masters:
                refuse_state(f"entry {key!r} comes a second time for its parameter, beside {_MASTERS!r}")
            masters[master["owner"]] = value
        elif not isinstance(key, str) or not ignored.fullmatch(key):
            unknown.append(key)
            continue
        known.add(id(value))
    # paddle.Model adds further names for the same tensors.
    unknown = [key for key in unknown if id(rest[key]) not in known]
    if unknown:
        refuse_state(f"entry {unknown[0]!r} belongs to no parameter of this optimizer")
    return found


def _match_by_position(
    kept: Kept, found: dict[str, dict[str, Any]], masters: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Rename the entries of a checkpoint in which no parameter has a name of this optimizer's, by their order.

    That happens to a model that is built a second time in one process, since Paddle numbers all layers of a process.

    Args:
        kept: the optimizer's state; its trainable parameters are matched with the checkpoint's.
        found: entries by the checkpoint's names of parameters.
        masters: master weights by the same names.

    Returns:
        ``found`` and ``masters`` under the names of this optimizer's parameters.

    Raises:
        ValueError: there are fewer or more parameters than in the checkpoint.
    """
    params, whole = ([p for p in params if not p.stop_gradient] for params in (kept.parameters, kept.whole))
    if len(whole) == len(found):
        params = whole  # what several ranks have saved, or a single process
    if len(params) != len(found):
        refuse_state(
            f"no entry has the name of a parameter (the first is for {next(iter(found))!r}, the first parameter is "
            f"{params[0].name if params else None!r}), and entries for {len(found)} parameters cannot be matched with "
            f"{len(params)}"
        )
    renamed = dict(zip(found, (param.name for param in params)))
    warn(
        f"set_state_dict: no entry has the name of a parameter, so they were matched by their order, from "
        f"{next(iter(found))!r} to {params[0].name!r} on"
    )
    return (
        {renamed[name]: entries for name, entries in found.items()},
        {renamed.get(name, name): master for name, master in masters.items()},
    )


def _match_by_name(
    kept: Kept, found: dict[str, dict[str, Any]], masters: dict[str, Any], complete: bool
) -> dict[str, _Loaded]:
    """What the checkpoint holds for each parameter, by the parameter's name.

    Args:
        kept: the optimizer's state and parameters.
        found: entries by parameter; those that are matched are taken out.
        masters: master weights by parameter; those that are matched are taken out.
        complete: whether the checkpoint is one of this package's, which names each parameter. In one of Paddle's, a
            parameter that never had a gradient is missing.

    Raises:
        ValueError: something belongs to no parameter, or a parameter is missing from a complete checkpoint.
    """
    counter = kept.state.counter.name
    loaded, missing = {}, []
    elsewhere = {param.name for param in kept.whole} - {param.name for param in kept.parameters}
    # Those of another rank's part, which a state that was saved by several ranks, or by one for all, has as well.
    others = [found.pop(name) for name in elsewhere if name in found]
    masters = {name: master for name, master in masters.items() if name not in elsewhere}
    for param in kept.parameters:
        entries = found.pop(param.name, None)
        if entries is None and not param.stop_gradient and (found or loaded or others):
            missing.append(param.name)
        if entries is not None and set(entries) == {counter}:
            steps = as_tensor(param.name, counter, entries[counter])
            entries = None if math.prod(steps.shape) == 1 and steps.item() == 0 else entries
        loaded[param.name] = _Loaded(entries or {}, masters.pop(param.name, None))
    for kind, names in ((f"{_MASTERS!r} of", masters), ("state of", found)):
        if names:
            refuse_state(f"{kind} {next(iter(names))!r} belongs to no parameter of this optimizer")
    has_state = bool(others) or any(entry.state for entry in loaded.values())
    if missing and has_state and complete:
        refuse_state(f"the entries of parameter {missing[0]!r} are missing ({len(missing)} such parameters)")
    if missing and has_state:
        # Paddle's own optimizers say nothing about a parameter that never had a gradient.
        warn(
            f"set_state_dict: no entries for {', '.join(map(repr, missing))}: starting with no history, which is right "
            "only if no gradient ever reached them"
        )
    return loaded


def _check_entries(kept: Kept, param: Any, loaded: _Loaded) -> None:
    """Refuse whatever could go wrong while one parameter's entries are copied: what is missing, or does not fit, or has
    no use.
    """
    if not loaded.state and loaded.master is None:
        return
    if loaded.state:
        for entry in kept.state.layout:
            if entry.name not in loaded.state:
                if not entry.is_due(param):
                    continue
                refuse_state(f"entry {entry.name!r} of parameter {param.name!r} is missing")
            if entry.partial and not entry.is_due(param):
                refuse_state(f"entry {entry.name!r} of parameter {param.name!r} is of no use to this optimizer")
            _check_tensor(param, entry, as_tensor(param.name, entry.name, loaded.state[entry.name]))
    wants_master = kept.state.has_master(param)
    if loaded.master is None:
        if wants_master:
            refuse_state(
                f"{_MASTERS!r} of parameter {param.name!r} is missing; create the optimizer with multi_precision=False"
            )
        return
    if not wants_master:
        refuse_state(
            f"{_MASTERS!r} of parameter {param.name!r} is of no use to a {dtype_name(param.dtype)} parameter with "
            f"multi_precision={kept.state.multi_precision}; 16-bit parameters and multi_precision=True have them"
        )
    master = as_tensor(param.name, _MASTERS, loaded.master)
    if list(master.shape) != list(param.shape) or dtype_name(master.dtype) not in FLOATING:
        refuse_state(
            f"{_MASTERS!r} of parameter {param.name!r} is {dtype_name(master.dtype)} {list(master.shape)}, expected "
            f"float32 {list(param.shape)}"
        )


def _check_tensor(param: Any, entry: StateTensor, value: Any) -> None:
    """Refuse an entry whose shape or dtype does not suit its place in the layout, or a negative count."""
    shape = entry.shape(list(param.shape))
    if list(value.shape) != shape:
        refuse_state(
            f"entry {entry.name!r} of parameter {param.name!r} has shape {list(value.shape)}, expected {shape}"
        )
    received = dtype_name(value.dtype)
    dtype = entry.dtype_of(param)
    if dtype == "compute":
        allowed: tuple[str, ...] = FLOATING  # Paddle keeps 16 bits where we keep 32
    elif dtype == "gradient":
        allowed = gradient_dtypes(param)
    else:
        allowed = (dtype,)
    if received not in allowed:
        refuse_state(f"entry {entry.name!r} of parameter {param.name!r} is {received}, expected {' or '.join(allowed)}")
    if dtype == "int64" and value.numel() and int(value.flatten()[0]) < 0:
        refuse_state(
            f"entry {entry.name!r} of parameter {param.name!r} is {value.tolist()}, expected no negative count"
        )


def _copies(kept: Kept, param: Any, loaded: _Loaded, undo: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """Prepare to copy one parameter's entries: make the tensors that are missing.

    Args:
        kept: the optimizer's state.
        param: the parameter.
        loaded: what the checkpoint holds for it. Its tensors stay the caller's.
        undo: gets the calls that drop the tensors made here.

    Returns:
        The C calls that copy into the optimizer's own tensors, or drop state that the checkpoint does not have.
    """
    state, calls = kept.state, []
    values = {name: as_tensor(param.name, name, value) for name, value in loaded.state.items()}
    if values:
        dtypes = (values[entry.name].dtype for entry in state.layout if entry.dtype_of(param) == "gradient")
        state.of_step(param, next(dtypes, param.dtype), undo)
        for entry in state.layout:
            value = values.get(entry.name)
            if value is None:
                calls += state.dropping(param, entry.name)
                continue
            tensor = state.entry_of(param, entry, undo)
            # A sum is converted to the dtype of the computation; other state keeps the checkpoint's dtype.
            fits = entry.dtype_of(param) == "compute" or tensor.dtype == value.dtype
            if fits and list(tensor.shape) == list(value.shape):
                calls += _assignment(tensor, value)
            else:
                calls.append(state.replacement(param, entry.name, value))
    else:
        calls += state.dropping(param)
    if loaded.master is not None:
        if state.held_master(param) is None:
            undo.append(state.dropping_master(param))
        calls += _assignment(state.master_of(param), as_tensor(param.name, _MASTERS, loaded.master))
    elif not values:
        # The next step makes the master weight again from the parameter, as a first step does.
        calls.append(state.dropping_master(param))
    return calls


def _assignment(target: Any, value: Any) -> list[Callable[[], Any]]:
    """Calls that copy a value into a tensor in place, on the tensor's device and in its dtype.

    Whoever holds the tensor sees the new value. There is no call for a tensor without elements, which some versions of
    Paddle refuse to copy.
    """
    if math.prod(target.shape) == 0:
        return []
    value, target = local(placed_like(value, target)), local(target)
    return [partial(target.copy_, value if value.dtype == target.dtype else value.astype(target.dtype), True)]
