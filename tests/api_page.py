# SPDX-License-Identifier: Apache-2.0
"""Writes docs/api.md from the docstrings of the public names: ``python -m tests.api_page``.

Must not say anything of its own about a name: what the page lacks belongs into the docstring.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paddle_asgd

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
#: Methods that Paddle calls, not a user.
NOT_FOR_USERS = {"append_regularization_ops", "on_train_begin", "on_epoch_begin", "on_train_batch_begin"}
HEAD = """# The public names

What `import paddle_asgd` offers. `python -m tests.api_page` makes this page from the docstrings, which hold the
formulas and the sources, too: `help(paddle_asgd.ASGD)`. What else an `ASGD` has is `paddle.optimizer.Optimizer`'s.
"""
TITLES = {"Args": "Arguments", "Raises": "Errors"}


def page() -> str:
    """The text of docs/api.md."""
    parts = [HEAD]
    for name in paddle_asgd.__all__:
        parts += [f"## {name}\n", *of_name(name, getattr(paddle_asgd, name))]
    return "\n".join(parts)


def of_name(name: str, value: Any) -> Iterator[str]:
    """One public name: how it is called, what it is for, its arguments, errors, example and members."""
    doc = inspect.getdoc(value) or ""
    yield f"{paragraph(doc.partition(chr(10) + chr(10))[0])}\n"
    if isinstance(value, type) and issubclass(value, Warning):
        return
    yield fenced(signature(name, value), "")
    for title in ("Args", "Attributes", "Raises"):
        entries = section(doc, title)
        if entries:
            yield f"**{TITLES.get(title, title)}**\n"
            yield "\n".join(bullet(entry) for entry in entries) + "\n"
    yield fenced(textwrap.dedent("\n".join(body(doc, "Examples"))).strip("\n"), "pycon")
    members = list(members_of(value)) if isinstance(value, type) else []
    if members:
        yield "**Methods and properties**\n"
        yield "\n".join(members) + "\n"


def members_of(cls: type) -> Iterator[str]:
    """The documented members that the package defines, in the order of their definition, each once."""
    explained = {entry.partition(": ")[0] for entry in section(inspect.getdoc(cls) or "", "Attributes")}
    held = {
        key: value
        for base in cls.__mro__
        if base.__module__.startswith("paddle_asgd")
        for key, value in vars(base).items()
        if not key.startswith("_") and key not in NOT_FOR_USERS
    }
    for key in held:
        member = inspect.getattr_static(cls, key)
        function = member.fget if isinstance(member, property) else inspect.unwrap(member)
        doc = inspect.getdoc(function) if inspect.isfunction(function) else None
        if doc and key == function.__name__ and key not in explained:
            shown = key if isinstance(member, property) else signature(key, function)
            yield wrapped(f"* `{shown}`: {flat(doc.partition(chr(10) + chr(10))[0])}", "  ")


def signature(name: str, value: Any) -> str:
    """The call, without types, on lines of at most 120 characters."""
    parameters = [
        p.replace(annotation=p.empty) for p in inspect.signature(value).parameters.values() if p.name != "self"
    ]
    call = f"{name}{inspect.Signature(parameters)}"
    return "\n    ".join(textwrap.wrap(call, 116, break_long_words=False))


def body(doc: str, title: str) -> list[str]:
    """The lines of one section of a docstring."""
    found = re.search(rf"^{title}:\n((?:(?: {{4}}.*)?\n)*)", doc + "\n", re.MULTILINE)
    return found[1].splitlines() if found else []


def section(doc: str, title: str) -> list[str]:
    """The entries of a section, each ``name: text`` on one line."""
    text = textwrap.dedent("\n".join(body(doc, title)))
    return [flat(entry) for entry in re.split(r"\n(?=\S)", text) if entry.strip()]


def bullet(entry: str) -> str:
    name, _, text = entry.partition(": ")
    return wrapped(f"* `{name}`: {text}", "  ")


def flat(text: str) -> str:
    """One line of Markdown from a piece of a docstring."""
    text = re.sub(r":math:`([^`]*)`", r"`\1`", text).replace("``", "`")
    return " ".join(text.split())


def paragraph(text: str) -> str:
    return wrapped(flat(text), "")


def wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page())
