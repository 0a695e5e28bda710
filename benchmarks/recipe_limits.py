# SPDX-License-Identifier: Apache-2.0
"""The largest stable learning rate of the recipe on four data sets, beside SGD's on the same batches.

    python -m benchmarks.recipe_limits

Must not hold the method, nor how the limit is found (examples/stability.py).
"""

from __future__ import annotations

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
    sets = {
        "breast cancer": standardised(datasets.load_breast_cancer().data),
        "digits": pixels()[0],
        "synthetic": synthetic(8000, 60, 3)[0],
        "photograph": load_patches(16 * max(NUMBERS)),
    }
    print(f"| data | n | rows in a batch | {' | '.join('SAG' if t is None else f'theta {t}' for t in THETAS)} | SGD |")
    print("|---" * (4 + len(THETAS)) + "|")
    for name, rows in sets.items():
        shuffled = np.random.default_rng(0).permutation(rows)
        for n in NUMBERS:
            # The photograph has enough rows for batches of 16 whatever n is.
            size = 16 if name == "photograph" else len(rows) // n
            if size == 0:
                continue
            batches = shuffled[: n * size].reshape(n, size, -1)
            limits = largest_stable(batches, "reshuffle", THETAS)
            sgd = largest_stable(batches, "reshuffle", [None], method=Sgd)
            cells = " | ".join(f"{value:.2g}" for value in [*limits, *sgd])
            print(f"| {name} | {n} | {size} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
