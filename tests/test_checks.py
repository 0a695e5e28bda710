# SPDX-License-Identifier: Apache-2.0
"""Bad arguments that are ASGD's own: ``batch_num``, ``theta``, the step in a checkpoint; and a history without room."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest
from refusing import INF, NAN, Row, assert_constructor_refuses, assert_refused, given, named, table
from trial import Trial

from paddle_asgd import ASGD
from paddle_asgd.free_memory import free_memory
from paddle_asgd.sag import checks

COUNT = {
    "none": (None, ValueError, "None"),
    "zero": (0, ValueError, "0"),
    "negative": (-1, ValueError, "-1"),
    "bool": (True, TypeError, "True"),
    "whole_float": (3.0, TypeError, "3.0"),
    "float": (2.5, TypeError, "2.5"),
    "string": ("3", TypeError, "'3'"),
    "nan": (NAN, TypeError, "nan"),
    "inf": (INF, TypeError, "inf"),
    "numpy_float": (np.float32(3), TypeError, "3.0"),
    "numpy_zero": (np.int64(0), ValueError, "0"),
    "no_memory_for_it": (2**42, ValueError, str(2**42)),
    "no_address_for_it": (2**61, ValueError, str(2**61)),
    "no_int64_for_it": (2**70, ValueError, str(2**70)),
}
CONSTRUCTOR = {
    **{f"batch_num_{key}": (given(batch_num=v), e, "batch_num", t) for key, (v, e, t) in COUNT.items()},
    "batch_num_float_tensor": (lambda p, q: {"batch_num": paddle.to_tensor(3.0)}, TypeError, "batch_num", "float32"),
    "batch_num_bool_tensor": (lambda p, q: {"batch_num": paddle.to_tensor(True)}, TypeError, "batch_num", "bool"),
}


@table(CONSTRUCTOR)
def test_constructor(row: Row) -> None:
    assert_constructor_refuses(row)


def test_a_history_larger_than_the_free_memory() -> None:
    """Just above what is free, where the machine as a whole could hold it: the step would end the process."""
    param = named("first", [1024, 1024])
    free = free_memory()
    slots = int(free * 1.05) // (4 * 1024 * 1024)
    assert_refused(lambda: ASGD(0.1, slots, [param]), ValueError, ["batch_num", str(slots), "GiB"])
    ASGD(0.1, slots // 2, [param])


def test_memory_is_checked() -> None:
    small, large = named("small", [4]), named("large", [1024, 1024])
    slots = int(free_memory() * 1.05) // (4 * 1024 * 1024)
    optimizer = ASGD(0.1, slots, [small])
    assert_refused(lambda: optimizer.add_param_group({"params": [large]}), ValueError, ["batch_num", "GiB"])


#: 1,000 float32 numbers in 8 blocks are not narrow, and 8,192 in 64 blocks are; 10 slots of both.
EXACT, INT16, INT8 = (10 * size for size in (4 * 9_192, 4_000 + 2 * 8_192 + 4 * 64, 4_000 + 8_192 + 4 * 64))
SUGGESTIONS = {
    "int16": ({}, EXACT, INT16, "history_dtype='int16' takes"),
    "int8": ({}, EXACT, INT16 - 1, "history_dtype='int8' takes"),
    "none": ({}, EXACT, INT8 - 1, "history_dtype='int8' takes 0.0 GiB and does not fit either"),
    "int8_of_int16": ({"history_dtype": "int16"}, INT16, INT8, "history_dtype='int8' takes"),
    "none_of_int8": ({"history_dtype": "int8"}, INT8, 0, "does not fit either"),
}


@pytest.mark.parametrize("case", SUGGESTIONS)
@pytest.mark.parametrize("as_groups", [False, True], ids=["list", "groups"])
def test_the_history_dtype_that_would_fit(case: str, as_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused one byte before it fits; the widest that fits is named."""
    options, needed, free, text = SUGGESTIONS[case]
    params = [named("small", [1000]), named("large", [64, 128])]
    given = [{"params": [param], **options} for param in params] if as_groups else params
    arguments = {} if as_groups else options
    monkeypatch.setattr(checks, "free_memory", lambda: free)
    assert_refused(lambda: ASGD(0.1, 10, given, **arguments), ValueError, ["batch_num: received 10", text, "larger"])
    monkeypatch.setattr(checks, "free_memory", lambda: needed - 1)
    assert_refused(lambda: ASGD(0.1, 10, given, **arguments), ValueError, ["batch_num: received 10"])
    monkeypatch.setattr(checks, "free_memory", lambda: needed)
    ASGD(0.1, 10, given, **arguments)
    if "either" not in text:
        monkeypatch.setattr(checks, "free_memory", lambda: free)
        ASGD(0.1, 10, params, history_dtype=text[len("history_dtype='") :].split("'")[0])


def test_no_history_dtype_helps_a_single_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda: 4 * 8192 - 1)
    with pytest.raises(ValueError, match="batch_num: received 1, which takes") as caught:
        ASGD(0.1, 1, [named("large", [64, 128])])
    assert "history_dtype" not in str(caught.value)


def test_edited_groups_are_checked_with_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before their first step; the group as it was would fit."""
    optimizer = ASGD(0.1, 10, [{"params": [named("large", [64, 128])], "history_dtype": "int8"}])
    monkeypatch.setattr(checks, "free_memory", lambda: INT8)
    optimizer.param_groups[0]["history_dtype"] = "int16"
    optimizer._parameter_list[0].grad = paddle.ones([64, 128])
    assert_refused(optimizer.step, ValueError, ["batch_num: received 10", "history_dtype='int8' takes"])
    optimizer.param_groups[0]["history_dtype"] = "int8"
    optimizer.step()


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_damaged_theta_step_is_refused(step: Any) -> None:
    trial = Trial(n=3, theta=lambda step: 1.0)
    trial.sag.theta = 1.0
    trial.step()
    with pytest.raises(ValueError, match="'theta_step': received"):
        trial.optimizer.set_state_dict({**trial.optimizer.state_dict(), "theta_step": step})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"theta": -0.1}, ValueError, "theta: received -0.1, expected a finite number of at least 0"),
        ({"theta": math.nan}, ValueError, "theta: received nan"),
        (
            {"theta": "1"},
            TypeError,
            "theta: received '1' of type str, expected a number, a callable of the step, or None",
        ),
        ({"theta": True}, TypeError, "theta: received True"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ASGD(0.1, 3, [paddle.create_parameter([2], "float32")], **options)
