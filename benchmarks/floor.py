# SPDX-License-Identifier: Apache-2.0
"""Compiles floor.cc at first use and calls it on the memory of an optimizer that has taken its steps."""

from __future__ import annotations

import ctypes
import functools
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

SOURCE = Path(__file__).with_name("floor.cc")
COMPILE = ("g++", "-std=c++17", "-O3", "-shared", "-fPIC")


class Tensor(ctypes.Structure):
    """As in floor.cc."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("param", "grad", "d", "y", "master", "scale")]
    _fields_ += [("numel", ctypes.c_int64), ("item", ctypes.c_int64)]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loop; None where there is no g++."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "floor.so"
        try:
            subprocess.run([*COMPILE, str(SOURCE), "-o", str(path)], check=True)
        except FileNotFoundError:
            print(f"There is no {COMPILE[0]} here: the rows of bytes only are left out.", file=sys.stderr)
            return None
        loaded = ctypes.CDLL(str(path))
    loaded.move_bytes.argtypes = (ctypes.POINTER(Tensor), ctypes.c_int64, ctypes.c_int64, ctypes.c_uint32)
    loaded.move_averages.argtypes = (ctypes.POINTER(Tensor), ctypes.c_int64, ctypes.c_float)
    loaded.exchange_bytes.argtypes = (ctypes.POINTER(Tensor), ctypes.c_int64)
    for function in (loaded.move_bytes, loaded.move_averages, loaded.exchange_bytes):
        function.restype = None
    return loaded


def averages_only(averages: list, params: list, weight: float) -> tuple[Callable[[], None], Callable[[], None]]:
    """An update of averages in one pass of C and nothing else, and an exchange of them with the parameters."""
    tensors = (Tensor * len(params))()
    for tensor, average, param in zip(tensors, averages, params):
        tensor.param, tensor.d, tensor.numel = param.data_ptr(), average.data_ptr(), param.numel().item()
    loaded, count = library(), len(params)

    def update() -> None:
        loaded.move_averages(tensors, count, weight)

    def exchange() -> None:
        loaded.exchange_bytes(tensors, count)

    # Keeps the memory alive that the pointers lead to.
    update.tensors = exchange.tensors = (averages, params)
    return update, exchange


def bytes_only(optimizer: Any, params: list, batches: int) -> Callable[[], None]:
    """A step that only moves the bytes of ``optimizer``'s step, in and out of the same memory, slot after slot."""
    tensors = (Tensor * len(params))()
    for tensor, param in zip(tensors, params):
        d, y, *_ = optimizer._state.of(param)
        master = optimizer._state.master_of(param)
        tensor.param, tensor.grad = param.data_ptr(), param.grad.data_ptr()
        tensor.d, tensor.y = d.data_ptr(), y.data_ptr()
        tensor.master = None if master is None else master.data_ptr()
        scale = optimizer._state.named(param).get("y_scale")
        tensor.scale = None if scale is None else scale.data_ptr()
        tensor.numel, tensor.item = param.numel().item(), y.element_size()
    move, count, slots = library().move_bytes, len(params), itertools.cycle(range(batches))

    def step() -> None:
        move(tensors, count, next(slots), 0)

    # Keeps the memory alive that the pointers lead to.
    step.optimizer = optimizer
    return step
