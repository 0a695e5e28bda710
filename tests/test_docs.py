"""What is written is true: examples run, public names say what they take, raise and do."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

import paddle_asgd
from paddle_asgd import native

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NAMES = {name: getattr(paddle_asgd, name) for name in paddle_asgd.__all__}
#: What a user calls: all but the categories of warnings.
PUBLIC = {name: value for name, value in NAMES.items() if not issubclass(value, Warning)}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def readme_blocks() -> Iterator[Any]:
    text = README.read_text() if README.is_file() else ""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        yield pytest.param(line, match[1], id=f"line_{line}")


@pytest.mark.parametrize(("line", "code"), list(readme_blocks()))
def test_readme_block_runs(line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stranger would run it: pasted into an empty script, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    # Errors then point to the line of the README.
    (tmp_path / "block.py").write_text("\n" * (line - 1) + code)
    runpy.run_path(str(tmp_path / "block.py"), run_name="__main__")


def test_readme_has_an_example_that_trains() -> None:
    blocks = [param.values[1] for param in readme_blocks()]
    assert any("ASGD(" in code and ".step()" in code and "clear_grad()" in code for code in blocks)


def test_readme_links_lead_somewhere() -> None:
    missing = [
        target
        for target in re.findall(r"\]\(([^)#\s]+)", README.read_text())
        if "://" not in target and not (ROOT / target).exists()
    ]
    assert missing == []


def test_readme_names_files_that_exist() -> None:
    named = set(re.findall(r"`((?:tests|examples|benchmarks|csrc|paddle_asgd)/[\w./]+)`", README.read_text()))
    assert [name for name in named if not (ROOT / name).exists()] == []


# Model.fit of Paddle warns of its own copy of the labels.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("name", PUBLIC)
def test_doctest(name: str) -> None:
    # What the example draws must not decide whether it passes.
    paddle.seed(7)
    np.random.seed(7)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tests = finder.find(PUBLIC[name], name)
    results = [runner.run(test) for test in tests]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name: str) -> None:
    """Every argument is explained, and what is raised and an example are given."""
    text = inspect.getdoc(PUBLIC[name])
    assert all(f"\n{section}:\n" in text for section in ("Args", "Raises", "Examples"))
    arguments = [p for p in inspect.signature(PUBLIC[name]).parameters if p != "self"]
    assert [argument for argument in arguments if not re.search(rf"^    {argument}: ", text, re.MULTILINE)] == []


@pytest.mark.parametrize("function", [native.asgd_update, native.asgd_norm], ids=lambda f: f.__name__)
def test_native_docstring(function: Any) -> None:
    text = inspect.getdoc(function)
    assert all(f"\n{section}:\n" in text for section in ("Args", "Raises"))
    arguments = inspect.signature(function).parameters
    assert [argument for argument in arguments if not re.search(rf"^    {argument}: ", text, re.MULTILINE)] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_methods_are_documented_and_typed(name: str) -> None:
    """Those that the package defines itself; Paddle's speak for themselves."""
    methods = {
        key: value
        for cls in PUBLIC[name].__mro__
        if cls.__module__.startswith("paddle_asgd")
        for key, value in vars(cls).items()
        if inspect.isfunction(inspect.unwrap(value)) and not key.startswith("_")
    }
    assert methods
    assert [key for key, method in methods.items() if not (method.__doc__ or "").strip()] == []
    for key, method in methods.items():
        signature = inspect.signature(inspect.unwrap(method))
        untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert (key, untyped) == (key, [])
        assert signature.return_annotation is not signature.empty, key


def test_signature_is_paddles() -> None:
    """Changing one import must be all: names, order and defaults of paddle.optimizer.ASGD's documentation."""
    parameters = inspect.signature(paddle_asgd.ASGD).parameters.values()
    assert [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY] == [
        ("learning_rate", 0.001),
        ("batch_num", 1),
        ("parameters", None),
        ("weight_decay", None),
        ("grad_clip", None),
        ("multi_precision", False),
        ("name", None),
    ]


def test_types_are_announced() -> None:
    marker = Path(paddle_asgd.__file__).with_name("py.typed")
    assert marker.read_bytes() == b""


def test_package_shows_its_public_names_only() -> None:
    assert paddle_asgd.__all__ == [
        "ASGD",
        "BatchIndexCallback",
        "FixedBatchSampler",
        "LipschitzSearch",
        "SlotMismatchWarning",
    ]
    assert all(value.__doc__ for value in NAMES.values())
    assert re.fullmatch(r"\d+\.\d+\.\d+", paddle_asgd.__version__)
    assert paddle_asgd.__doc__
