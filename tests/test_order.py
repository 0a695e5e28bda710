# SPDX-License-Identifier: Apache-2.0
"""What an order of the batches asks of a learning rate, and which order is told from the batches' numbers."""

from __future__ import annotations

import numpy as np
import pytest

from paddle_asgd.sag.order import OrderSeen, cyclic_limit


@pytest.mark.parametrize(("theta", "expected"), [(None, np.pi**2 / 2), (0.3, 13.163), (1e9, 2 * np.pi**2)])
def test_limit_of_a_fixed_order(theta: float | None, expected: float) -> None:
    assert cyclic_limit(theta) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("theta", [0.05, 0.3, 1.0])
def test_limit_of_a_fixed_order_is_a_root_on_the_unit_circle(theta: float) -> None:
    """The recursion of one curvature: its largest root is 1 in size at the limit, and above it larger."""
    n, s = 2000, cyclic_limit(theta) / 2000

    def size_at(step: float) -> float:
        # z^(n+1) - z^n + step * (theta * (z^n - 1) + mean of 1, z, ..., z^(n-1)), followed by Newton's method.
        phi = np.sqrt(2 * cyclic_limit(theta))
        z, powers = np.exp(1j * phi / n), np.arange(n)
        for _ in range(20):
            mean, slope = (z**powers).mean(), (powers[1:] * z ** powers[:-1]).sum() / n
            value = z ** (n + 1) - z**n + step * (theta * (z**n - 1) + mean)
            z = z - value / ((n + 1) * z**n - n * z ** (n - 1) + step * (theta * n * z ** (n - 1) + slope))
        return abs(z)

    # The limit is that of large n: off by about 1 / n.
    assert size_at(0.98 * s) < 1 < size_at(1.02 * s)


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([0, 1, 2, 0, 1, 2, 0], [None] * 5 + ["sequential", None]),
        ([2, 0, 1, 0, 1, 2, 0], [None] * 5 + ["reshuffle", None]),
        ([2, 0, 0, 1, 2, 0, 1, 2], [None] * 8),
        ([0, 1, 2, 0, 2, 2, 0, 1, 2], [None] * 9),
    ],
    ids=["sequential", "reshuffle", "replacement", "replacement_later"],
)
def test_order_seen(indices: list[int], expected: list[str | None]) -> None:
    seen = OrderSeen(3)
    assert [seen.add(index) for index in indices] == expected
