# SPDX-License-Identifier: Apache-2.0
"""What is timed: lists of parameter shapes, each in a dtype. Must not import Paddle."""

from __future__ import annotations

import fnmatch
import math
from typing import Callable, NamedTuple

#: Bytes of one element of a parameter and of its gradient.
ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
#: What one step must move for an element: gradient, y_i and d are read, y_i and d written; the parameter is read and
#: written or, where it has a master weight, that is, and the parameter is written.
BYTES_A_STEP = {"float32": 4 + 2 * 4 + 2 * 4 + 2 * 4, "bfloat16": 2 + 2 * 2 + 2 * 4 + 2 * 4 + 2}
BYTES_A_STEP["float16"] = BYTES_A_STEP["bfloat16"]
#: A narrow history, its bytes of one element, and what it adds for each element: one scale for 128 of them, float32. A
#: smaller tensor's history is not narrow.
NARROW = {"int16": 2, "int8": 1}
SCALE_SIZE, NARROW_FROM = 4 / 128, 4096
#: The lengths of the history, batch_num.
BATCHES = (1, 8, 64)
#: Optimizers without a history are compared with this one.
REFERENCE_BATCHES = 8

Shapes = list[list[int]]


class Case(NamedTuple):
    """One model in one dtype; 16-bit parameters have float32 master weights."""

    model: str
    dtype: str
    shapes: Callable[[], Shapes]
    batches: tuple[int, ...] = BATCHES

    @property
    def name(self) -> str:
        return f"{self.model}/{self.dtype}"

    @property
    def cold(self) -> bool:
        """Whether steps with cold caches are timed."""
        return self.model in COLD and self.dtype == "float32"

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes()))

    def narrow_numel(self) -> int:
        """The elements of those tensors that may have a narrow history."""
        return sum(numel for numel in map(math.prod, self.shapes()) if numel >= NARROW_FROM)

    def saved_a_slot(self, history: str | None) -> int:
        """How many bytes shorter a narrow history's slot is."""
        size = ITEM_SIZE[self.dtype]
        return 0 if history is None else int(self.narrow_numel() * (size - NARROW[history] - SCALE_SIZE))

    def bytes_a_step(self, history: str | None = None) -> int:
        """What one step must move: of a narrow history, too, a slot is read and written."""
        return self.numel * BYTES_A_STEP[self.dtype] - 2 * self.saved_a_slot(history)


def resnet50() -> Shapes:
    """The 161 parameters of ResNet-50 for 1,000 classes."""

    def convolution(inputs: int, outputs: int, kernel: int) -> Shapes:
        return [[outputs, inputs, kernel, kernel], [outputs], [outputs]]  # and its batch norm

    shapes = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, [inputs, 1000], [1000]]


def gpt2_small() -> Shapes:
    """The 148 parameters of GPT-2 with 12 layers of width 768."""
    width, vocabulary, context, layers = 768, 50257, 1024, 12

    def linear(inputs: int, outputs: int) -> Shapes:
        return [[inputs, outputs], [outputs]]

    norm = [[width], [width]]
    attention = linear(width, 3 * width) + linear(width, width)
    perceptron = linear(width, 4 * width) + linear(4 * width, width)
    return [[vocabulary, width], [context, width], *layers * (norm + attention + norm + perceptron), *norm]


MODELS: dict[str, Callable[[], Shapes]] = {
    "8x64": lambda: [[64]] * 8,
    "160x10000": lambda: [[10_000]] * 160,
    "1000x64": lambda: [[64]] * 1_000,
    "1x20M": lambda: [[20_000_000]],
    "resnet50": resnet50,
    "gpt2": gpt2_small,
}
TITLES = {
    "8x64": "8 tensors of 64",
    "160x10000": "160 tensors of 10,000",
    "1000x64": "1,000 tensors of 64",
    "1x20M": "1 tensor of 20 million",
    "resnet50": "ResNet-50: 161 tensors, 25.6 million",
    "gpt2": "GPT-2 small: 148 tensors, 124 million",
}
#: Timed with cold caches, too. The tensors of the others fit into no cache, so that no step finds them there.
COLD = ("8x64", "160x10000", "1000x64", "resnet50")
#: Measured beside the cases, by static.py.
STATIC = "static"


def all_cases() -> list[Case]:
    return [Case(model, dtype, shapes) for dtype in ITEM_SIZE for model, shapes in MODELS.items()]


def quick_cases() -> list[Case]:
    """What shows a mistake soon: no GPT-2, no long history, one of the 16-bit types."""
    return [
        case._replace(batches=BATCHES[:2]) for case in all_cases() if case.model != "gpt2" and case.dtype != "float16"
    ]


def select(cases: list[Case], patterns: list[str] | None) -> tuple[list[Case], bool]:
    """The cases that match one of the patterns, and whether the static rows do; all of them without patterns."""
    if not patterns:
        return cases, True
    chosen = [case for case in cases if any(matches(case.name, pattern) for pattern in patterns)]
    static = any(matches(STATIC, pattern) for pattern in patterns)
    if not chosen and not static:
        names = ", ".join([*(case.name for case in cases), STATIC])
        raise SystemExit(f"--case: no case matches {' '.join(patterns)}; there are {names}")
    return chosen, static


def matches(name: str, pattern: str) -> bool:
    """``resnet50`` stands for all of its dtypes."""
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"{pattern}/*")
