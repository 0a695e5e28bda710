# SPDX-License-Identifier: Apache-2.0
"""Builds the programs of ``native/`` with the kernels of csrc, for a GPU or, to try them, for the host.

Must not import Paddle: where a GPU is, there may be none. The flags are those of setup.py, read and not run.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NATIVE, TESTS = HERE / "native", ROOT / "tests" / "native"
#: Where the kernels are; ``--csrc`` puts another folder here.
CSRC = ROOT / "csrc"
PROGRAMS = ("check_bits", "check_graph", "check_large", "measure")
LIBRARY = "library"
#: On the host alone: a compiler that warns of something else must not keep a GPU from being measured.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
#: To try the programs it is the compiler's time that counts.
QUICK = ("-O1", "-DPADDLE_ASGD_NO_CLONES")
#: g++ knows no <<< >>>.
LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(.+?), (\w+), 0, stream>>>\(")


class Built(NamedTuple):
    """A folder of programs; ``kind`` is cuda or host."""

    kind: str
    folder: Path

    def program(self, name: str) -> Path:
        return self.folder / name

    @property
    def library(self) -> Path:
        return self.folder / f"{LIBRARY}.so"


def launches_on_host(source: str) -> tuple[str, int]:
    """A CUDA source with its launches turned into calls of the stand-in's loop, and how many they were."""
    return LAUNCH.subn(r"launch_on_host(\1, \2, \3, stream, ", source)


def list_of_setup(name: str) -> list[str]:
    """A list of flags or of sources that setup.py builds with."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py has no {name}")


def kernels(name: str) -> list[Path]:
    """The files of CPU_SOURCES or CUDA_SOURCES in CSRC."""
    return [CSRC / Path(source).name for source in list_of_setup(name)]


def run(*command: str | Path) -> str:
    """Run a compiler; RuntimeError with what it said if it fails or warns."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout}")
    return done.stdout


def _cpu_object(folder: Path, source: Path, *more: str) -> Path:
    target = folder / f"{source.stem}.o"
    run("g++", *list_of_setup("CXX_FLAGS"), *more, "-fPIC", "-c", source, "-o", target)
    return target


def _includes() -> list[str]:
    return [f"-I{folder}" for folder in (CSRC, TESTS, NATIVE)]


def for_cuda(folder: Path, arch: str = "sm_90", names: tuple[str, ...] = (*PROGRAMS, LIBRARY)) -> Built:
    """With nvcc; ``arch`` as its -arch takes it, such as sm_90 or native."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = ["nvcc", *list_of_setup("NVCC_FLAGS"), f"-arch={arch}", "-lineinfo"]
    nvcc += ["-Xcompiler", "-fPIC,-ffp-contract=off", *_includes()]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run(*nvcc, "-c", source, "-o", target)
        return target

    def linked(name: str, objects: list[Path]) -> None:
        target = folder / (f"{name}.so" if name == LIBRARY else name)
        run("nvcc", f"-arch={arch}", *(["-shared"] if name == LIBRARY else []), *objects, "-o", target)

    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(_cpu_object, folder, source) for source in kernels("CPU_SOURCES")]
        waiting += [pool.submit(compiled, source) for source in kernels("CUDA_SOURCES")]
        mains = {name: pool.submit(compiled, NATIVE / f"{name}.cu") for name in names}
        objects = [kernel.result() for kernel in waiting]
        for name, main in mains.items():
            linked(name, [main.result(), *objects])
    return Built("cuda", folder)


def for_host(folder: Path, names: tuple[str, ...] = (*PROGRAMS, LIBRARY)) -> Built:
    """With g++, the launches of kernels turned into loops (``native/on_host``)."""
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    for path in (*NATIVE.glob("*.h"), *NATIVE.glob("*.cu"), *kernels("CUDA_SOURCES")):
        name = path.name if path.suffix == ".h" else f"{path.stem}.cc"
        (source / name).write_text(launches_on_host(path.read_text())[0])
    include = (f"-I{path}" for path in (source, CSRC, TESTS, NATIVE / "on_host"))
    flags = [*list_of_setup("CXX_FLAGS"), *QUICK, "-fPIC", *WARNINGS, *include]

    def compiled(name: str) -> Path:
        target = folder / f"{name}.o"
        run("g++", *flags, "-c", source / f"{name}.cc", "-o", target)
        return target

    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(_cpu_object, folder, source, *QUICK) for source in kernels("CPU_SOURCES")]
        waiting += [pool.submit(compiled, source.stem) for source in kernels("CUDA_SOURCES")]
        mains = {name: pool.submit(compiled, name) for name in names}
        objects = [kernel.result() for kernel in waiting]
        for name, main in mains.items():
            target = folder / (f"{name}.so" if name == LIBRARY else name)
            shared = ["-shared"] if name == LIBRARY else []
            run("g++", *shared, main.result(), *objects, "-pthread", "-o", target)
    return Built("host", folder)


def undefined_symbols(folder: Path) -> list[str]:
    """The functions of CUDA that the kernels' object files can call."""
    listed = run("nm", "-u", *(folder / f"{source.stem}.o" for source in kernels("CUDA_SOURCES"))).split()
    return sorted({name for name in listed if name.lstrip("_").startswith("cuda")})


def resources(folder: Path, arch: str = "sm_90") -> str:
    """What the compiler says of registers and spills."""
    command = ["nvcc", *list_of_setup("NVCC_FLAGS"), f"-arch={arch}", "--resource-usage", *_includes()]
    said = "".join(run(*command, "-c", source, "-o", folder / "resources.o") for source in kernels("CUDA_SOURCES"))
    filt = shutil.which("c++filt")
    return subprocess.run([filt], input=said, capture_output=True, text=True).stdout if filt else said
