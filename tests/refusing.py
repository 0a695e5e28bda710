# SPDX-License-Identifier: Apache-2.0
"""What tests of refusals share: tables of bad input, and a call that must raise and leave everything as it was.

Must not hold tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Callable

import numpy as np
import paddle
import pytest

from paddle_asgd import ASGD

NAN, INF = float("nan"), float("inf")
#: What a table holds under a name: the bad input, the error, and the pieces that its text must have.
Row = tuple


def table(rows: dict[str, Row]) -> Any:
    """The rows as pytest parameters, under their names."""
    return pytest.mark.parametrize("row", list(rows.values()), ids=list(rows))


def assert_refused(call: Callable[[], Any], error: type, pieces: Sequence[str]) -> None:
    """The text holds every piece and can be read: it is no dump of all arguments."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert [piece for piece in pieces if piece not in text] == [], text
    assert len(text) < 500, text[:500]


def content(tensors: Sequence[paddle.Tensor]) -> list:
    return [(str(t.dtype), list(t.shape), hashlib.md5(t.numpy().tobytes()).hexdigest()) for t in tensors]


def named(name: str, shape: Sequence[int]) -> paddle.Tensor:
    """A leaf of this name, so that a text can be held to naming it."""
    value = np.random.default_rng(len(name)).normal(size=shape).astype("float32")
    leaf = paddle.to_tensor(value, stop_gradient=False)
    leaf.name = name
    return leaf


def computed() -> paddle.Tensor:
    leaf = paddle.to_tensor([1.0, 2.0], stop_gradient=False)
    return leaf * 2


NUMBER = {
    "string": ("0.1", TypeError, "'0.1'"),
    "list": ([0.1], TypeError, "[0.1]"),
    "negative": (-0.5, ValueError, "-0.5"),
    "nan": (NAN, ValueError, "nan"),
    "inf": (INF, ValueError, "inf"),
    "bool": (True, TypeError, "True"),
    "complex": (1j, TypeError, "1j"),
    "beyond_float": (10**400, ValueError, "received"),
    "array": (np.array([0.25]), TypeError, "0.25"),
}


def assert_constructor_refuses(row: Row) -> None:
    """A row is a function from two parameters to bad arguments, the error, and what its text must hold."""
    make, error, *pieces = row
    params = [named("first", [3, 2]), named("second", [257])]
    before = content(params)
    arguments = {"learning_rate": 0.1, "batch_num": 3, "parameters": params, **make(*params)}
    assert_refused(lambda: ASGD(**arguments), error, pieces)
    assert content(params) == before


def given(**arguments: Any) -> Callable:
    """What makes the arguments of a row that need none of the parameters."""
    return lambda p, q: arguments
