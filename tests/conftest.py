# SPDX-License-Identifier: Apache-2.0
"""What every test starts from: dygraph mode, fixed seeds, its own names; and --no-shortcut, which sends all steps of
dygraph the full way. Must not hold helpers (problems.py)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest

with warnings.catch_warnings():
    # What Paddle says while it is imported: no ccache, a GPU build on a machine without a GPU.
    warnings.simplefilter("ignore")
    import paddle
    import paddle.utils.cpp_extension

    paddle.to_tensor(0.0)

    from paddle_asgd.shortcut import Shortcut


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-shortcut", action="store_true", help="every dygraph step goes the full way (shortcut.py)")
    parser.addoption("--interrupts", type=int, default=13, help="instructions a case to interrupt; 0: each one")
    parser.addoption("--sequences", type=int, default=300, help="random sequences of events (test_events.py)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shortcut: is about the shortcut itself, and senseless with --no-shortcut")
    # Paddle's own optimizers and to_static say this from 3.2 on; test_static.py forbids it to ours.
    config.addinivalue_line("filterwarnings", "ignore:(Tensor|Value) do not have 'place' interface:UserWarning")
    # Paddle's BatchNorm says this at every step in training.
    config.addinivalue_line("filterwarnings", "ignore:When training, we now always track global mean:UserWarning")


@pytest.fixture(autouse=True)
def _way_of_a_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.config.getoption("--no-shortcut"):
        return
    if request.node.get_closest_marker("shortcut"):
        pytest.skip("--no-shortcut")
    monkeypatch.setattr(Shortcut, "of", lambda *arguments: None)


@pytest.fixture(autouse=True)
def _fresh_paddle() -> Iterator[None]:
    paddle.disable_static()
    paddle.seed(5)
    np.random.seed(5)
    with paddle.utils.unique_name.guard():
        yield
    paddle.disable_static()


@pytest.fixture
def static_mode() -> Iterator[None]:
    """Static graph mode, in programs of the test's own: the process's hold the names of other tests already."""
    paddle.enable_static()
    with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        yield
    paddle.disable_static()
