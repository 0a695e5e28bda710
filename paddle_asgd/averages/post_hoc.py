# SPDX-License-Identifier: Apache-2.0
"""PostHocEMA: snapshots of power-function averages, and averages of other widths made of them afterwards.

Must not know how an average is kept (averaged_model.py), how a snapshot is stored (snapshots.py), nor how snapshots are
weighted (posthoc_weights.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle.distributed import get_rank
from paddle.optimizer import Optimizer

from .. import native
from ..arguments import check_int, dtype_name, refuse_state, shown
from ..entries import entry_value
from .averaged_model import AveragedModel
from .averaged_tensors import named_tensors
from .posthoc_weights import check_list, posthoc_weights
from .rules import check_width, power_ema
from .snapshots import Snapshot, SnapshotFolder

_DTYPES = ("float16", "float32", "float64")


class PostHocEMA:
    """Keeps snapshots of averages of some widths during the training, and makes averages of others afterwards.

    Each width is an ``AveragedModel`` with ``power_ema``; after every ``every`` updates all of them are written to a
    folder. ``reconstruct`` adds snapshots up with the weights of ``posthoc_weights``. What is copied and not averaged,
    such as BatchNorm's statistics, is that of the nearest snapshot before; ``update_bn`` makes it right.

    A file is written under another name and then renamed, so that an interrupt leaves a whole snapshot or none. With
    several processes rank 0 writes, and the others see the file a moment later: save the ``state_dict()`` of rank 0.
    Keep ``state_dict()`` with the other checkpoints: a training that is resumed from it goes on with the snapshots of
    its past and passes over those that an abandoned run wrote after it.

    Args:
        model: the ``paddle.nn.Layer`` in training.
        sigma_rels: the widths of the averages, at least two, as in ``power_ema``.
        folder: where the snapshots are: an empty or absent folder for a training that begins, or that of a training
            that is over, to reconstruct from.
        every: how many updates lie between two snapshots.
        dtype: of the averages in the files: "float16", which adds an error of about 2e-4, "float32" or "float64".
        optimizer: as in ``AveragedModel``: the optimizer that trains the model, whose real steps then count.
        update_every: of the steps, each so many-th updates the averages.

    Attributes:
        averages: the ``AveragedModel`` of each width.
        num_updates: the number of updates so far.
        snapshots: which there are, as pairs of time and width, in order.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; the folder holds the snapshots of another training when this one
            begins; a snapshot cannot be read, is of another model, or holds more than float16 can; there are none.

    Examples:
        >>> import tempfile
        >>> import paddle
        >>> from paddle_asgd import PostHocEMA
        >>> model = paddle.nn.Linear(4, 1)
        >>> optimizer = paddle.optimizer.Adam(0.01, parameters=model.parameters())
        >>> averages = PostHocEMA(model, folder=tempfile.mkdtemp(), every=5, optimizer=optimizer)
        >>> for _ in range(20):
        ...     model(paddle.randn([8, 4])).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.clear_grad()
        ...     averages.update()
        >>> averages.snapshots[-2:]
        [(20, 0.05), (20, 0.1)]
        >>> weights = averages.reconstruct(sigma_rel=0.15)  # for paddle.save, or a model's set_state_dict

    Source: T. Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, section 3.
    """

    def __init__(
        self,
        model: paddle.nn.Layer,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        folder: str | os.PathLike = "post_hoc_ema",
        every: int = 1000,
        *,
        dtype: str = "float16",
        optimizer: Optimizer | None = None,
        update_every: int = 1,
    ) -> None:
        widths = check_list("sigma_rels", sigma_rels)
        rules = [power_ema(check_width(f"sigma_rels[{i}]", width)) for i, width in enumerate(widths)]
        if len(set(widths)) != len(widths) or len(widths) < 2:
            raise ValueError(f"sigma_rels: received {shown(sigma_rels)}, expected at least two widths that differ")
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder: received {shown(folder)}, expected a path")
        self._every = check_int("every", every, 1)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise (ValueError if isinstance(dtype, str) else TypeError)(
                f"dtype: received {shown(dtype)}, expected {', '.join(map(repr, _DTYPES))}"
            )
        self._model, self._widths = model, widths
        self._folder = SnapshotFolder(folder, dtype)
        self.averages = [AveragedModel(model, rule, optimizer=optimizer, update_every=update_every) for rule in rules]
        #: those of this training; None before it begins: all that are there
        self._own: set[Snapshot] | None = None

    @property
    def num_updates(self) -> int:
        return self.averages[0].num_updates

    @property
    def snapshots(self) -> list[tuple[int, float]]:
        return [tuple(snapshot) for snapshot in self._present()]

    def _present(self) -> list[Snapshot]:
        there = self._folder.snapshots()
        return sorted(there if self._own is None else there & self._own)

    def update(self) -> None:
        """Update all averages after a step, as ``AveragedModel.update``, and write snapshots if it is time."""
        if self._own is None:
            # Rank 0 may have written its first before another rank looks.
            there = {each for each in self._folder.snapshots() if each.t > 1 or get_rank() == 0}
            if there:
                raise ValueError(
                    f"folder: received {str(self._folder.path)!r} with {len(there)} snapshots of another training, "
                    "expected none where one begins; choose another folder, or load the state of that training"
                )
            self._own = set()
        for average, width in zip(self.averages, self._widths):
            before = average.num_updates
            average.update()
            if average.num_updates != before and average.num_updates % self._every == 0:
                self._write(average, width)

    def _write(self, average: AveragedModel, width: float) -> None:
        snapshot = Snapshot(average.num_updates, width)
        # Where the ranks have divided the average, all of them must bring it together.
        state = average.state_dict() if average.is_divided or get_rank() == 0 else None
        if get_rank() == 0:
            trained = {name for name, tensor in named_tensors(self._model).items() if not tensor.stop_gradient}
            values = {name: _array(tensor) for name, tensor in state["averages"].items()}
            averaged = {name: value for name, value in values.items() if name in trained}
            self._folder.write(snapshot, averaged, {n: value for n, value in values.items() if n not in trained})
        self._own.add(snapshot)

    @paddle.no_grad()
    def reconstruct(self, sigma_rel: float, at: int | None = None) -> dict[str, Any]:
        """Return the average of any width at the time of any snapshot, in the form of the model's ``state_dict()``.

        Args:
            sigma_rel: its width. Near the widths of the snapshots it is most precise; see ``posthoc_weights``.
            at: its time, the number of an update, at most that of the last snapshot. Between two snapshots it is less
                precise. None: the last snapshot's.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: an argument is out of range, there is no snapshot, or one cannot be read or is of another model.
        """
        present = self._present()
        if not present:
            raise ValueError(
                f"folder: received {str(self._folder.path)!r} without a snapshot of this training, expected some: "
                f"there is one for every {self._every} updates"
            )
        at = present[-1].t if at is None else check_int("at", at, 1)
        weights = posthoc_weights([each.t for each in present], [each.sigma_rel for each in present], at, sigma_rel)
        nearest = max((each for each in present if each.t <= at), default=present[0])
        sums: dict[str, Any] = {}
        copies: dict[str, np.ndarray] = {}
        for snapshot, weight in zip(present, weights):
            averaged, copied = self._folder.read(snapshot)
            for name, value in averaged.items():
                sums[name] = sums.get(name, 0.0) + weight * value.astype(np.float64)
            if snapshot == nearest:
                copies = copied
        return self._in_model({**copies, **sums})

    def _in_model(self, values: dict[str, np.ndarray]) -> dict[str, Any]:
        """Tensors in the dtypes of the model, under all its names; those of one parameter are one."""
        made: dict[int, Any] = {}
        found, targets, sources = {}, [], []
        for name, tensor in named_tensors(self._model).items():
            if id(tensor) not in made:
                if name not in values or list(values[name].shape) != list(tensor.shape):
                    raise ValueError(
                        f"folder: received snapshots in which {name!r} is {_shape_of(values, name)}, expected "
                        f"{list(tensor.shape)}, as in the model"
                    )
                made[id(tensor)] = tensor.detach().clone()
                targets.append(made[id(tensor)])
                sources.append(paddle.to_tensor(values[name], place=tensor.place))
            found[name] = made[id(tensor)]
        native.average_swap([], [], targets, sources)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs besides the folder: the averages, and which snapshots are its own."""
        return {
            "averages": [average.state_dict() for average in self.averages],
            "sigma_rels": list(self._widths),
            "snapshots": [list(snapshot) for snapshot in self._present()],
        }

    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called; all is loaded or nothing.

        Raises:
            TypeError: it is no dict.
            ValueError: an entry is missing, or belongs to other widths or another model.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"set_state_dict: received {shown(state_dict)}, expected a dict")
        if set(state_dict) != {"averages", "sigma_rels", "snapshots"}:
            refuse_state(f"it has the entries {sorted(map(str, state_dict))}, expected averages, sigma_rels, snapshots")
        widths = [entry_value(width) for width in state_dict["sigma_rels"]]
        if widths != self._widths or len(state_dict["averages"]) != len(widths):
            refuse_state(f"sigma_rels is {widths}, expected {self._widths}, with which the PostHocEMA was created")
        own = _check_snapshots(state_dict["snapshots"])
        before = [average.state_dict() for average in self.averages]
        try:
            for average, state in zip(self.averages, state_dict["averages"]):
                average.set_state_dict(state)
        except BaseException:
            for average, state in zip(self.averages, before):
                average.set_state_dict(state)
            raise
        self._own = own

    load_state_dict = set_state_dict


def _check_snapshots(value: Any) -> set[Snapshot]:
    """Pairs of time and width."""
    try:
        return {Snapshot(int(entry_value(t)), float(entry_value(width))) for t, width in value}
    except (TypeError, ValueError):
        refuse_state(f"'snapshots' is {shown(value)}, expected pairs of time and width")


def _array(tensor: Any) -> np.ndarray:
    """NumPy has no bfloat16."""
    return (tensor.astype("float32") if dtype_name(tensor.dtype) == "bfloat16" else tensor).numpy()


def _shape_of(values: dict[str, np.ndarray], name: str) -> Any:
    return list(values[name].shape) if name in values else "missing"
