# SPDX-License-Identifier: Apache-2.0
"""What batch_index, batch_weights and the watch add to a step, together: ``python -m benchmarks.options``.

Where memory happens to lie moves a step by more than they cost. So large tensors are shared by both optimizers, small
ones are made anew several times, and a pair of neighbouring turns gives one ratio. Must not compare with anybody else
(contestants.py).
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
from .contestants import LEARNING_RATE, Tensors

BATCHES = cases.REFERENCE_BATCHES
EFFORT = measure.Effort(rounds=21, seconds_a_turn=0.03)
#: From so many elements on, it is the tensors that do not fit into a cache, and not their descriptions.
LARGE = 10_000_000
#: How often small tensors are made anew.
TIMES = 7


def pair(case: cases.Case) -> list:
    """A plain step and a step with everything."""
    tensors = Tensors(case)
    weights = [1.0] * (BATCHES - 1) + [0.5]
    plain = ASGD(LEARNING_RATE, BATCHES, tensors.paddle, watch=False)
    equipped = ASGD(LEARNING_RATE, BATCHES, tensors.paddle, batch_weights=weights)
    count = 0

    def step() -> None:
        nonlocal count
        equipped.batch_index = count % BATCHES
        count += 1
        equipped.step()

    plain.step()
    step()
    if case.numel >= LARGE:
        for name in ("d", "y"):
            equipped._accumulators[name] = plain._accumulators[name]
        equipped._shortcut = None
    for _ in range(2 * BATCHES):
        plain.step()
        step()
    return [plain.step, step]


def main() -> None:
    print(f"paddle {paddle.__version__}, float32, n={BATCHES}: a step with batch_index, batch_weights and the watch")
    for model, title in cases.TITLES.items():
        case = cases.Case(model, "float32", cases.MODELS[model])
        ratios, times = [], []
        for _ in range(1 if case.numel >= LARGE else TIMES):
            plain, equipped = measure.take_turns(pair(case), EFFORT)
            ratios += [more / less for more, less in zip(equipped, plain)]
            times += plain
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(
            f"  {title:46} {statistics.median(times) * 1e3:8.3f} ms  {middle - 1:+6.1%}  "
            f"(quartiles {low - 1:+.1%} to {high - 1:+.1%})"
        )


if __name__ == "__main__":
    main()
