# SPDX-License-Identifier: Apache-2.0
"""The largest stable learning rate of the recipe on several sets of samples, beside SGD's on the same batches.

    python -m benchmarks.recipe_limits                # two minutes
    python -m benchmarks.recipe_limits --sets digits "synthetic, batches of 64"

Must not hold the method, nor how the limit is found (examples/stability.py).
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn import datasets

from examples.stability import Columns, largest_stable, load_patches

from .recipe_problems import pixels, standardised, synthetic

NUMBERS = (10, 35, 200, 1600)
THETAS = (None, 0.2, 0.3, 0.4)


class Sgd(Columns):
    """Plain SGD, which keeps nothing."""

    def step(self, i: int, g: np.ndarray) -> None:
        self.x -= self.rates * g


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.recipe_limits", description="Find the largest stable learning rates.")
    # Each set with the size of a batch, or with None where all rows are dealt to n batches.
    sets = {
        "breast cancer": (standardised(datasets.load_breast_cancer().data), None),
        "digits": (pixels()[0], None),
        "synthetic": (synthetic(8000, 60, 3)[0], None),
        "synthetic, batches of 16": (synthetic(16 * max(NUMBERS), 60, 3)[0], 16),
        "synthetic, batches of 64": (synthetic(64 * max(NUMBERS), 60, 3)[0], 64),
        "photograph": (load_patches(16 * max(NUMBERS)), 16),
    }
    parser.add_argument("--sets", nargs="+", choices=sets, default=list(sets), help="only these")
    chosen = parser.parse_args().sets
    print(f"| data | n | rows in a batch | {' | '.join('SAG' if t is None else f'theta {t}' for t in THETAS)} | SGD |")
    print("|---" * (4 + len(THETAS)) + "|")
    for name in chosen:
        rows, batch_size = sets[name]
        shuffled = np.random.default_rng(0).permutation(rows)
        for n in NUMBERS:
            size = batch_size or len(rows) // n
            if size == 0:
                continue
            batches = shuffled[: n * size].reshape(n, size, -1)
            limits = largest_stable(batches, "reshuffle", THETAS)
            sgd = largest_stable(batches, "reshuffle", [None], method=Sgd)
            cells = " | ".join(f"{value:.2g}" for value in [*limits, *sgd])
            print(f"| {name} | {n} | {size} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
