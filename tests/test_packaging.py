# SPDX-License-Identifier: Apache-2.0
"""What is packed: the sources that a build needs, and in the wheel what runs, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import paddle
import pytest

ROOT = Path(__file__).parents[1]
#: What a developer's folder holds besides what is in the repository.
LITTER = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist")


class Packed(NamedTuple):
    """What one build made: an sdist, and the wheel that is built from it."""

    sdist: set[str]
    wheel: dict[str, bytes]
    wheel_name: str


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("packed") / "source"
    shutil.copytree(ROOT, folder, ignore=LITTER)
    command = [sys.executable, "-m", "build", "--no-isolation", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    (sdist,), (wheel,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    return Packed(names, contents, wheel.name)


def in_repository(*patterns: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}


def test_sdist_can_be_built_from(packed: Packed) -> None:
    """Whatever was installed where it was made: the CUDA sources too, though a CPU build lists none of them."""
    needed = in_repository("csrc/*", "paddle_asgd/**/*.py", "setup.py", "pyproject.toml")
    assert any(name.endswith(".cu") for name in needed)
    assert any(name.endswith(".h") for name in needed)
    assert needed | {"paddle_asgd/py.typed"} <= packed.sdist


def test_sdist_can_be_tested_from(packed: Packed) -> None:
    assert in_repository("tests/**/*.py", "tests/**/*.cc", "examples/*.py", "README.md") <= packed.sdist
    kinds = (f"{folder}/**/*.{kind}" for folder in ("tests", "benchmarks") for kind in ("h", "cu", "json"))
    others = in_repository(*kinds)
    assert any(name.endswith(".json") for name in others)
    assert others | in_repository("benchmarks/**/*.py", "Makefile") <= packed.sdist


def test_sdist_is_documented_and_licensed(packed: Packed) -> None:
    assert in_repository("docs/*.md", "docs/*.png", "*.md", "LICENSE") <= packed.sdist


def test_wheel_is_licensed(packed: Packed) -> None:
    """With the licence itself, and its name for those who look it up in the metadata."""
    (text,) = [packed.wheel[name] for name in packed.wheel if ".dist-info/" in name and name.endswith("/LICENSE")]
    assert text == (ROOT / "LICENSE").read_bytes()
    (metadata,) = [packed.wheel[name].decode() for name in packed.wheel if name.endswith(".dist-info/METADATA")]
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", metadata, re.MULTILINE)


def test_sdist_holds_nothing_built(packed: Packed) -> None:
    assert [name for name in packed.sdist if name.endswith((".so", ".o", ".pyc")) or name.endswith("version.txt")] == []


def test_wheel(packed: Packed) -> None:
    expected = in_repository("paddle_asgd/**/*.py") | {"paddle_asgd/py.typed", "paddle_asgd/_C.so"}
    outside = {name for name in packed.wheel if ".dist-info/" not in name}
    assert outside == expected


def test_wheel_is_for_this_platform(packed: Packed) -> None:
    """It holds machine code, so it must not pass for one that any machine can take."""
    name = packed.wheel_name
    assert f"cp{sys.version_info[0]}{sys.version_info[1]}" in name
    assert "none-any" not in name


def test_wheel_knows_the_paddle_it_was_built_for(packed: Packed) -> None:
    assert paddle.__version__.encode() in packed.wheel["paddle_asgd/_C.so"]


def test_metadata(packed: Packed) -> None:
    """One version, and no requirement that would fetch a second Paddle."""
    import paddle_asgd

    (metadata,) = [packed.wheel[name].decode() for name in packed.wheel if name.endswith(".dist-info/METADATA")]
    assert f"\nVersion: {paddle_asgd.__version__}\n" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [line for line in required if "paddle" in line.lower()] == []


def test_wheel_runs(packed: Packed, tmp_path: Path) -> None:
    """Unpacked somewhere else, with the source folder out of sight."""
    for name, content in packed.wheel.items():
        if name.startswith("paddle_asgd/"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    code = (
        "import paddle, paddle_asgd; p = paddle.to_tensor([1.0], stop_gradient=False);"
        "o = paddle_asgd.ASGD(0.5, 1, [p]); (p * 3).sum().backward(); o.step();"
        "print(paddle_asgd.__file__, p.item())"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-2:] == [str(tmp_path / "paddle_asgd" / "__init__.py"), "-0.5"], done.stderr[-500:]


def test_missing_paddle_is_named(tmp_path: Path) -> None:
    """A build in an environment without Paddle says what to install, and does not end in a traceback alone."""
    (tmp_path / "paddle.py").write_text("raise ImportError('none here')")
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "paddlepaddle" in done.stderr
    assert "--no-build-isolation" in done.stderr
