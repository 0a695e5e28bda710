# SPDX-License-Identifier: Apache-2.0
"""An update of an AveragedModel and its swap beside what one would take instead: ``python -m benchmarks.averages``.

On the CPU, in float32 and by one thread. Must not judge what is computed (tests/test_averaged_model.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import warnings
from typing import Any, Callable

with warnings.catch_warnings():
    # What Paddle says while it is imported: no ccache, a GPU build on a machine without a GPU.
    warnings.simplefilter("ignore")
    import paddle

    from paddle_asgd import AveragedModel, ema

from . import cases, floor, measure

DECAY = 0.999
MODELS = ("resnet50", "gpt2", "1000x64")
OURS, LOOP = "AveragedModel.update()", "one pass of C"
EFFORT = measure.Effort(rounds=15, seconds_a_turn=0.1)


class Parameters(paddle.nn.Layer):
    """A model of parameters alone."""

    def __init__(self, shapes: cases.Shapes) -> None:
        super().__init__()
        self.x = paddle.nn.ParameterList([self.create_parameter(shape) for shape in shapes])


def by_loop(params: list) -> Callable[[], None]:
    """The rule of PaddleDetection's ModelEMA: a loop over the tensors, in Paddle's operators."""
    state = {str(number): param for number, param in enumerate(params)}
    averages = {name: paddle.zeros_like(param) for name, param in state.items()}

    @paddle.no_grad()
    def update() -> None:
        for name, value in averages.items():
            value = DECAY * value + (1 - DECAY) * state[name]
            value.stop_gradient = True
            averages[name] = value

    return update


def by_torch(params: list) -> Callable[[], Any]:
    """The quickest of PyTorch's ways."""
    import torch

    torch.set_num_threads(1)
    values = [torch.from_numpy(param.numpy().copy()) for param in params]
    averages = [value.clone() for value in values]
    return lambda: torch._foreach_lerp_(averages, values, 1 - DECAY)


def time_model(name: str) -> None:
    """Print the rows of one model."""
    model = Parameters(cases.MODELS[name]())
    params = model.parameters()
    averaged = AveragedModel(model, ema(DECAY))
    averaged.update()
    contestants: dict[str, Callable[[], Any]] = {OURS: averaged.update}
    if floor.library() is not None:
        copies = [param.detach().clone() for param in params]
        contestants[LOOP], exchange = floor.averages_only(copies, params, 1 - DECAY)
    if importlib.util.find_spec("torch") is not None:
        contestants["torch._foreach_lerp_"] = by_torch(params)
    contestants["loop as in PaddleDetection"] = by_loop(params)
    print(f"{cases.TITLES[name]}: one update")
    report(contestants)
    if floor.library() is not None:

        def swap() -> None:
            averaged.apply()
            averaged.restore()

        def exchange_twice() -> None:
            exchange()
            exchange()

        print(f"{cases.TITLES[name]}: a swap in and out")
        report({"apply() and restore()": swap, "two exchanges of C": exchange_twice})


def report(contestants: dict[str, Callable[[], Any]]) -> None:
    """Ours is the first; of each the median of the rounds, and of the ratios within a round."""
    samples = measure.take_turns(list(contestants.values()), EFFORT)
    for name, times in zip(contestants, samples):
        low, ratio, high = statistics.quantiles([t / o for t, o in zip(times, samples[0])], n=4, method="inclusive")
        print(
            f"  {name:28} {statistics.median(times) * 1e3:9.3f} ms (least {min(times) * 1e3:.3f}), {ratio:6.2f} times "
            f"ours (quartiles {low:.2f} to {high:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.averages", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=MODELS, default=MODELS, help="only these")
    for name in parser.parse_args().case:
        time_model(name)


if __name__ == "__main__":
    main()
