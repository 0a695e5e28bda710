# SPDX-License-Identifier: Apache-2.0
"""posthoc_weights: how snapshots of power-function averages add up to one of another width.

Must not know where snapshots are kept nor what they are of (post_hoc.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..arguments import check_positive, is_tensor, shown
from .rules import check_width, exponent


def posthoc_weights(
    snapshot_t: Sequence[float], snapshot_sigma_rel: Sequence[float], at: float, sigma_rel: float
) -> np.ndarray:
    r"""Return the weights with which snapshots of power-function averages add up to one of another width.

    .. math::

        w = \frac{A^{-1} b}{\sum A^{-1} b}, \quad A_{ij} = \langle i, j \rangle, \quad
            b_i = \langle i, \text{target} \rangle, \quad
            \langle i, j \rangle = \frac{(\gamma_i + 1)(\gamma_j + 1)}{\gamma_i + \gamma_j + 1}
            \frac{(t_i / t_j)^e}{\max(t_i, t_j)}, \quad e = \begin{cases} \gamma_j & t_i < t_j \\ -\gamma_i \end{cases}

    where the brackets are the integral of the product of two profiles. The average is then ``sum(w * snapshots)``: of
    all such sums the one whose profile is nearest to the target's. A target that is a snapshot itself gets that
    snapshot. Of random walks of 8,000 steps, 8 snapshots of the widths 0.05 and 0.10 gave the widths 0.06 to 0.12 at
    the time of the last to 0.1 % of the average, 0.15 to 0.3 %, 0.20 to 1.2 %, 0.25 to 4.5 %, and 0.03 to 1 %. Between
    the times of two snapshots the error is ten times larger.

    Args:
        snapshot_t: the times of the snapshots, above 0, in any unit, such as updates or training samples.
        snapshot_sigma_rel: their widths, as many. No two snapshots have the same time and width.
        at: the time of the target, above 0 and at most that of the last snapshot.
        sigma_rel: the width of the target, as in ``power_ema``.

    Returns:
        As many float64 numbers, which sum to 1. Some are below 0.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is out of range, the lists differ in length, are empty, or hold a snapshot twice.

    Examples:
        >>> from paddle_asgd import posthoc_weights
        >>> weights = posthoc_weights([500, 500, 1000, 1000], [0.05, 0.10, 0.05, 0.10], at=1000, sigma_rel=0.08)
        >>> weights.round(3).tolist()
        [0.0, -0.003, 0.258, 0.744]

    Source: T. Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, appendix
    C, algorithm 3.
    """
    times = check_list("snapshot_t", snapshot_t)
    widths = check_list("snapshot_sigma_rel", snapshot_sigma_rel)
    if len(times) != len(widths):
        raise ValueError(
            f"snapshot_sigma_rel: received {len(widths)} widths, expected {len(times)}, one for each of snapshot_t"
        )
    gammas = np.array([exponent(check_width(f"snapshot_sigma_rel[{i}]", width)) for i, width in enumerate(widths)])
    if len(set(zip(times, widths))) != len(times):
        raise ValueError("snapshot_t: received a time and width for the second time, expected each snapshot once")
    at, gamma = check_positive("at", at), exponent(check_width("sigma_rel", sigma_rel))
    if at > max(times):
        raise ValueError(f"at: received {at:g}, expected at most {max(times):g}, the time of the last snapshot")
    times = np.array(times)
    products = _products(times, gammas, times, gammas)
    # With profiles of norm 1 the matrix is as regular as it can be. Snapshots close together leave it nearly singular;
    # least squares then takes the smallest weights, where a solution would take huge ones of both signs.
    norms = np.sqrt(products.diagonal())
    target = _products(times, gammas, np.array([at]), np.array([gamma]))[:, 0]
    weights = np.linalg.lstsq(products / np.outer(norms, norms), target / norms, rcond=None)[0] / norms
    return weights / weights.sum()


def _products(t: np.ndarray, gamma: np.ndarray, other_t: np.ndarray, other_gamma: np.ndarray) -> np.ndarray:
    """The integrals of the products of profiles, each of the first with each of the others."""
    t, gamma = t[:, None], gamma[:, None]
    powers = (t / other_t) ** np.where(t < other_t, other_gamma, -gamma)
    return (gamma + 1) * (other_gamma + 1) * powers / ((gamma + other_gamma + 1) * np.maximum(t, other_t))


def check_list(argument: str, values: Any) -> list[float]:
    if is_tensor(values) or isinstance(values, (str, dict)) or not isinstance(values, Iterable):
        raise TypeError(f"{argument}: received {shown(values)}, expected a list of numbers")
    numbers = [check_positive(f"{argument}[{i}]", value) for i, value in enumerate(values)]
    if not numbers:
        raise ValueError(f"{argument}: received an empty list, expected a number for each snapshot")
    return numbers
