# SPDX-License-Identifier: Apache-2.0
"""The optimizer's share of an iteration in three trainings, and whether the plan of a step changes a bit of them.

    python -m benchmarks.share                       # the shares, about a minute and a half
    python -m benchmarks.share --check               # 160 steps of each, planned and in full; times nothing

An iteration is a forward and a backward pass, ``step()`` and ``clear_grad()``. Times are of the processor and of the
thread that trains. Must not judge how well anything trains (recipe_networks.py).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
import warnings
from typing import Any, Callable, NamedTuple

# Before Paddle, which sets a variable that this reads.
from . import machine

with warnings.catch_warnings():
    # What Paddle says while it is imported: no ccache, a GPU build on a machine without a GPU.
    warnings.simplefilter("ignore")
    import paddle
    from paddle import nn

    from paddle_asgd import ASGD

from . import recipe_networks
from .contestants import BUILTIN, LEARNING_RATE, OURS
from .report import duration, head

BATCHES = 8
BATCH_SIZE = 64
CHECKED_STEPS = 160
#: For the check, where the small rate of the timings would hide a difference.
CHECKED_RATE = 0.01


class Training(NamedTuple):
    """A network, its batches, and for how many rounds each optimizer trains it two steps in turn with the others."""

    title: str
    network: Callable[[], nn.Layer]
    batches: Callable[[], list]
    rounds: int


def digits() -> list:
    """Batches of scikit-learn's digits."""
    images, labels = recipe_networks.load_data()[:2]
    starts = range(0, BATCHES * BATCH_SIZE, BATCH_SIZE)
    return [(images[start : start + BATCH_SIZE], labels[start : start + BATCH_SIZE]) for start in starts]


def images(batch_size: int = 32) -> list:
    """Batches of random images of 32 x 32 in three colours: what they show makes no difference to the time."""
    return [
        (paddle.randn([batch_size, 3, 32, 32]), paddle.randint(0, 10, [batch_size], "int64")) for _ in range(BATCHES)
    ]


TRAININGS = {
    "cnn": Training("digits, CNN", recipe_networks.cnn, digits, 150),
    "transformer": Training(
        "digits, transformer of nine layers", lambda: recipe_networks.Transformer(64, 9), digits, 40
    ),
    "resnet18": Training(
        "ResNet-18, 32 images of 32 x 32", lambda: paddle.vision.models.resnet18(num_classes=10), images, 8
    ),
}


def optimizers() -> dict[str, Callable[[list], Any]]:
    """Those that are compared, each made from parameters."""
    found: dict[str, Callable[[list], Any]] = {
        OURS: lambda params: ASGD(LEARNING_RATE, BATCHES, params),
        "paddle.optimizer.SGD": lambda params: paddle.optimizer.SGD(LEARNING_RATE, params),
        "paddle.optimizer.Adam": lambda params: paddle.optimizer.Adam(
            LEARNING_RATE, parameters=params, use_multi_tensor=True
        ),
        "paddle.optimizer.AdamW": lambda params: paddle.optimizer.AdamW(LEARNING_RATE, parameters=params),
    }
    if hasattr(paddle.optimizer, "ASGD"):
        found[BUILTIN] = lambda params: paddle.optimizer.ASGD(LEARNING_RATE, BATCHES, params)
    return found


def loop(training: Training, batches: list, make: Callable[[list], Any]) -> Callable[[], tuple[float, float]]:
    """A function that takes one iteration of a network's training, and returns the seconds of ``step()`` and of all."""
    paddle.seed(1)
    network = training.network()
    optimizer = make(network.parameters())
    coming = itertools.cycle(batches)

    def iterate() -> tuple[float, float]:
        inputs, labels = next(coming)
        begin = time.thread_time_ns()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        before = time.thread_time_ns()
        optimizer.step()
        after = time.thread_time_ns()
        optimizer.clear_grad()
        return (after - before) / 1e9, (time.thread_time_ns() - begin) / 1e9

    iterate.network, iterate.optimizer = network, optimizer
    return iterate


def time_shares(training: Training) -> None:
    """Print a row for each optimizer: its step, the iteration, and the share."""
    batches = training.batches()
    loops = {name: loop(training, batches, make) for name, make in optimizers().items()}
    for iterate in loops.values():
        for _ in range(2):
            iterate()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    gc.collect()
    gc.disable()
    try:
        for _ in range(training.rounds):
            for name, iterate in loops.items():
                # The one before has filled the caches with another network.
                iterate()
                taken[name].append(iterate())
    finally:
        gc.enable()
    params = next(iter(loops.values())).network.parameters()
    print(f"\n{training.title}: {len(params)} tensors, {sum(p.numel().item() for p in params):,} elements")
    print(f"  {'':28}{'step':>9} {'lowest 10 %':>12} {'iteration':>10} {'share':>7}")
    for name, times in taken.items():
        steps, whole = zip(*times)
        step, iteration = statistics.median(steps), statistics.median(whole)
        low = statistics.quantiles(steps, n=10, method="inclusive")[0]
        print(
            f"  {name:28}{duration(step):>9} {duration(low):>12} {duration(iteration):>10} {step / iteration:>7.2%}",
            flush=True,
        )


def check(training: Training, batches: list) -> None:
    """Train twice, by plans and in full, and compare the parameters bit by bit after all steps."""
    found = []
    for planned in (True, False):
        iterate = loop(training, batches, lambda params: ASGD(CHECKED_RATE, BATCHES, params))
        plans = 0
        for _ in range(CHECKED_STEPS):
            if not planned:
                iterate.optimizer._shortcut = None
            plans += iterate.optimizer._shortcut is not None
            iterate()
        found.append(([p.numpy().tobytes() for p in iterate.network.parameters()], plans))
    (left, plans), (right, none) = found
    differ = sum(a != b for a, b in zip(left, right))
    print(
        f"{training.title}: {plans} and {none} of {CHECKED_STEPS} steps planned, {differ} of {len(left)} tensors differ"
    )
    if differ or none or plans < CHECKED_STEPS - 2:
        raise SystemExit("the plan changes the training, or no step had one")


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.share", description="The optimizer's share of an iteration.")
    parser.add_argument("--training", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--check", action="store_true", help="compare planned and full steps, time nothing")
    options = parser.parse_args()
    if not options.check:
        print(head(machine.facts()))
    for name in options.training:
        training = TRAININGS[name]
        if options.check:
            check(training, images(4) if name == "resnet18" else training.batches())
        else:
            time_shares(training)


if __name__ == "__main__":
    main()
