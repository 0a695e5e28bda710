# SPDX-License-Identifier: Apache-2.0
"""posthoc_weights: the weights of ema-pytorch (tests/data), and the integrals that they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddle_asgd import posthoc_weights, power_ema

DATA = json.loads((Path(__file__).parent / "data" / "post_hoc.json").read_text())
TIMES, WIDTHS = DATA["snapshots"]["t"], DATA["snapshots"]["sigma_rel"]


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda case: f"{case['sigma_rel']} at {case['at']}")
def test_weights_and_values_of_ema_pytorch(case: dict[str, Any]) -> None:
    weights = posthoc_weights(TIMES, WIDTHS, case["at"], case["sigma_rel"])
    np.testing.assert_allclose(weights, case["weights"], rtol=0, atol=1e-12)
    assert weights @ np.array(DATA["snapshots"]["values"]) == pytest.approx(case["value"], rel=1e-13)
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    assert weights.dtype == np.float64


def test_unit_and_order_of_times_do_not_matter() -> None:
    weights = posthoc_weights(TIMES, WIDTHS, 8000, 0.15)
    order = np.random.RandomState(0).permutation(len(TIMES))
    mixed = posthoc_weights([TIMES[i] * 2.5 for i in order], [WIDTHS[i] for i in order], 20_000, 0.15)
    np.testing.assert_allclose(mixed, weights[order], atol=1e-12)


def test_a_snapshot_is_its_own_reconstruction() -> None:
    for i in (0, 3, 15):
        expected = np.eye(len(TIMES))[i]
        np.testing.assert_allclose(posthoc_weights(TIMES, WIDTHS, TIMES[i], WIDTHS[i]), expected, atol=1e-12)


def test_no_other_sum_is_nearer() -> None:
    """Of the profiles, integrated numerically: the best sum of the form that the weights have."""
    times, widths, target = [300, 300, 1000, 1000], [0.08, 0.2, 0.08, 0.2], (900, 0.12)
    middles = np.arange(200_000) / 200 + 1 / 400

    def profile(t: float, width: float) -> np.ndarray:
        gamma = power_ema(width).gamma
        return np.where(middles < t, (gamma + 1) * middles**gamma / t ** (gamma + 1), 0)

    basis = np.array([profile(*each) for each in zip(times, widths)])
    solved = np.linalg.lstsq(basis.T, profile(*target), rcond=None)[0]
    np.testing.assert_allclose(posthoc_weights(times, widths, *target), solved / solved.sum(), atol=2e-5)


def test_snapshots_close_together() -> None:
    """Nearly the same equations twice must not give huge weights of both signs."""
    times = [1000.0, 1000.0 + 1e-10, 1000.0 + 2e-10, 500.0]
    weights = posthoc_weights(times, [0.1, 0.1, 0.1, 0.05], 1000, 0.08)
    assert abs(weights).max() < 2
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([], [], 1, 0.1), ValueError, r"snapshot_t: received an empty list"),
        (([1, 2], [0.1], 1, 0.1), ValueError, "snapshot_sigma_rel: received 1 widths, expected 2"),
        (([1, 1], [0.1, 0.1], 1, 0.1), ValueError, "snapshot_t: .*for the second time"),
        (([0, 1], [0.1, 0.1], 1, 0.1), ValueError, r"snapshot_t\[0\]: received 0"),
        (("12", [0.1, 0.1], 1, 0.1), TypeError, "snapshot_t: received '12'"),
        (([1, 2], 0.1, 1, 0.1), TypeError, "snapshot_sigma_rel: received 0.1"),
        (([1, 2], [0.1, 0.5], 1, 0.1), ValueError, r"snapshot_sigma_rel\[1\]: received 0.5 .*at most 0.30028"),
        (([1, 2], [0.1, 0.1], 3, 0.1), ValueError, "at: received 3, expected at most 2"),
        (([1, 2], [0.1, 0.1], None, 0.1), TypeError, "at: received None"),
        (([1, 2], [0.1, 0.1], 2, 0.4), ValueError, "sigma_rel: received 0.4"),
    ],
)
def test_weights_refused(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{words}"):
        posthoc_weights(*arguments)
