# SPDX-License-Identifier: Apache-2.0
"""A model's tensors, the averages or copies that are kept of them, and the native calls on all of them.

Must not know when an average is updated, nor by which rule (averaged_model.py).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Callable

import paddle
from paddle.base.framework import EagerParamBase

from .. import native
from ..arguments import FLOATING, dtype_name, is_tensor, shown
from ..sharding import send_from, single_holders
from ..state import masters_of, parameters_of

AVERAGED, COPIED, LIVE = "averaged", "copied", "live"


class Entry:
    """One tensor of the model, under all of its names."""

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.names = tensor, []
        self.kind = LIVE
        #: the average or the copy; None of a live one, and of one that another rank keeps
        self.held: Any | None = None
        #: the rank, by its number in the group, that keeps the average for all of them; None: each keeps its own
        self.keeper: int | None = None
        #: what the optimizer's master weight is found by
        self.key = tensor.name
        self.may_be_trained = isinstance(tensor, EagerParamBase) and dtype_name(tensor.dtype) in FLOATING

    @property
    def name(self) -> str:
        """The first of its names, which a checkpoint has."""
        return self.names[0]

    @property
    def is_exchanged(self) -> bool:
        """Whether a swap exchanges contents. An average of another dtype is written, and the weights are kept aside."""
        return self.held.dtype == self.tensor.dtype

    @property
    def has_changed(self) -> bool:
        """Whether a tensor that is copied is trained since, or has another dtype."""
        return self.held.dtype != self.tensor.dtype or (self.may_be_trained and not self.tensor.stop_gradient)


def named_tensors(model: Any) -> dict[str, Any]:
    """All parameters and persistable buffers themselves, by the structured names of ``model.state_dict()``."""
    while isinstance(model, paddle.DataParallel):
        model = model._layers
    # Without hooks, and not by a method of the user's, which may put casts of the tensors in their place.
    return dict(paddle.nn.Layer.state_dict(model, use_hook=False))


class AveragedTensors:
    """The tensors of one model, each once, with what is kept of it.

    Args:
        model: whose tensors they are; held by the tensors themselves, whatever their names become.
        optimizer: whose float32 master weights are followed in place of 16-bit parameters; None: no master weights.
        exclude: which of them are left alone: a callable of a structured name, or a list of structured names and
            parameters.
        average_all: whether floating-point tensors that are not trained are averaged, too.
        dtype: of the averages; float64 for float64 parameters.
    """

    def __init__(self, model: Any, optimizer: Any, exclude: Any, average_all: bool, dtype: str) -> None:
        self._optimizer, self._dtype = optimizer, dtype
        #: the ranks that divide the averages among them; None if each has all
        self._group: Any | None = None
        entries: dict[int, Entry] = {}
        #: in the order of the model
        self.names = list(named_tensors(model))
        for name, tensor in named_tensors(model).items():
            entries.setdefault(id(tensor), Entry(tensor)).names.append(name)
        self.entries = list(entries.values())
        excluded = _excluded(exclude, self.entries)
        for entry in self.entries:
            if id(entry.tensor) not in excluded:
                trained = entry.may_be_trained and not entry.tensor.stop_gradient
                floating = dtype_name(entry.tensor.dtype) in FLOATING
                self._keep(entry, AVERAGED if trained or (average_all and floating) else COPIED)
        self._list_anew()
        self.update(1.0)

    @property
    def held(self) -> list[Entry]:
        """Those of which something is kept."""
        return [entry for entry in self.entries if entry.kind != LIVE]

    @property
    def is_divided(self) -> bool:
        """Whether another rank keeps any of the averages, or this one keeps any for the others."""
        return self._group is not None

    @property
    def kept_here(self) -> dict[str, Any]:
        """What this rank keeps, by structured names."""
        return {entry.name: entry.held for entry in self.held if not self._is_away(entry)}

    @property
    def ids(self) -> frozenset[int]:
        """What tells the tensors that a swap writes from all others."""
        return frozenset(id(entry.tensor) for entry in self.held)

    @property
    def has_float32(self) -> bool:
        """Whether any average is float32."""
        return any(dtype_name(entry.held.dtype) == "float32" for entry in self._averaged)

    def _keep(self, entry: Entry, kind: str) -> None:
        own, wide = dtype_name(entry.tensor.dtype), self._wide(entry)
        copy = copy_of(entry.tensor)
        entry.kind, entry.held = kind, copy if kind == COPIED or own == wide else copy.astype(wide)

    def _wide(self, entry: Entry) -> str:
        """The dtype of a tensor's average."""
        return "float64" if dtype_name(entry.tensor.dtype) == "float64" else self._dtype

    def _list_anew(self) -> None:
        """Sort the entries into the lists that the native calls take, and drop what other ranks keep."""
        self._plan: Any = None
        self.drop_fetched()
        self._averaged = [entry for entry in self.entries if entry.kind == AVERAGED and not self._is_away(entry)]
        self._copied = [entry for entry in self.entries if entry.kind == COPIED]

    @paddle.no_grad()
    def _follow_changes(self) -> None:
        """Average from now on what was frozen and is trained since, and copy in its dtype what was cast."""
        for entry in [entry for entry in self._copied if entry.has_changed]:
            copy, trained = entry.held, entry.may_be_trained and not entry.tensor.stop_gradient
            self._keep(entry, AVERAGED if trained else COPIED)
            if trained:
                # It begins where it was frozen, and not behind the first step.
                native.average_update([entry.held], [copy], 1.0)
        self._list_anew()

    def update(self, weight: float, *notes: Callable[[], Any]) -> None:
        """Move all averages towards the present weights and renew the copies.

        Args:
            weight: how far, from 0 to 1.
            notes: C calls that belong to the update; no interrupt can come between.
        """
        if self._plan is not None and self._masters is masters_of(self._optimizer):
            with suppress(ValueError):  # a tensor is not what it was, or is trained since
                return native.average_planned(self._plan, weight, list(notes))
        self._plan_anew(weight)
        native.average_planned(self._plan, weight, list(notes))

    def _plan_anew(self, weight: float) -> None:
        """Prepare the native call of an update, which notices whatever has changed when the next one comes."""
        if any(entry.has_changed for entry in self._copied):
            self._follow_changes()
        masters = self._masters = masters_of(self._optimizer)
        averages, copies = [entry.held for entry in self._averaged], [entry.held for entry in self._copied]
        values = [masters.get(entry.key, entry.tensor) for entry in self._averaged]
        originals = [entry.tensor for entry in self._copied]
        frozen = [entry.tensor for entry in self._copied if entry.may_be_trained]
        self._plan = native.step_plan(frozen, [], [], [averages, values, copies, originals], [masters])
        if self._plan is None:
            native.average_update(averages, values, weight, copies, originals)  # which says what is wrong

    # ---- Among ranks ------------------------------------------------------------------------------------------------

    def _is_away(self, entry: Entry) -> bool:
        """Whether another rank keeps this average."""
        return entry.kind == AVERAGED and entry.keeper is not None and entry.keeper != self._group.rank

    def divide(self, group: Any) -> None:
        """Keep from now on the averages of those parameters alone that this rank's part of the optimizer updates.

        A collective. What no rank updates, or more than one, stays with every rank.

        Args:
            group: the ranks that have the parts of the optimizer.
        """
        params = parameters_of(self._optimizer)
        own, names = set(map(id, params)), {param.name for param in params}
        if any(entry.key in names and id(entry.tensor) not in own for entry in self.entries):
            # Divided by elements: there are other tensors under these names, and the master weights are theirs.
            self._optimizer = None
        keepers = single_holders([id(entry.tensor) in own for entry in self.entries], group)
        if any(keeper is not None for keeper in keepers):
            self._group = group
            for entry, keeper in zip(self.entries, keepers):
                entry.keeper = keeper
            self._list_anew()

    def fetch(self) -> None:
        """Get the averages that other ranks keep, in place of what was fetched before; a collective if divided."""
        for entry in self.entries:
            if entry.kind == AVERAGED and entry.keeper is not None:
                if self._is_away(entry):
                    entry.held = paddle.empty(entry.tensor.shape, self._wide(entry))
                send_from(entry.keeper, entry.held, self._group)

    def drop_fetched(self) -> None:
        """Forget what other ranks keep."""
        for entry in self.entries:
            if self._is_away(entry):
                entry.held = None

    @contextmanager
    def fetched(self, swapped: bool) -> Iterator[None]:
        """Have all averages here for a while; a collective if divided, except while they are in the model anyway."""
        if swapped:
            yield
            return
        try:
            self.fetch()
            yield
        finally:
            self.drop_fetched()

    # ---- Swaps and copies -------------------------------------------------------------------------------------------

    def swap_calls(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Prepare the call of C++ that puts averages and copies into the model, and the one that takes them out again.

        By value: the tensors keep their addresses, so whoever holds a pointer into them reads the right numbers.
        """
        exchanged = [entry for entry in self.held if entry.is_exchanged]
        written = [entry for entry in self.held if not entry.is_exchanged]
        both = [entry.held for entry in exchanged], [entry.tensor for entry in exchanged]
        targets = [entry.tensor for entry in written]
        # Of weights that are not as wide as their averages, no exchange can bring the bits back.
        kept = [copy_of(tensor) for tensor in targets]
        into = native.average_swap_call(*both, targets, [entry.held for entry in written])
        return into, native.average_swap_call(*both, targets, kept)

    def source(self, entry: Entry, swapped: bool) -> Any:
        """Where the average or the copy lies now: in the model itself, while its contents are exchanged."""
        return entry.tensor if entry.kind == LIVE or (swapped and entry.is_exchanged) else entry.held

    def averages(self, swapped: bool) -> dict[str, Any]:
        """Copies of what is kept, as it is kept. Never the tensors themselves: a swap puts raw weights into them."""
        return {entry.name: copy_of(self.source(entry, swapped)) for entry in self.held}

    def as_in_model(self, swapped: bool) -> dict[str, Any]:
        """Copies in the dtypes of the model, under all its names, live ones included."""
        found, targets, sources = {}, [], []
        for entry in self.entries:
            source = self.source(entry, swapped)
            rounded = source.dtype != entry.tensor.dtype
            copy = copy_of(entry.tensor if rounded else source)
            if rounded:
                targets.append(copy)
                sources.append(source)
            found.update(dict.fromkeys(entry.names, copy))
        native.average_swap([], [], targets, sources)
        return {name: found[name] for name in self.names}

    def write_call(self, targets: dict[str, Any], swapped: bool) -> Callable[[], None]:
        """Prepare the call that writes all averages and copies into the tensors of a model with these names.

        Into the optimizer's master weights, too, where the model is the own one: the next step goes on from them.
        """
        written, masters = {}, masters_of(self._optimizer)
        for entry in self.entries:
            source = self.source(entry, swapped)
            for name in entry.names:
                if targets[name] is not source:
                    written[id(targets[name])] = (targets[name], source)
            if targets[entry.name] is entry.tensor and entry.kind == AVERAGED and entry.key in masters:
                written[id(masters[entry.key])] = (masters[entry.key], source)
        pairs = list(written.values())
        return native.average_swap_call([], [], [target for target, _ in pairs], [source for _, source in pairs])


def copy_of(tensor: Any) -> Any:
    """A copy without a history, on the same device."""
    if math.prod(tensor.shape) == 0:
        return paddle.zeros(tensor.shape, tensor.dtype)  # Paddle 2.6 cannot clone nothing
    return tensor.detach().clone()


def _excluded(exclude: Any, entries: Sequence[Entry]) -> set[int]:
    """The ids of the tensors that the user leaves out."""
    if exclude is None:
        return set()
    if callable(exclude) and not is_tensor(exclude):
        return {id(entry.tensor) for entry in entries if any(exclude(name) for name in entry.names)}
    if isinstance(exclude, (str, dict)) or is_tensor(exclude) or not isinstance(exclude, Iterable):
        raise TypeError(
            f"exclude: received {shown(exclude)}, expected a callable of a structured name, or a list of structured "
            "names and parameters; pass a single one within a list"
        )
    by_name = {name: id(entry.tensor) for entry in entries for name in entry.names}
    return {_id_of(item, by_name) for item in exclude}


def _id_of(item: Any, by_name: dict[str, int]) -> int:
    if isinstance(item, str):
        if item in by_name:
            return by_name[item]
        close = difflib.get_close_matches(item, by_name, 1)
        remedy = f"; did you mean {close[0]!r}?" if close else "; a callable can exclude by the beginning of a name"
        raise ValueError(f"exclude: received {item!r}, expected a name of model.state_dict(){remedy}")
    if not is_tensor(item):
        raise TypeError(f"exclude: received {shown(item)} in the list, expected structured names and parameters")
    if id(item) not in by_name.values():
        raise ValueError(f"exclude: received {shown(item)} named {item.name!r}, expected a tensor of the model")
    return id(item)
