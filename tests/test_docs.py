# SPDX-License-Identifier: Apache-2.0
"""What is written is true: examples run, public names say what they take, raise and do."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_page
import numpy as np
import paddle
import pytest

import paddle_asgd
from paddle_asgd import native
from paddle_asgd.sharded_checkpoint import ShardedWeight

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "paddle_asgd").rglob("*.py"))
#: What may be written in any source file: its first line, or its second where the first is for the kernel.
SPDX = re.compile(r"(?:#!.*\n)?(?:#|//) SPDX-License-Identifier: Apache-2\.0\n")
NAMES = {name: getattr(paddle_asgd, name) for name in paddle_asgd.__all__}
#: What a user calls: all but the categories of warnings.
PUBLIC = {n: value for n, value in NAMES.items() if not (isinstance(value, type) and issubclass(value, Warning))}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(pages: list[Path]) -> Iterator[Any]:
    for page in pages:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            yield pytest.param(page, line, match[1], id=f"{page.stem}_line_{line}")


# Model.fit of Paddle warns of its own copy of the labels, its LookAhead of the way in which it counts, and its batch
# normalisation of what it does in training.
@pytest.mark.filterwarnings(
    "ignore:To copy construct from a tensor",
    "ignore:Op `increment` is executed:DeprecationWarning",
    "ignore:When training, we now always track",
)
@pytest.mark.parametrize(("page", "line", "code"), list(blocks(PAGES)))
def test_block_runs(page: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stranger would run it: pasted into an empty script, in a folder of its own."""
    if "sharded_state_dict(" in code and ShardedWeight is None:
        pytest.skip("a Paddle without ShardedWeight")
    monkeypatch.chdir(tmp_path)
    # Undone afterwards: a block may put ours in its place.
    monkeypatch.setattr(paddle.optimizer, "ASGD", paddle.optimizer.ASGD)
    # Errors then point to the line of the page.
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n" * (line - 1) + code)
    runpy.run_path(str(script), run_name="__main__")


def test_readme_has_an_example_that_trains() -> None:
    codes = [param.values[2] for param in blocks([README])]
    assert any("ASGD(" in code and ".step()" in code and "clear_grad()" in code for code in codes)


def test_readme_is_short_and_begins_with_what_to_run() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    beginning = "\n".join(lines[:14])
    assert [what for what in ("make demo", "make test", "pip install") if what not in beginning] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lines_are_short(page: Path) -> None:
    """A row of a table cannot be broken; README has none that would have to be."""
    lines = enumerate(page.read_text().splitlines(), 1)
    long = [number for number, line in lines if len(line) > 120 and not (line.startswith("|") and page != README)]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_named_files_exist(page: Path) -> None:
    found = re.findall(r"`((?:tests|examples|benchmarks|csrc|paddle_asgd)/[\w./]+)`", page.read_text())
    assert [name for name in found if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_name_what_exists(page: Path) -> None:
    """The scripts and modules of ``python ...`` commands, and the targets of ``make``."""
    text = page.read_text()
    modules = [name.replace(".", "/") for name in re.findall(r"python3? -m ((?:benchmarks|tests)[\w.]*)", text)]
    scripts = re.findall(r"python3? ((?:examples|benchmarks|tests)/[\w/]+\.py)", text)
    missing = [m for m in modules if not (ROOT / f"{m}.py").exists() and not (ROOT / m / "__main__.py").exists()]
    missing += [script for script in scripts if not (ROOT / script).exists()]
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, re.MULTILINE | re.DOTALL))
    missing += [f"make {t}" for t in re.findall(r"(?:^|`)make (\w+)", code, re.MULTILINE) if t not in targets]
    assert missing == []


def test_every_page_can_be_reached() -> None:
    """By links, from README on."""
    reached, left = set(), [README]
    while left:
        page = left.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            targets = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
            left += [(page.parent / target).resolve() for target in targets if "://" not in target]
    assert set(PAGES) - reached == set()


def test_layout_names_every_file() -> None:
    """That of docs/design.md, of the package's Python files."""
    page = (ROOT / "docs" / "design.md").read_text()
    names = {path.name for path in SOURCES} - {"__init__.py"}
    assert [name for name in sorted(names) if not re.search(rf"^ +{name} {{2,}}\w", page, re.MULTILINE)] == []


def test_api_page_is_made_from_the_docstrings() -> None:
    assert api_page.PAGE.read_text() == api_page.page(), "write it anew: python -m tests.api_page"


def test_api_page_leaves_nothing_out() -> None:
    """Whatever way the page is made: all names, arguments and defaults, and what each name is for."""
    text = " ".join(api_page.PAGE.read_text().split())
    for name, value in NAMES.items():
        assert f"## {name}" in text
        assert " ".join(inspect.getdoc(value).split("\n\n")[0].replace("``", "`").split()) in text
    for value in PUBLIC.values():
        for p in inspect.signature(value).parameters.values():
            assert f"`{p.name}`: " in text
            assert p.default is p.empty or f"{p.name}={p.default!r}" in text


