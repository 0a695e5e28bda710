# SPDX-License-Identifier: Apache-2.0
"""What torch takes for a step of the same parameters, and what a profiler sees of ours; prints a line of JSON each.

Run as a program, for a process that fails must not take the rest along: ``python -m benchmarks.gpu.torch_side --help``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import torch

from .. import cases

LEARNING_RATE, DECAY = 1e-7, 1e-4
Step = Callable[[], Any]


def parameters(shapes: cases.Shapes, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Parameters with gradients."""
    params = [torch.full(shape, 0.5, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, dtype=dtype, device=device)
    return params


def plain_sag(params: list[torch.Tensor], n: int, foreach: bool) -> Step:
    """SAG as one writes it in torch, one slot a call; with float32 sums, and master weights for 16-bit parameters."""
    half = params[0].dtype != torch.float32
    masters = [p.detach().float() if half else p.detach() for p in params]
    d = [torch.zeros_like(x) for x in masters]
    y = [torch.zeros(n, *p.shape, dtype=p.dtype, device=p.device) for p in params]
    taken = 0

    def step() -> None:
        nonlocal taken
        i, seen = taken % n, min(taken + 1, n)
        taken += 1
        grads, slots = [p.grad for p in params], [history[i] for history in y]
        if foreach:
            torch._foreach_sub_(d, [s.float() for s in slots] if half else slots)
            torch._foreach_add_(d, [g.float() for g in grads] if half else grads)
            torch._foreach_copy_(slots, grads)
            torch._foreach_mul_(masters, 1 - LEARNING_RATE * DECAY)
            torch._foreach_add_(masters, d, alpha=-LEARNING_RATE / seen)
            if half:
                torch._foreach_copy_([p.detach() for p in params], masters)
            return
        for p, x, s, g, slot in zip(params, masters, d, grads, slots):
            s.sub_(slot).add_(g)
            slot.copy_(g)
            x.mul_(1 - LEARNING_RATE * DECAY).add_(s, alpha=-LEARNING_RATE / seen)
            if half:
                p.detach().copy_(x)

    return step


def contestants(params: list[torch.Tensor], n: int, capturable: bool) -> dict[str, Step]:
    """Those who take part, by name."""
    optim = torch.optim
    found = {
        "torch.optim.SGD(fused=True)": optim.SGD(params, LEARNING_RATE, fused=True).step,
        "torch.optim.ASGD(foreach, capturable, t0=0)": optim.ASGD(
            params, LEARNING_RATE, t0=0, foreach=True, capturable=capturable
        ).step,
        "SAG in torch, a loop": plain_sag(params, n, foreach=False),
        "SAG in torch, foreach": plain_sag(params, n, foreach=True),
    }
    return found


def _cuda_sample(step: Step, calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / calls


def _host_sample(step: Step, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) * 1e6 / calls


def captured(step: Step) -> Step:
    """The step as a graph, so that the host's time does not count."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def time_case(model: str, dtype: str, n: int, samples: int, device: str) -> list[dict[str, Any]]:
    """Medians in microseconds; eager, and captured where torch can capture it."""
    shapes = cases.MODELS[model]() if model in cases.MODELS else [[int(model)]]
    sample = _cuda_sample if device == "cuda" else _host_sample
    params = parameters(shapes, getattr(torch, dtype), device)
    rows = []
    for name, step in contestants(params, n, device == "cuda").items():
        for how in ("eager", "graph"):
            row = {"case": model, "dtype": dtype, "n": n, "what": name, "how": how}
            # A loop of SAG takes its slot from the host: a graph of it would replace one slot for ever. So not timed.
            if how == "graph" and (device != "cuda" or name.startswith("SAG")):
                continue
            try:
                timed = captured(step) if how == "graph" else step
                for _ in range(3):
                    timed()
                calls = max(1, min(20, math.ceil(3000 / (sample(timed, 1) + 1))))
                us = sorted(sample(timed, calls) for _ in range(samples))
                rows.append({**row, "us": statistics.median(us), "low": us[0], "high": us[-1]})
            except (RuntimeError, ValueError) as error:
                rows.append({**row, "error": str(error).splitlines()[0]})
    return rows


def our_step(library: Path, params: list[torch.Tensor], n: int, watch: bool) -> Step:
    """Our kernel on torch's tensors, through the library that native/library.cu becomes."""
    take_step = ctypes.CDLL(str(library)).take_step
    take_step.restype = ctypes.c_char_p
    device, count = params[0].device, len(params)
    half = params[0].dtype != torch.float32
    d = [torch.zeros(p.shape, device=device) for p in params]
    y = [torch.zeros(n, *p.shape, dtype=p.dtype, device=device) for p in params]
    m = [torch.zeros(1, dtype=torch.int64, device=device) for _ in params]
    masters = [p.detach().float() for p in params] if half else None
    entries = torch.zeros(22, dtype=torch.float64, device=device)  # kWatchSize of csrc/asgd_watch.h

    def pointers(tensors: list[torch.Tensor]) -> Any:
        return (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))

    lists = [pointers(t) for t in (params, [p.grad for p in params], d, y, m)]
    lists.append(pointers(masters) if half else None)
    sizes = (ctypes.c_int64 * count)(*(p.numel() for p in params))
    keep = (d, y, m, masters, entries, params)

    def step(keep: Any = keep) -> None:
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else None
        error = take_step(
            *(ctypes.c_int64(count), *lists, sizes, 3 if half else 0, ctypes.c_int64(n)),
            *(ctypes.c_void_p(entries.data_ptr() if watch else None), ctypes.c_void_p(stream)),
        )
        if error:
            raise RuntimeError(error.decode())

    return step


def profile(library: Path, model: str, dtype: str, watch: bool, device: str) -> dict[str, Any]:
    """How often each call to CUDA and each kernel comes in ten steps, as CUPTI sees them."""
    from torch.profiler import ProfilerActivity

    params = parameters(cases.MODELS[model](), getattr(torch, dtype), device)
    step = our_step(library, params, 3, watch)
    for _ in range(4):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    taken = torch.cuda.memory_stats()["allocation.all.allocated"] if device == "cuda" else 0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(10):
            step()
        # The profiler itself waits at its end; so does whoever wants all kernels seen. Counted once, and known.
        if device == "cuda":
            torch.cuda.synchronize()
    seen: dict[str, int] = {}
    for event in profiler.events():
        seen[event.name] = seen.get(event.name, 0) + 1
    after = torch.cuda.memory_stats()["allocation.all.allocated"] if device == "cuda" else 0
    return {"profile": model, "dtype": dtype, "watch": watch, "steps": 10, "events": seen, "allocated": after - taken}


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.gpu.torch_side")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--case", nargs="*", default=[], metavar="MODEL/DTYPE/N")
    parser.add_argument("--library", type=Path, help="profile the step of this library")
    options = parser.parse_args()
    print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda}), flush=True)
    for name in options.case:
        model, dtype, n = name.split("/")
        try:
            for row in time_case(model, dtype, int(n), options.samples, options.device):
                print(json.dumps(row), flush=True)
        except torch.OutOfMemoryError as error:
            print(json.dumps({"case": model, "dtype": dtype, "n": int(n), "error": str(error)[:80]}), flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if options.library:
        for dtype in ("float32", "bfloat16"):
            for watch in (False, True):
                print(json.dumps(profile(options.library, "resnet50", dtype, watch, options.device)), flush=True)


if __name__ == "__main__":
    main()
