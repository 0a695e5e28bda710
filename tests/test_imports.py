# SPDX-License-Identifier: Apache-2.0
"""The rules of docs/design.md: who may import whom, who may use Paddle's private attributes, and that each source file
has a test file of its name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "paddle_asgd"
FILES = {str(path.relative_to(PACKAGE).with_suffix("")): path for path in sorted(PACKAGE.rglob("*.py"))}
#: Private attributes of paddle.optimizer.Optimizer that this package uses.
PADDLES = (
    *("_accumulators", "_master_weights", "_add_accumulator", "_create_master_weight", "_auxiliary_vars"),
    *("_get_auxiliary_var", "_set_auxiliary_var", "_global_learning_rate", "_declarative_step", "_grad_clip"),
)
#: Source files without a test file of their own, and why.
UNTESTED_BY_NAME = {
    "__init__": "holds the public names alone, which test_docs.py compares with a list",
    "averages/__init__": "must not hold code",
    "sag/__init__": "must not hold code",
}


def imported(name: str) -> Iterator[str]:
    """The files of the package that a file imports, at any depth and under TYPE_CHECKING, too."""
    folder = name.split("/")[:-1]
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = folder[: len(folder) - (node.level - 1)]
        module = [*base, *(node.module.split(".") if node.module else [])]
        for alias in node.names:
            for candidate in ("/".join([*module, alias.name]), "/".join(module)):
                if candidate in FILES:
                    yield candidate
                    break


GRAPH = {name: set(imported(name)) for name in FILES}


def absolute_imports(path: Path) -> set[str]:
    """The modules that a file imports by their whole names, and the names that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_are_found() -> None:
    assert {"fused", "native"} <= GRAPH["sag/asgd"]


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


@pytest.mark.parametrize("name", FILES)
def test_ground_and_wings(name: str) -> None:
    """The ground imports no subpackage, and a subpackage only itself and the ground."""
    if name == "__init__":
        return  # the public names
    wings = {other.split("/")[0] for other in GRAPH[name] if "/" in other}
    own = {name.split("/")[0]} if "/" in name else set()
    assert wings <= own


def test_who_imports_tests_and_benchmarks() -> None:
    """Tests must run without the benchmarks. Benchmarks take from the tests what both need, and nothing that judges."""
    users = {folder: [*(ROOT / folder).rglob("*.py")] for folder in ("paddle_asgd", "examples", "tests", "benchmarks")}
    needed = ("tests.gpu.build", "tests.least_squares.")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder, paths in users.items()
        for path in paths
        for name in absolute_imports(path)
        if (name.startswith("benchmarks") and folder != "benchmarks")
        or (name.startswith("tests") and not (folder == "benchmarks" and name.startswith(needed)))
    ]
    assert all(users.values())
    assert wrong == []


@pytest.mark.parametrize("name", FILES)
def test_one_door_to_the_library(name: str) -> None:
    text = FILES[name].read_text()
    assert name == "native" or ("_C.so" not in text and "import _C\n" not in text)


@pytest.mark.parametrize("name", FILES)
def test_private_attributes_of_paddles_optimizer(name: str) -> None:
    used = [
        node.attr for node in ast.walk(ast.parse(FILES[name].read_text()))
        if isinstance(node, ast.Attribute) and node.attr in PADDLES
    ]  # fmt: skip
    assert name in ("fused", "state") or used == []


def test_private_attributes_of_another_file() -> None:
    """Of an object that is not self, cls or a module of Paddle; Paddle's own count, too."""
    uses = []
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "_C", "_C_ops"):
                continue
            if isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()":
                continue
            uses.append(f"{name}: {ast.unparse(node)}")
    owners = ("optimizer._", "state._", "inputs._", "watch._", "index._")
    ours = [use for use in uses if any(owner in use for owner in owners) and "state: self._optimizer." not in use]
    assert len(ours) <= 10, ours


def file_that_tests(name: str) -> Path:
    """The file that tests a source file: ``test_callback.py``, or ``test_sag_callback.py`` where wings share a name."""
    folder = Path(__file__).parent
    wing, _, stem = name.rpartition("/")
    longer = folder / f"test_{wing}_{stem}.py"
    return longer if wing and longer.exists() else folder / f"test_{stem}.py"


@pytest.mark.parametrize("name", [name for name in FILES if name not in UNTESTED_BY_NAME])
def test_every_source_file_has_a_test_file(name: str) -> None:
    """One of its own: two sources of the same name in two wings have two test files."""
    path = file_that_tests(name)
    assert path.exists(), f"paddle_asgd/{name}.py has no tests/{path.name}"
    assert re.search(r"^def test_", path.read_text(), re.MULTILINE)
    others = [other for other in FILES if other not in UNTESTED_BY_NAME and file_that_tests(other) == path]
    assert others == [name]


def test_exceptions_from_the_mirror_are_needed() -> None:
    assert UNTESTED_BY_NAME.keys() <= FILES.keys()
    assert [name for name in UNTESTED_BY_NAME if file_that_tests(name).exists()] == []
