# SPDX-License-Identifier: Apache-2.0
"""A folder of snapshots: whole files or none, and what a file holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddle_asgd.averages.snapshots import Snapshot, SnapshotFolder

VALUES = {"a/b.weight": np.array([[1.0, -2.5], [0.1, 3.0]], dtype="float32"), "file": np.array(0.25, dtype="float32")}
COPIES = {
    "count": np.array([2**40], dtype="int64"),
    "mean": np.array([1e30], dtype="float32"),
    "none": np.zeros([0, 3]),
}


def arrays_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and np.array_equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_is_read_was_written(tmp_path: Path, dtype: str) -> None:
    folder = SnapshotFolder(str(tmp_path / "new" / "folder"), dtype)
    assert folder.snapshots() == set()
    kept = {Snapshot(1000, 0.05), Snapshot(1000, 0.1), Snapshot(10**9, 1e-05)}
    for snapshot in kept:
        folder.write(snapshot, VALUES, COPIES)
    assert SnapshotFolder(tmp_path / "new" / "folder", "float32").snapshots() == kept
    averaged, copied = folder.read(Snapshot(10**9, 1e-05))
    assert arrays_equal(averaged, {name: value.astype(dtype) for name, value in VALUES.items()})
    assert arrays_equal(copied, COPIES)


def test_written_again(tmp_path: Path) -> None:
    folder, snapshot = SnapshotFolder(tmp_path, "float32"), Snapshot(5, 0.1)
    folder.write(snapshot, VALUES, COPIES)
    folder.write(snapshot, {"x": np.ones(1)}, {})
    assert os.listdir(tmp_path) == ["5-0.1.npz"]
    assert list(folder.read(snapshot)[0]) == ["x"]
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "5-0.1.npz").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def killed(*arguments: Any) -> None:
        raise Killed

    folder, snapshot = SnapshotFolder(tmp_path, "float32"), Snapshot(5, 0.1)
    folder.write(snapshot, VALUES, COPIES)
    monkeypatch.setattr(os, where, killed)
    for other in (snapshot, Snapshot(6, 0.1)):
        with pytest.raises(Killed):
            folder.write(other, {}, {})
    assert os.listdir(tmp_path) == ["5-0.1.npz"]
    assert arrays_equal(folder.read(snapshot)[0], VALUES)


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    for name in (".5-0.1.npz-x", "notes.npz", "5-0.1.npz.bak", "5-.npz", "x5-0.1.npz"):
        (tmp_path / name).write_bytes(b"")
    assert SnapshotFolder(tmp_path, "float16").snapshots() == set()


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    folder, snapshot = SnapshotFolder(tmp_path, "float16"), Snapshot(5, 0.1)
    beyond = {"a": np.ones(2), "b": np.array([1.0, -7e4])}
    with pytest.raises(ValueError, match=r"^dtype: received 'float16', expected 'float32': .*'b' holds 7e\+04"):
        folder.write(snapshot, beyond, {})
    assert os.listdir(tmp_path) == []
    # What has diverged already is written as it is.
    folder.write(snapshot, {"a": np.array([np.inf, np.nan])}, beyond)
    np.testing.assert_array_equal(folder.read(snapshot)[0]["a"], [np.inf, np.nan])


def test_unreadable(tmp_path: Path) -> None:
    folder, snapshot = SnapshotFolder(tmp_path, "float16"), Snapshot(5, 0.1)
    folder.write(snapshot, VALUES, {})
    path = tmp_path / snapshot.file_name
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.ones(3))
    for damaged in (b"", b"no archive", whole[:-30], whole[:100], (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^folder: received .*5-0.1.npz.*, expected a snapshot: "):
            folder.read(snapshot)
    path.unlink()
    with pytest.raises(ValueError, match=r"^folder: received .*5-0.1.npz.*, expected a snapshot: "):
        folder.read(snapshot)
