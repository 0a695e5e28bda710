# SPDX-License-Identifier: Apache-2.0
"""Writes torch_asgd.json, the numbers of torch.optim.ASGD: ``python tests/data/make_torch_asgd.py`` where torch is.

Must not import this package. The file holds the problem, too, so that whoever reads it needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

#: What the constructor is given, by the names of torch.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "lambd": {"lambd": 0.1},
    "lr": {"lr": 0.02},
    "t0 100": {"t0": 100},
    "t0 0": {"t0": 0},
    "t0 5": {"t0": 5, "lr": 0.1, "lambd": 0.5, "alpha": 1},
    "maximize": {"maximize": True},
    "weight_decay": {"weight_decay": 0.1},
    "maximize weight_decay": {"maximize": True, "weight_decay": 0.1},
    "all": {"t0": 4, "lr": 0.05, "lambd": 0.3, "alpha": 0.6, "maximize": True, "weight_decay": 0.1},
}
STEPS, BATCHES = 40, 3
#: After which steps x and ax are written down.
KEPT = (1, 2, 3, 4, 5, 6, 7, 8, 15, 40)
#: By what the learning rate is multiplied, in turn.
FACTORS = (1.0, 0.5, 0.25, 2.0, 1.5)
#: The second parameter has no gradient in these steps, and so a clock of its own.
WITHOUT = (0, 1, 5)


def numbers(seed: int, count: int, low: float, high: float) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)).tolist()


def problem() -> dict[str, Any]:
    """Two parameters; the gradient of batch k is a_k * x - c_k."""
    sizes = (3, 2)
    return {
        "start": [numbers(i, size, -1, 2) for i, size in enumerate(sizes)],
        "a": [[numbers(10 + 2 * k + i, size, 0.25, 1.5) for i, size in enumerate(sizes)] for k in range(BATCHES)],
        "c": [[numbers(20 + 2 * k + i, size, -1, 2) for i, size in enumerate(sizes)] for k in range(BATCHES)],
    }


def run(given: dict[str, Any], options: dict[str, Any], changing: bool) -> list[dict[str, Any]]:
    """What is written down of one run."""
    x = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in given["start"]]
    optimizer = torch.optim.ASGD(x, foreach=False, **options)
    rate = optimizer.param_groups[0]["lr"]
    kept = []
    for step in range(STEPS):
        for i, value in enumerate(x):
            a, c = (torch.tensor(given[kind][step % BATCHES][i], dtype=torch.float64) for kind in "ac")
            value.grad = None if i == 1 and step in WITHOUT else a * value.detach() - c
        optimizer.param_groups[0]["lr"] = rate * FACTORS[step % len(FACTORS)] if changing else rate
        optimizer.step()
        if step + 1 in KEPT:
            states = [optimizer.state[value] for value in x]
            ax = [state["ax"].tolist() if "ax" in state else None for state in states]
            kept.append({"steps": step + 1, "x": [value.tolist() for value in x], "ax": ax})
    return kept


def main() -> None:
    given = problem()
    runs = []
    for dtype in (torch.float64, torch.float32):
        # Of eta and mu, which torch keeps in its default dtype.
        torch.set_default_dtype(dtype)
        for name, options in CASES.items():
            for changing in (False, True):
                if dtype == torch.float64 or name == "all":
                    kept = run(given, options, changing)
                    scalars = str(dtype).removeprefix("torch.")
                    runs.append(
                        {"name": name, "options": options, "changing": changing, "scalars": scalars} | {"kept": kept}
                    )
    facts = {"torch": torch.__version__, "factors": FACTORS, "without": WITHOUT, "problem": given, "runs": runs}
    Path(__file__).with_name("torch_asgd.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
