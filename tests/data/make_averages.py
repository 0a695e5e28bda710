# SPDX-License-Identifier: Apache-2.0
"""Writes averages.json: one random walk, and the averages of it that other libraries compute, in float64.

``python tests/data/make_averages.py LIBRARY ...``, with the names of the functions below; without one, all of them.
Needs the libraries, which the tests do not: torch 2.13.0, timm 1.0.31, diffusers 0.42.1, ema-pytorch 0.8.3,
tensorflow-cpu 2.21.0, and, with Paddle, paddledet 2.6.0. Must not import paddle_asgd, which is judged by its output.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("averages.json")
UPDATES, D, S = 40, 0.97, 0.1
#: The weights before the first update, and after each of the 40 steps.
WALK = np.cumsum(np.random.RandomState(40).standard_normal((UPDATES + 1, 3)), axis=0)
#: The arguments of the warm-up that all libraries have that have one.
GAMMA, POWER, LEAST = 4.0, 0.75, 0.5
Averages = Iterator[tuple[str, list]]


def torch_model() -> Any:
    """A model of one parameter that holds the weights before the first update."""
    import torch

    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor(WALK[0]))
    return model


def followed(model: Any, update: Any, average: Any) -> list:
    """The average after each update, where update and average are functions of the update's number and of nothing."""
    import torch

    rows = []
    for t in range(1, UPDATES + 1):
        with torch.no_grad():
            model.weight.copy_(torch.tensor(WALK[t]))
        update(t)
        rows.append(average().detach().numpy().tolist())
    return rows


def timm() -> Averages:
    from timm.utils.model_ema import ModelEmaV3

    def run(with_step: bool, **options: Any) -> list:
        model = torch_model()
        ema = ModelEmaV3(model, decay=D, **options)
        return followed(model, lambda t: ema.update(model, step=t if with_step else None), lambda: ema.module.weight)

    yield "ModelEmaV3(model, decay=d), update(model)", run(False)
    yield "ModelEmaV3(model, decay=d), update(model, t)", run(True)
    yield "ModelEmaV3(model, decay=d, use_warmup=True), update(model, t)", run(True, use_warmup=True)
    options = {"use_warmup": True, "warmup_gamma": GAMMA, "warmup_power": POWER, "min_decay": LEAST}
    yield "the same with warmup_gamma=g, warmup_power=p, min_decay=m", run(True, **options)


def diffusers() -> Averages:
    from diffusers.training_utils import EMAModel

    def run(**options: Any) -> list:
        model = torch_model()
        ema = EMAModel(model.parameters(), decay=D, **options)
        return followed(model, lambda t: ema.step(model.parameters()), lambda: ema.shadow_params[0])

    yield "EMAModel(parameters, decay=d)", run()
    options = {"use_ema_warmup": True, "inv_gamma": GAMMA, "power": POWER, "min_decay": LEAST}
    yield "EMAModel(parameters, decay=d, min_decay=m, use_ema_warmup=True, inv_gamma=g, power=p)", run(**options)


def torch() -> Averages:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def run(**options: Any) -> list:
        model = torch_model()
        average = AveragedModel(model, **options)
        return followed(model, lambda t: average.update_parameters(model), lambda: average.module.weight)

    yield "AveragedModel(model)", run()
    yield "AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d))", run(multi_avg_fn=get_ema_multi_avg_fn(D))


def ema_pytorch() -> Averages:
    from ema_pytorch.post_hoc_ema import KarrasEMA

    model = torch_model()
    ema = KarrasEMA(model, sigma_rel=S, update_every=1)
    yield (
        "KarrasEMA(model, sigma_rel=s, update_every=1)",
        followed(model, lambda t: ema.update(), lambda: ema.ema_model.weight),
    )


def edm2() -> Averages:
    """From the formulas of arXiv 2312.02696, section 3.1 and algorithm 2; the licence of its code forbids a copy."""
    gamma = max(np.roots([1, 7, 16 - S**-2, 12 - S**-2]).real)
    average, rows = WALK[0], []
    for t in range(1, UPDATES + 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * WALK[t]
        rows.append(average.tolist())
    yield "power function EMA of width s", rows


def tensorflow() -> Averages:
    """The class rounds its decay to float32, so the function beneath it is called with one in float64."""
    import tensorflow as tf
    from tensorflow.python.training.moving_averages import assign_moving_average

    def run(zero_debias: bool, decay: Any) -> list:
        rows = []
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            start = np.zeros(3) if zero_debias else WALK[0]
            average = tf.compat.v1.get_variable("average", initializer=start, use_resource=False)
            value, kept = (tf.compat.v1.placeholder(tf.float64) for _ in range(2))
            update = assign_moving_average(average, value, kept, zero_debias=zero_debias)
            session.run(tf.compat.v1.global_variables_initializer())
            for t in range(1, UPDATES + 1):
                session.run(update, {value: WALK[t], kept: decay(t - 1)})
                rows.append(session.run(average).tolist())
        return rows

    yield "ExponentialMovingAverage(d)", run(False, lambda n: D)
    yield "ExponentialMovingAverage(d, num_updates=n), n = 0, 1, ...", run(False, lambda n: min(D, (1 + n) / (10 + n)))
    after = run(False, lambda n: min(D, (2 + n) / (11 + n)))
    yield "ExponentialMovingAverage(d, num_updates=n), n = 1, 2, ...", after
    yield "ExponentialMovingAverage(d, zero_debias=True)", run(True, lambda n: D)


def paddledet() -> Averages:
    """In float32, as it computes. Its file alone: the package would need many others."""
    import paddle

    folder = Path(importlib.metadata.distribution("paddledet").locate_file("ppdet"))
    for name, path in (("ppdet", folder), ("ppdet.optimizer", folder / "optimizer")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    from ppdet.optimizer.ema import ModelEMA

    for kind in ("normal", "exponential"):
        model = paddle.nn.Layer()
        model.weight = model.create_parameter([3])
        ema, rows = ModelEMA(model, decay=D, ema_decay_type=kind), []
        for t in range(1, UPDATES + 1):
            model.weight.set_value(WALK[t].astype("float32"))
            ema.update(model)
            rows.append(ema.apply()["weight"].numpy().tolist())
        yield f'ModelEMA(model, decay=d, ema_decay_type="{kind}")', rows


LIBRARIES = {f.__name__: f for f in (timm, diffusers, torch, tensorflow, edm2, ema_pytorch, paddledet)}


def main(names: list[str]) -> None:
    averages = json.loads(FILE.read_text())["averages"] if FILE.exists() else {}
    for name in names or LIBRARIES:
        averages[name] = dict(LIBRARIES[name]())
    rows = {name: averages[name] for name in LIBRARIES if name in averages}
    names = {"d": D, "s": S, "g": GAMMA, "p": POWER, "m": LEAST}
    text = json.dumps({"arguments": names, "weights": WALK.tolist(), "averages": rows}, indent=1)
    # The numbers of one update on one line.
    FILE.write_text(re.sub(r"\[\s+([^][]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
