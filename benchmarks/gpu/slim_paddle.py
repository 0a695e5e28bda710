# SPDX-License-Identifier: Apache-2.0
"""Makes a small copy of an installed paddlepaddle-gpu: no machine code for GPUs and no headers, from 2.8 GB to 0.5.

It imports and computes on the CPU place. On a GPU none of Paddle's own kernels can run; copies between host and device
can, and extensions that bring their own machine code. To be run with CUDA_MODULE_LOADING=LAZY.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import sys
from pathlib import Path

#: What a fat binary begins with: this number, a version, the size of the header, and that of what follows.
MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER = 16


def blank(library: Path) -> int:
    """Empty every fat binary of a library, in place; the number of bytes blanked."""
    total = 0
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        at = data.find(MAGIC)
        while at >= 0:
            _, header, size = struct.unpack_from("<HHQ", data, at + 4)
            end = at + HEADER + size
            if header != HEADER or end > len(data):
                at = data.find(MAGIC, at + 4)
                continue
            data[at + HEADER : end] = bytes(size)
            struct.pack_into("<Q", data, at + 8, 0)
            total += size
            at = data.find(MAGIC, end)
    return total


def main(source: str, target: str) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("include", "__pycache__"))
    for library in sorted(Path(target).rglob("*.so*")):
        if library.is_file() and not library.is_symlink() and library.stat().st_size > HEADER:
            size = blank(library)
            if size:
                print(f"{library.relative_to(target)}: {size / 1e6:.0f} MB blanked")


if __name__ == "__main__":
    main(*sys.argv[1:])
