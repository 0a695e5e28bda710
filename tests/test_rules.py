# SPDX-License-Identifier: Apache-2.0
"""The rules of averaging, beside numbers of other libraries (tests/data) and exact arithmetic."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import re
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

from paddle_asgd import ema, power_ema, swa
from paddle_asgd.averages.rules import check_rule, exponent, state_of, weight_of

PAGE = Path(__file__).parents[1] / "docs" / "averages.md"
DATA = json.loads((Path(__file__).parent / "data" / "averages.json").read_text())
WALK = np.array(DATA["weights"])
CASES = [(library, call) for library, calls in DATA["averages"].items() for call in calls]
#: paddledet computes in float32; of its exponential rule, which begins at zero, that has vanished after 5 updates.
TOLERANCE = {"paddledet": 3e-6}
BEGIN = {'ModelEMA(model, decay=d, ema_decay_type="exponential")': 5}

RULES = [
    ema(0.999),
    ema(0.0),
    ema(1.0),
    ema(0.97, debias=True),
    ema(0.97, warmup="ratio"),
    ema(0.97, warmup="ratio", debias=True),
    ema(1.0, warmup="ratio", debias=True),
    ema(0.05, warmup="ratio", debias=True),
    ema(0.999, warmup="inverse"),
    ema(0.97, warmup="inverse", inv_gamma=4, power=0.75, min_decay=0.5),
    ema(half_life=20),
    ema(half_life=1e9, warmup="ratio", debias=True),
    swa(),
    power_ema(0.05),
    power_ema(0.3),
]


def expressions() -> dict[str, str]:
    """What to write here, of each call in the table of docs/averages.md."""
    rows = re.findall(r"^\|[^|]*\| ([^|]*) \| `([^|`]*)` ", PAGE.read_text(), re.MULTILINE)
    return {call.replace("`", ""): expression for call, expression in rows}


def averages(rule: Callable[[int], float]) -> np.ndarray:
    """After each update, in float64."""
    average, rows = WALK[0], []
    for t in range(1, len(WALK)):
        average = average + weight_of(rule, t) * (WALK[t] - average)
        rows.append(average)
    return np.array(rows)


@pytest.mark.parametrize(("library", "call"), CASES, ids=[f"{library}: {call}" for library, call in CASES])
def test_numbers_of_other_libraries(library: str, call: str) -> None:
    """By the expressions that the documentation gives for them."""
    names = {"ema": ema, "swa": swa, "power_ema": power_ema, "math": math, **DATA["arguments"]}
    begin = BEGIN.get(call, 0)
    ours = averages(eval(expressions()[call], names))[begin:]
    np.testing.assert_allclose(
        ours, DATA["averages"][library][call][begin:], rtol=0, atol=TOLERANCE.get(library, 1e-14)
    )


def test_documented_calls_are_compared() -> None:
    assert len(CASES) == 16
    assert [call for _, call in CASES if call not in expressions()] == []


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.1, 0.5, 0.97, 0.999999, 1.0])
@pytest.mark.parametrize("warmup", [None, "ratio"])
def test_debias_is_the_mean_that_begins_at_zero(decay: float, warmup: str | None) -> None:
    """Against the definition, in rational numbers: the sum of weighted weights over the sum of their shares."""
    if decay == 1 and warmup is None:
        return  # refused, see below
    rule, product = ema(decay, warmup=warmup, debias=True), Fraction(1)
    for t in range(1, 200):
        kept = min(Fraction(decay), Fraction(t, t + 9)) if warmup else Fraction(decay)
        product *= kept
        assert rule.weight(t) == pytest.approx(float((1 - kept) / (1 - product)), rel=1e-15, abs=0)
    # In any order, as after a resume.
    assert [rule.weight(t) for t in (150, 3, 150)] == [rule.weight(t) for t in (150, 3, 150)]


def test_first_debiased_average_is_the_first_weights() -> None:
    assert [ema(d, debias=True).weight(1) for d in np.linspace(0, 0.999, 500)] == [1.0] * 500


@pytest.mark.parametrize("t", [1, 2, 3, 1000, 10**6, 10**9])
@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2887, 0.3])
def test_weight_of_power_function_is_precise(sigma_rel: float, t: int) -> None:
    """A subtraction from 1 would lose 9 of 16 digits at a billion updates."""
    rule = power_ema(sigma_rel)
    with localcontext() as context:
        context.prec = 60
        exact = 1 - (1 - Decimal(1) / t) ** (Decimal(rule.gamma) + 1) if t > 1 else Decimal(1)
    assert rule.weight(t) == pytest.approx(float(exact), rel=1e-15, abs=0)


def test_weight_of_a_half_life_is_precise() -> None:
    with localcontext() as context:
        context.prec = 60
        exact = 1 - Decimal(2) ** (Decimal(-1) / 10**9)
    assert ema(half_life=1e9).weight(1) == pytest.approx(float(exact), rel=1e-15, abs=0)
    assert ema(half_life=20)(7) ** 20 == pytest.approx(0.5, rel=1e-14)


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"),
    [(0.05, 16.97220), (0.075, 10.28912), (0.10, 6.93720), (0.15, 3.55787), (0.20, 1.82621), (0.25, 0.71982)],
)
def test_exponents_of_the_paper(sigma_rel: float, gamma: float) -> None:
    assert power_ema(sigma_rel).gamma == pytest.approx(gamma, abs=5e-6)


def test_exponent_is_the_largest_root() -> None:
    golden = (1 + math.sqrt(5)) / 2
    for sigma_rel in [*np.geomspace(1e-6, 0.3, 200), golden**-2.5]:
        gamma = exponent(sigma_rel)
        assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-14)
        # The width falls with gamma from here on, so there is no larger root.
        assert gamma >= golden - 2 - 1e-7
    assert exponent(golden**-2.5) == pytest.approx(golden - 2, abs=1e-7)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("update_every", [1, 10, 100])
def test_width_does_not_depend_on_update_every(sigma_rel: float, update_every: int) -> None:
    """The standard deviation of the times in the average, after 20,000 steps, within 1 % of what was asked for."""
    steps, rule = 20_000, power_ema(sigma_rel)
    shares = np.zeros(steps // update_every)
    for t in range(1, len(shares) + 1):
        shares *= rule(t)
        shares[t - 1] = rule.weight(t)
    times = np.arange(1, len(shares) + 1) * update_every
    mean = shares @ times
    assert shares.sum() == pytest.approx(1, rel=1e-12)
    assert math.sqrt(shares @ (times - mean) ** 2) / steps == pytest.approx(sigma_rel, rel=0.01)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_average_stays_within_what_it_saw(rule: Any) -> None:
    weights = [rule.weight(t) for t in [*range(1, 300), 10**4, 10**7, 10**12, 10**15]]
    assert all(0 <= weight <= 1 for weight in weights)
    assert [rule(t) for t in range(1, 300)] == [1 - weight for weight in weights[:299]]
    assert weight_of(rule, 7) == rule.weight(7)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_repr_state_and_copies(rule: Any) -> None:
    names = {"ema": ema, "swa": swa, "power_ema": power_ema}
    state = rule.state_dict()
    again = names[state.pop("rule")](**state)
    for other in (eval(repr(rule), names), pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule), again):
        assert other == rule
        assert hash(other) == hash(rule)
        assert [other.weight(t) for t in (1, 2, 50)] == [rule.weight(t) for t in (1, 2, 50)]
    assert state_of(rule) == rule.state_dict()
    assert {type(value) for value in state.values()} <= {float, str, bool, type(None)}


def test_rules_differ() -> None:
    assert [(a, b) for a, b in itertools.combinations(RULES, 2) if a == b] == []
    assert swa() != (lambda t: 1 - 1 / t)


def test_rule_of_the_users_own() -> None:
    assert check_rule("average", math.cos) is math.cos
    assert weight_of(lambda t: 1 - 1 / t, 4) == 0.25
    assert weight_of(lambda t: np.float32(0.5), 1) == 0.5
    assert state_of(lambda t: 0.5) is None
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"decay of update 3: received .*, expected a number from 0 to 1"):
            weight_of(lambda t, wrong=wrong: wrong, 3)
    for wrong in (None, "0.9", True):
        with pytest.raises(TypeError, match=r"decay of update 3: received .*, expected a number from 0 to 1"):
            weight_of(lambda t, wrong=wrong: wrong, 3)
    for wrong in (0.999, None, ema):
        with pytest.raises(TypeError, match=r"average: received .*, expected a rule such as ema\(0.999\)"):
            check_rule("average", wrong)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ema(), TypeError, "decay: received None, expected a number from 0 to 1; or pass half_life"),
        (
            lambda: ema(0.9, half_life=3),
            ValueError,
            "half_life: received 3 .*beside decay=0.9, expected one of the two",
        ),
        (lambda: ema(1.1), ValueError, "decay: received 1.1, expected a number from 0 to 1"),
        (lambda: ema(math.nan), ValueError, "decay: received nan"),
        (lambda: ema(True), TypeError, "decay: received True of type bool"),
        (lambda: ema("0.9"), TypeError, "decay: received '0.9' of type str"),
        (lambda: ema(half_life=0), ValueError, "half_life: received 0 .*above 0"),
        (lambda: ema(half_life=math.inf), ValueError, "half_life: received inf"),
        (lambda: ema(0.9, warmup="linear"), ValueError, "warmup: received 'linear'.*'inverse' or 'ratio'"),
        (lambda: ema(0.9, warmup=True), TypeError, "warmup: received True"),
        (lambda: ema(0.9, power=0.5), ValueError, "power: received 0.5 with warmup=None, expected nothing"),
        (lambda: ema(0.9, warmup="ratio", inv_gamma=2), ValueError, "inv_gamma: received 2.0 with warmup='ratio'"),
        (lambda: ema(0.9, min_decay=0.5), ValueError, "min_decay: received 0.5 with warmup=None"),
        (lambda: ema(0.9, warmup="inverse", min_decay=0.95), ValueError, "min_decay: .*at most the decay, 0.9"),
        (lambda: ema(0.9, warmup="inverse", power=0), ValueError, "power: received 0 .*above 0"),
        (lambda: ema(0.9, warmup="inverse", inv_gamma=-1), ValueError, "inv_gamma: received -1"),
        (lambda: ema(0.9, warmup="inverse", debias=True), ValueError, "debias: .*the first decay is 0"),
        (lambda: ema(1.0, debias=True), ValueError, "debias: .*expected a decay below 1"),
        (lambda: ema(0.9, debias=1), TypeError, "debias: received 1 of type int"),
        (lambda: power_ema(0), ValueError, "sigma_rel: received 0 .*above 0"),
        (lambda: power_ema(0.3003), ValueError, "sigma_rel: received 0.3003 .*at most 0.30028"),
        (lambda: power_ema(None), TypeError, "sigma_rel: received None"),
        (lambda: ema(0.9)(0), ValueError, "t: received 0, expected an int of at least 1"),
        (lambda: swa()(1.0), TypeError, "t: received 1.0"),
        (lambda: power_ema(0.1).weight(True), TypeError, "t: received True"),
    ],
)
def test_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{words}"):
        call()
