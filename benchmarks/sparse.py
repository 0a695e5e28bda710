# SPDX-License-Identifier: Apache-2.0
"""A step on a table with a sparse gradient beside one with a dense gradient: ``python -m benchmarks.sparse``.

``optimizer.step()`` alone, on the CPU. What a sparse gradient saves in the backward pass is not counted. Must not
compare with anybody else (contestants.py).
"""

from __future__ import annotations

import statistics
import warnings

with warnings.catch_warnings():
    # What Paddle says while it is imported: no ccache, a GPU build on a machine without a GPU.
    warnings.simplefilter("ignore")
    import paddle

    from paddle_asgd import ASGD

from . import cases, measure
from .contestants import LEARNING_RATE

HEIGHT, WIDTH = 50_000, 128
#: How many rows of the table a batch names.
NAMED = (64, 1_024, HEIGHT)
EFFORT = measure.Effort(rounds=21, seconds_a_turn=0.03)


def pair(named: int) -> list:
    """A step with a sparse gradient, and one with a dense gradient."""
    rows = paddle.randperm(HEIGHT)[:named]
    optimizers = []
    for sparse in (True, False):
        table = paddle.nn.Embedding(HEIGHT, WIDTH, sparse=sparse)
        table(rows).square().sum().backward()
        optimizers.append(ASGD(LEARNING_RATE, cases.REFERENCE_BATCHES, table.parameters()))
    for optimizer in optimizers:
        for _ in range(2 * cases.REFERENCE_BATCHES):
            optimizer.step()
    return [optimizer.step for optimizer in optimizers]


def main() -> None:
    print(
        f"paddle {paddle.__version__}, float32, n={cases.REFERENCE_BATCHES}: Embedding({HEIGHT}, {WIDTH}, sparse=True)"
    )
    for named in NAMED:
        sparse, dense = measure.take_turns(pair(named), EFFORT)
        low, middle, high = statistics.quantiles([s / d for s, d in zip(sparse, dense)], n=4, method="inclusive")
        print(
            f"  {named:6} rows {statistics.median(sparse) * 1e3:8.3f} ms, dense "
            f"{statistics.median(dense) * 1e3:8.3f} ms  {middle:.2f} x  (quartiles {low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
