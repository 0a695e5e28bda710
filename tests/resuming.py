# SPDX-License-Identifier: Apache-2.0
"""A training that is saved and resumed, which the tests of checkpoints share. Must not hold tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import paddle
from problems import Quadratic, bits, state_of

from paddle_asgd import ASGD

#: Two of one shape, so that state which goes to the wrong one of them does not show in its shape.
SHAPES = [[3, 2], [257], [3, 2], []]
#: Likewise, with two whose history can be narrow.
NARROW_SHAPES = [[3, 2741], [257], [3, 2741], []]
#: After how many steps a run is saved, and how many it takes in all.
STOP, END = 4, 11


class Run:
    """A training of four parameters over three batches, with all that a checkpoint must carry."""

    def __init__(
        self, dtype: str = "float32", gradient: str = "", schedule: bool = False, shapes: Any = SHAPES, **options: Any
    ) -> None:
        self.problem = Quadratic(batches=3, shapes=shapes)
        zero = paddle.nn.initializer.Constant(0.0)
        self.params = [paddle.create_parameter(s, dtype, default_initializer=zero) for s in shapes]
        for param, value in zip(self.params, self.problem.start):
            param.set_value(paddle.to_tensor(value).astype(dtype))
        self.dtype, self.gradient = dtype, gradient or dtype
        self.scheduler = paddle.optimizer.lr.ExponentialDecay(0.1, gamma=0.9) if schedule else None
        arguments = {"batch_num": 3, "weight_decay": 0.1, "parameters": self.params, **options}
        self.optimizer = ASGD(self.scheduler or 0.1, **arguments)

    def train(self, steps: Sequence[int], among: Sequence[int] = range(len(SHAPES))) -> None:
        for step in steps:
            grads = self.problem.gradients(step, [p.astype("float32").numpy() for p in self.params])
            # main_grad is where mixed precision leaves a gradient of another dtype than the parameter's.
            attribute = "grad" if self.gradient == self.dtype else "main_grad"
            for i in among:
                setattr(self.params[i], attribute, paddle.to_tensor(grads[i]).astype(self.gradient))
            self.optimizer.step()
            for i in among:
                self.params[i].clear_gradient(False)
                self.params[i].main_grad = None
            if self.scheduler is not None:
                self.scheduler.step()

    def content(self) -> list:
        """Everything that may change, to the last bit."""
        saved = self.optimizer.state_dict()
        masters = [saved["master_weights"][p.name] for p in self.params if p.name in saved.get("master_weights", {})]
        return [
            [bits(state_of(self.optimizer, p, ("d", "y", "y_scale", "m"))) for p in self.params],
            [master.numpy().tobytes() for master in masters],
            self.optimizer.get_lr(),
        ]

    def history(self, steps: Sequence[int], among: Sequence[int] = range(len(SHAPES))) -> list:
        contents = [self.content()]
        for step in steps:
            self.train([step], among)
            contents.append(self.content())
        return contents

    def copied_state(self) -> dict:
        """What would come back from a file: the numbers of now."""
        state = dict(self.optimizer.state_dict())
        if "master_weights" in state:
            state["master_weights"] = {k: v.clone() for k, v in state["master_weights"].items()}
        return {k: v.clone() if isinstance(v, paddle.Tensor) else v for k, v in state.items()}

    def take_parameters(self, other: Run) -> None:
        for mine, theirs in zip(self.params, other.params):
            mine.set_value(theirs)


@contextmanager
def one_warning(text: str | None) -> Iterator[None]:
    """Exactly one warning with this text, or none at all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", ".*is rounded to it after every step")
        yield
    assert [str(w.message) for w in caught if not text or text not in str(w.message)] == []
    assert len(caught) == (text is not None)


BY_ORDER = "matched by their order"
