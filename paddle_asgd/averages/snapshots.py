# SPDX-License-Identifier: Apache-2.0
"""A folder of snapshots: one file for the state of one average at one time. Must not know what they are used for.

The files are NumPy's .npz, which can be read without running what is in them.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..arguments import shown

_NAME = re.compile(r"(\d+)-(\d[\d.e-]*)\.npz")
#: What stands before the names within a file: sums are made of what is averaged, and not of copies.
_AVERAGED, _COPIED = "averaged/", "copied/"


class Snapshot(NamedTuple):
    """Which average, and when; the file's name says it."""

    t: int
    sigma_rel: float

    @property
    def file_name(self) -> str:
        return f"{self.t}-{self.sigma_rel!r}.npz"


class SnapshotFolder:
    """The snapshots in a folder, which is created with the first of them.

    Args:
        folder: its path.
        dtype: of the averaged numbers in the files.
    """

    def __init__(self, folder: str | os.PathLike, dtype: str) -> None:
        self.path, self._dtype = Path(folder), np.dtype(dtype)

    def snapshots(self) -> set[Snapshot]:
        """Those that are there. Anything else in the folder is passed over, such as what a killed process left."""
        found = [_NAME.fullmatch(path.name) for path in self.path.glob("*.npz")]
        return {Snapshot(int(match[1]), float(match[2])) for match in found if match}

    def write(self, snapshot: Snapshot, averaged: dict[str, np.ndarray], copied: dict[str, np.ndarray]) -> None:
        """Write a file under a name of its own and rename it: who reads sees a whole snapshot or none."""
        arrays = {_AVERAGED + name: self._narrowed(name, value) for name, value in averaged.items()}
        arrays.update({_COPIED + name: value for name, value in copied.items()})
        self.path.mkdir(parents=True, exist_ok=True)
        # Not from tempfile, whose files nobody else may read.
        temporary = self.path / f".{snapshot.file_name}-{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / snapshot.file_name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _narrowed(self, name: str, value: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            narrow = value.astype(self._dtype)
        if np.isinf(narrow).any() and not np.isinf(value).any():
            raise ValueError(
                f"dtype: received {self._dtype.name!r}, expected 'float32': the average of {name!r} holds "
                f"{np.abs(value).max():.3g}, which is beyond {self._dtype.name}"
            )
        return narrow

    def read(self, snapshot: Snapshot) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What ``write`` was given, the averaged numbers as they were narrowed."""
        path = self.path / snapshot.file_name
        try:
            # Opened here, for NumPy leaves a file open that it cannot read.
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"folder: received {shown(str(path))}, expected a snapshot: {error}") from error
        return tuple(
            {name[len(kind) :]: value for name, value in arrays.items() if name.startswith(kind)}
            for kind in (_AVERAGED, _COPIED)
        )
