# SPDX-License-Identifier: Apache-2.0
"""Writes post_hoc.json: weights of snapshots, and averages made of them, by ema-pytorch 0.8.3, in float64.

Its authors wrote algorithm 3 of arXiv 2312.02696 anew; the licence of EDM2's own code forbids a copy. The weights here
are divided by their sum, as EDM2 does. Needs torch and ema-pytorch, which the tests do not.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma, solve_weights

STEPS, WIDTHS = 8000, (0.05, 0.10)
TIMES = [STEPS * (i + 1) // 8 for i in range(8)]
TARGETS = [(8000, 0.075), (8000, 0.15), (8000, 0.2), (8000, 0.03), (6500, 0.08), (4000, 0.05), (8000, 0.1)]


def averages(walk: np.ndarray, width: float) -> dict[int, float]:
    """The average of this width, at each of the snapshots' times."""
    gamma, average, kept = sigma_rel_to_gamma(width), 0.0, {}
    for t, x in enumerate(walk.tolist(), 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * x
        if t in TIMES:
            kept[t] = average
    return kept


if __name__ == "__main__":
    walk = np.cumsum(np.random.RandomState(3).standard_normal(STEPS)) / STEPS**0.5
    stored = {width: averages(walk, width) for width in WIDTHS}
    times, widths = zip(*((t, width) for t in TIMES for width in WIDTHS))
    values = [stored[width][t] for t, width in zip(times, widths)]
    gammas = torch.tensor([sigma_rel_to_gamma(width) for width in widths], dtype=torch.float64)
    cases = []
    for at, sigma_rel in TARGETS:
        target = torch.tensor([sigma_rel_to_gamma(sigma_rel)], dtype=torch.float64)
        solved = solve_weights(torch.tensor(times), gammas, torch.tensor([at]), target)
        weights = solved.flatten().numpy() / solved.sum().item()
        case = {"at": at, "sigma_rel": sigma_rel, "value": float(weights @ np.array(values))}
        cases.append({**case, "weights": weights.tolist()})
    snapshots = {"t": times, "sigma_rel": widths, "values": values}
    text = f'{{\n "snapshots": {json.dumps(snapshots)},\n "cases": [\n  '
    text += ",\n  ".join(json.dumps(case) for case in cases) + "\n ]\n}\n"
    Path(__file__).with_name("post_hoc.json").write_text(text)
