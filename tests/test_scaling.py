# SPDX-License-Identifier: Apache-2.0
"""docs/scaling.md says what its formulas give, and the formula of the history is that of a real one."""

from __future__ import annotations

import re

import paddle
import pytest
import scaling
from problems import step_with

from paddle_asgd import ASGD

N = 5


@pytest.mark.parametrize("table", scaling.TABLES, ids=lambda table: table.__name__)
def test_page_has_the_table(table: object) -> None:
    assert table() in scaling.PAGE.read_text(), "write it anew: python -m tests.scaling"


@pytest.mark.parametrize("dtype", scaling.ELEMENT)
def test_formula_is_that_of_a_real_history(dtype: str) -> None:
    """To the byte, for a tensor that blocks of 128 fill."""
    param = paddle.create_parameter([64, 128], "float32")
    optimizer = ASGD(0.1, N, [param], history_dtype=None if dtype == "float32" else dtype)
    step_with(optimizer, 1.0)
    held = [value for key, value in optimizer.state_dict().items() if re.search(r"_(?:d|y|y_scale)_0$", key)]
    assert sum(value.numpy().nbytes for value in held) == scaling.history(64 * 128, N, dtype=dtype)


def test_largest_history_fits_and_one_more_batch_does_not() -> None:
    for parameters, all_divided in scaling.MODELS.values():
        for ranks in scaling.RANKS:
            for dtype in scaling.ELEMENT:
                n = scaling.largest_n(parameters, ranks, dtype, all_divided)
                beside = scaling.RESERVED + 2 * scaling.FLOAT * parameters / (ranks if all_divided else 1)
                fit = [
                    beside + scaling.history(parameters, n + more, ranks, dtype) <= scaling.MEMORY for more in (0, 1)
                ]
                assert fit == [n > 0, False]
