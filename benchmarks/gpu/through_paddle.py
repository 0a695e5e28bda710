# SPDX-License-Identifier: Apache-2.0
"""Paddle itself on a GPU that its own kernels have no code for: what of paddle_asgd runs there, and with which bits.

Nothing here may need a kernel of Paddle's: tensors come from NumPy by copies. Each probe is a process of its own, for
Paddle may end the process; one that fails says where and why, and the next goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SIZES = (1, 257, 4097, 8193)
N = 3
STEPS = 3 * N + 2
#: Beside these two, what a probe gets of Paddle: the module, and the place under test.
Probe = Callable[[Any, Any], dict]


def tensor(paddle: Any, array: np.ndarray, place: Any) -> Any:
    """A copy of the array on the place; NumPy's uint16 is Paddle's bfloat16."""
    return paddle.to_tensor(array, place=place)


def bits(value: Any) -> bytes:
    """What a tensor holds."""
    return value.numpy().tobytes()


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers in a dtype."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


class Side:
    """The lists of one native call, all on one place."""

    def __init__(self, paddle: Any, place: Any, dtype: str, grad_dtype: str, master: bool, indexed: bool) -> None:
        from paddle_asgd.sag.slots import clock_length
        from paddle_asgd.sag.watch import WATCH_SIZE

        def zeros(shape: tuple, of: str) -> Any:
            return tensor(paddle, np.zeros(shape, np.uint16 if of == "bfloat16" else of), place)

        random = np.random.default_rng(1)
        compute = "float64" if dtype == "float64" else "float32"
        start = [random.standard_normal(size) for size in SIZES]
        self.paddle, self.place, self.grad_dtype = paddle, place, grad_dtype
        self.params = [tensor(paddle, as_stored(x, dtype), place) for x in start]
        self.d = [zeros((size,), compute) for size in SIZES]
        self.y = [zeros((N, size), grad_dtype) for size in SIZES]
        self.m = [zeros((clock_length(N) if indexed else 1,), "int64") for _ in SIZES]
        self.masters = [tensor(paddle, x.astype(np.float32), place) for x in start] if master else None
        self.watch = zeros((WATCH_SIZE,), "float64")
        self.weights = tensor(paddle, np.array([0.5, 1.75, 0.75]), place) if indexed else None

    def step(self, k: int, options: dict) -> None:
        from paddle_asgd import native

        random = np.random.default_rng(100 + k)
        grads = [as_stored(random.standard_normal(size), self.grad_dtype) for size in SIZES]
        grads = [tensor(self.paddle, g, self.place) for g in grads]
        native.asgd_update(
            *(self.params, grads, self.d, self.y, self.m, self.masters),
            *(tensor(self.paddle, np.array([0.0625]), self.place), 0.25),
            found_inf=tensor(self.paddle, np.array([k % 5 == 3]), self.place),
            **options,
            batch_weights=self.weights,
            watch=self.watch,
        )

    def held(self) -> dict[str, list[bytes]]:
        lists = {"param": self.params, "d": self.d, "y": self.y, "m": self.m, "master": self.masters or []}
        return {name: [bits(t) for t in tensors] for name, tensors in lists.items()}


# ---- Probes ----------------------------------------------------------------------------------------------------------


def imports(paddle: Any, place: Any) -> dict:
    """What there is."""
    found = {"paddle": paddle.__version__, "cuda": paddle.version.cuda(), "place": str(place)}
    return {**found, "devices": paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0}


def copies(paddle: Any, place: Any) -> dict:
    """To the place and back."""
    for dtype in ("float32", "float64", "float16", "bfloat16", "int64", "bool"):
        array = as_stored(np.random.default_rng(0).standard_normal(257) * 3, dtype)
        if bits(tensor(paddle, array, place)) != array.tobytes():
            raise ValueError(f"{dtype} comes back changed")
    return {}


def updates(paddle: Any, place: Any) -> dict:
    """The native call beside itself on the CPU: every bit of every state after every step."""
    compared = 0
    combinations = [("float32", "float32", False), ("float64", "float64", False)]
    combinations += [(d, g, m) for d in ("float16", "bfloat16") for g in (d, "float32") for m in (False, True)]
    for dtype, grad_dtype, master in combinations:
        for indexed in (False, True):
            sides = [Side(paddle, p, dtype, grad_dtype, master, indexed) for p in (paddle.CPUPlace(), place)]
            for k in range(STEPS):
                for side in sides:
                    options: dict[str, Any] = {"theta": 0.3 if indexed else None}
                    if indexed:
                        options["batch_index"] = tensor(paddle, np.array([(k * k) % N]), side.place)
                    side.step(k, options)
                here, there = (side.held() for side in sides)
                for name, expected in here.items():
                    compared += len(expected)
                    if expected != there[name]:
                        raise ValueError(f"{dtype}, {grad_dtype}, master {master}, indexed {indexed}: {name}, step {k}")
            sums = [side.watch.numpy() for side in sides]
            if not np.allclose(*sums, rtol=1e-12, atol=0):
                raise ValueError(f"{dtype}: watch {sums[1]}, not {sums[0]}")
    return {"compared": compared}


def _trained(paddle: Any, place: Any, own_zeros: bool) -> list[bytes]:
    """Parameters after steps of the optimizer itself, gradients set by copies."""
    from paddle.base.framework import EagerParamBase

    import paddle_asgd

    random = np.random.default_rng(2)
    start = [random.standard_normal(size).astype(np.float32) for size in SIZES]
    params = [EagerParamBase.from_tensor(tensor(paddle, x, place), trainable=True) for x in start]
    if own_zeros:
        # Zeros by a copy: Paddle's own come from a kernel.
        def add(self: Any, name: str, param: Any, dtype: Any = None, shape: Any = None, **_: Any) -> Any:
            made = tensor(paddle, np.zeros(shape, str(dtype).rpartition(".")[2]), place)
            self._accumulators[name if self._name is None else f"{self._name}_{name}"][param.name] = made
            return made

        paddle_asgd.ASGD._add_accumulator = add
    optimizer = paddle_asgd.ASGD(0.0625, N, params, weight_decay=0.25)
    for k in range(STEPS):
        gradients = np.random.default_rng(200 + k)
        for param, size in zip(params, SIZES):
            param.grad = tensor(paddle, gradients.standard_normal(size).astype(np.float32), place)
        optimizer.step()
    return [bits(t) for t in params] + [bits(t) for p in params for t in optimizer._state.of(p) if t is not None]


def optimizer(paddle: Any, place: Any) -> dict:
    """ASGD end to end; its state is made by Paddle, which needs a kernel for zeros."""
    return _same(*(_trained(paddle, p, False) for p in (paddle.CPUPlace(), place)))


def optimizer_with_copied_zeros(paddle: Any, place: Any) -> dict:
    """The same with zeros that are copied from the host."""
    return _same(*(_trained(paddle, p, True) for p in (paddle.CPUPlace(), place)))


def _same(expected: list[bytes], got: list[bytes]) -> dict:
    different = [i for i, (a, b) in enumerate(zip(expected, got)) if a != b]
    if different:
        raise ValueError(f"tensors {different} of {len(expected)} differ")
    return {"compared": len(expected)}


PROBES: dict[str, Probe] = {f.__name__: f for f in (imports, copies, updates, optimizer, optimizer_with_copied_zeros)}


# ---- Running ---------------------------------------------------------------------------------------------------------


def probe(name: str, place: str) -> dict:
    """One probe in this process."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    warnings.simplefilter("ignore")
    stage = "import paddle"
    try:
        import paddle

        stage = "place"
        where = paddle.CUDAPlace(0) if place == "gpu" else paddle.CPUPlace()
        stage = name
        return {"probe": name, "passed": True, **PROBES[name](paddle, where)}
    except Exception as error:  # whatever it is, it is the result
        where_from = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        said = [line for line in str(error).splitlines() if line.strip()]
        return {"probe": name, "passed": False, "stage": stage, "at": where_from[-3:], "said": said[-6:]}


def run(place: str, folders: list[str], names: list[str]) -> Iterator[dict]:
    """Each probe in a process of its own, with the folders first on the path."""
    path = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_MODULE_LOADING": "LAZY"}
    for name in names:
        command = [sys.executable, str(Path(__file__).resolve()), "--place", place, "--probe", name]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            yield {"probe": name, "passed": False, "stage": "did not end in 120 s"}
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        ended = {"probe": name, "passed": False, "stage": f"exit status {done.returncode}"}
        yield json.loads(lines[-1]) if lines else {**ended, "said": done.stderr.splitlines()[-8:]}


def main() -> int:
    parser = argparse.ArgumentParser("through_paddle", description=__doc__.splitlines()[0])
    parser.add_argument("--place", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--path", nargs="*", default=[], metavar="DIR", help="folders with paddle and paddle_asgd")
    parser.add_argument("--probe", choices=PROBES, help="this one alone, in this process")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was found to this file")
    options = parser.parse_args()
    # Instead of this file's own folder, whose names are nobody's modules.
    sys.path[0] = str(ROOT)
    if options.probe:
        print(json.dumps(probe(options.probe, options.place)))
        return 0
    found = []
    for row in run(options.place, options.path, list(PROBES)):
        found.append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row["passed"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