def raised_and_warned() -> Iterator[tuple[str, bool, list[str]]]:
    """Of every message in the package: where it is, whether it is a warning, and its literal pieces."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            function = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", None)
            if isinstance(node, ast.Raise) or function in ("warn", "refuse_state"):
                values = getattr(call.args[0], "values", [call.args[0]])
                pieces = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
                if pieces:
                    yield f"{path.name}:{call.lineno}", function == "warn", pieces


def opening(pieces: list[str]) -> str:
    """The first words of the first piece that has four."""
    said = [piece.split() for piece in pieces]
    return " ".join(next((words for words in said if len(words) >= 4), max(said, key=len))[:5])


def test_warnings_and_errors_are_explained() -> None:
    """Each warning by its words, each error at least by the name that it begins with."""
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    messages = list(raised_and_warned())
    assert sum(warning for _, warning, _ in messages) >= 8
    assert len(messages) > 80
    missing = []
    for place, warning, pieces in messages:
        name = re.match(r"(\w+)(?: of [\w ]+)?: ", pieces[0])
        if not warning and not pieces[0][:1].isalpha():
            continue  # begins with an argument's name, which the call alone knows: see the test below
        begins = name[1] if name is not None else pieces[0].strip() if len(pieces[0].split()) < 4 else opening(pieces)
        explained = opening(pieces) in page if warning else re.search(rf"`{re.escape(begins)}(?!\w)", page) is not None
        if not explained:
            missing.append((place, opening(pieces)))
    assert missing == []


def test_arguments_are_explained_where_errors_are() -> None:
    """An error begins with the name of what it is about: each argument that may be refused has its place there."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    arguments = {p for value in PUBLIC.values() for p in inspect.signature(value).parameters}
    assert [name for name in sorted(arguments) if f"`{name}`" not in page] == []


def source_files() -> list[Path]:
    """What is written in the repository's folders, and nothing that was built or drawn."""
    folders = ("paddle_asgd", "csrc", "tests", "examples", "benchmarks")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    top = [path for path in (ROOT / "setup.py", ROOT / "Makefile", ROOT / ".ci" / "run") if path.exists()]
    return [path for path in [*found, *top] if path.suffix in (".py", ".h", ".cc", ".cu", ".sh") or path in top]


def test_source_files_name_their_licence() -> None:
    files = source_files()
    assert len(files) > 80
    assert [named(path) for path in files if not SPDX.match(path.read_text())] == []


def test_memory_page_is_computed() -> None:
    """Its table of bytes, from the formula that it gives, which is that of ``state_bytes``."""
    bits = {"float32": 32.0, "int16": 16.25, "int8": 8.25}

    def needed(parameters: float, n: int) -> list[float]:
        return [parameters * (n * width / 8 + 4) for width in bits.values()]

    page = (ROOT / "docs" / "memory.md").read_text()
    rows = re.findall(
        r"^\| ([\d.]+) million.*? \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE
    )
    assert len(rows) == 7
    for millions, n, *shown in rows:
        expected = needed(float(millions) * 1e6, int(n.replace(",", "")))
        assert [float(value) for value in shown] == [float(f"{value / 1e9:.3g}") for value in expected]
    weight = paddle.create_parameter([1024, 1024], "float32")
    optimizers = [paddle_asgd.ASGD(0.1, 10, [weight], history_dtype=name) for name in (None, "int16", "int8")]
    assert [optimizer.state_bytes().total for optimizer in optimizers] == needed(1024**2, 10)


def test_license() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert "Apache-2.0" in README.read_text()


# Model.fit of Paddle warns of its own copy of the labels, and its batch normalisation of what it does in training.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor", "ignore:When training, we now always track")
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


EXAMPLES = {
    test.name: test
    for path in SOURCES
    for test in doctest.DocTestFinder().find(
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).replace(".__init__", ""))
    )
    if test.examples
}


def test_examples_are_found() -> None:
    """Of functions of the ground and of a wing, of methods and of properties."""
    wanted = ("arguments.shown", "sag.slots.clock_length", "sag.asgd.ASGD.gradient_norm", "sag.asgd.ASGD.batch_index")
    assert {f"paddle_asgd.{name}" for name in wanted} <= EXAMPLES.keys()


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_in_a_docstring(name: str) -> None:
    """Those of internal functions, too. They see what their module has imported."""
    paddle.seed(7)
    np.random.seed(7)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(EXAMPLES[name], clear_globs=False).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name: str) -> None:
    """Every argument is explained, and what is raised and an example are given."""
    text = inspect.getdoc(PUBLIC[name])
    arguments = [p for p in inspect.signature(PUBLIC[name]).parameters if p != "self"]
    sections = ("Args", "Raises", "Examples") if arguments else ("Raises", "Examples")
    assert all(f"\n{section}:\n" in text for section in sections)
    assert [argument for argument in arguments if not re.search(rf"^    {argument}: ", text, re.MULTILINE)] == []


@pytest.mark.parametrize(
    "function",
    [native.asgd_update, native.asgd_norm, native.average_update, native.average_swap, native.averaged_sgd_update],
    ids=lambda f: f.__name__,
)
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
        for cls in getattr(PUBLIC[name], "__mro__", ())
        if cls.__module__.startswith("paddle_asgd")
        for key, value in vars(cls).items()
        if inspect.isfunction(inspect.unwrap(value)) and not key.startswith("_")
    }
    if inspect.isfunction(PUBLIC[name]):
        methods = {name: PUBLIC[name]}
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
        "SWALR",
        "AveragedModel",
        "AveragedSGD",
        "BatchIndexCallback",
        "FixedBatchSampler",
        "LipschitzSearch",
        "NonMonotonicTrigger",
        "PostHocEMA",
        "SlotMismatchWarning",
        "WeightAveraging",
        "ema",
        "posthoc_weights",
        "power_ema",
        "swa",
        "update_bn",
    ]
    assert all(value.__doc__ for value in NAMES.values())
    assert re.fullmatch(r"\d+\.\d+\.\d+", paddle_asgd.__version__)
    assert paddle_asgd.__doc__
