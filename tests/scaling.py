# SPDX-License-Identifier: Apache-2.0
"""Computes the tables of docs/scaling.md; ``python -m tests.scaling`` prints them. Must not hold what was measured."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"

#: Of a rank, in bytes; and what of it activations, communication and Paddle itself take.
MEMORY, RESERVED = 80e9, 10e9
#: Bytes of one float32 number, and of an element of the history by its dtype: blocks of 128 share a float32 scale.
FLOAT = 4
ELEMENT = {"float32": 4.0, "int16": 2 + 4 / 128, "int8": 1 + 4 / 128}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: Numbers of parameters, and whether weights and gradients are divided among the ranks like the history.
MODELS = {"25 M": (25e6, False), "1 B": (1e9, False), "70 B": (70e9, True)}
#: Samples of a data set, and of each rank's part of a batch.
SAMPLES, PART = 1_281_167, 32


def history(parameters: float, n: int, ranks: int = 1, dtype: str = "float32") -> float:
    """Bytes of y and d on each of as many ranks as divide them evenly."""
    return parameters * (n * ELEMENT[dtype] + FLOAT) / ranks


def largest_n(parameters: float, ranks: int, dtype: str, all_divided: bool) -> int:
    """The most batches whose history fits beside float32 weights and gradients; 0 where not even these fit."""
    beside = 2 * FLOAT * parameters / (ranks if all_divided else 1)
    left = (MEMORY - RESERVED - beside) * ranks - FLOAT * parameters
    return max(0, int(left / parameters // ELEMENT[dtype]))


def sent(parameters: float, ranks: int) -> float:
    """Bytes that a rank sends in a step: gradients are summed, or summed in parts and the weights collected."""
    return 2 * FLOAT * parameters * (ranks - 1) / ranks


def readable(count: float) -> str:
    """Bytes in three digits."""
    unit, size = next((unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if count >= size)
    return f"{count / size:#.3g}".rstrip(".") + f" {unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    return "".join([lines[0], "|---" * len(head) + "|\n", *lines[1:]])


def largest_histories() -> str:
    columns = [(model, dtype) for model in MODELS for dtype in ELEMENT]
    rows = []
    for ranks in RANKS:
        found = [largest_n(MODELS[model][0], ranks, dtype, MODELS[model][1]) for model, dtype in columns]
        rows.append([f"{ranks:,}", *[f"{n:,}" if n else "-" for n in found]])
    return table(["ranks", *[f"{model}, {dtype}" for model, dtype in columns]], rows)


def bytes_sent() -> str:
    chosen = (2, 8, 64, 1024)
    return table(
        ["ranks", *MODELS],
        [[f"{ranks:,}", *[readable(sent(parameters, ranks)) for parameters, _ in MODELS.values()]] for ranks in chosen],
    )


def same_part_of_a_batch() -> str:
    """The history if each rank takes the same number of samples in a step, however many ranks there are."""
    rows = []
    for ranks in (1, 8, 64, 512):
        n = -(-SAMPLES // (PART * ranks))
        whole, part = (readable(history(25e6, n, divided)) for divided in (1, ranks))
        rows.append([f"{ranks:,}", f"{PART * ranks:,}", f"{n:,}", whole, part])
    return table(["ranks", "samples a step", "n", "history", "on each rank"], rows)


TABLES = (largest_histories, bytes_sent, same_part_of_a_batch)

if __name__ == "__main__":
    print("\n".join(make() for make in TABLES))
