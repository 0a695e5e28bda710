# SPDX-License-Identifier: Apache-2.0
"""Compiles programs together with the kernels of csrc, for a GPU or, to try them where none is, for the host.

Must not import Paddle: where a GPU is, there may be none. Flags and sources are those of setup.py, read and not run.
Must not know what the programs do; whoever has programs of its own (benchmarks/gpu) hands them over.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NATIVE = HERE.parent / "native"
#: Where the kernels are; ``python -m benchmarks.gpu --csrc`` puts another folder here.
CSRC = ROOT / "csrc"
#: The programs of this folder. Each compares a GPU with the CPU and exits with 1 if any bit differs.
CHECKS = tuple(sorted(HERE.glob("check_*.cu")))
#: On the host alone: a compiler that warns of something else must not keep a GPU from being measured.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
#: Where the programs are only tried, the compiler's time counts and theirs does not.
QUICK = ("-O1", "-DPADDLE_ASGD_NO_CLONES")
#: A launch of a kernel, which g++ cannot parse.
LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(.+?), (\w+), 0, stream>>>\(")


class Built(NamedTuple):
    """A folder of what was built; ``kind`` is cuda or host."""

    kind: str
    folder: Path

    def program(self, name: str) -> Path:
        return self.folder / name

    def library(self, name: str) -> Path:
        return self.folder / f"{name}.so"


def launches_on_host(source: str) -> tuple[str, int]:
    """Return a CUDA source with its launches turned into calls of the stand-in's loop, and how many they were."""
    return LAUNCH.subn(r"launch_on_host(\1, \2, \3, stream, ", source)


def list_of_setup(name: str) -> list[str]:
    """Return a list of flags or of sources that setup.py builds with."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py has no {name}")


def kernels(name: str) -> list[Path]:
    """Return the files of CPU_SOURCES or CUDA_SOURCES in CSRC."""
    return [CSRC / Path(source).name for source in list_of_setup(name)]


def run(*command: str | Path) -> str:
    """Run a compiler; RuntimeError with what it said if it fails or warns."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout}")
    return done.stdout


def includes(programs: Iterable[Path] = ()) -> list[str]:
    """Return the options that name the folders of all headers, those beside the programs among them."""
    folders = dict.fromkeys((CSRC, NATIVE, HERE, *(path.parent for path in programs)))
    return [f"-I{folder}" for folder in folders]


def for_cuda(folder: Path, programs: Sequence[Path], libraries: Sequence[Path] = (), arch: str = "sm_90") -> Built:
    """Build with nvcc; ``arch`` is as its -arch takes it, such as sm_90 or native."""
    nvcc = ["nvcc", *list_of_setup("NVCC_FLAGS"), f"-arch={arch}", "-lineinfo"]
    nvcc += ["-Xcompiler", "-fPIC,-ffp-contract=off", *includes([*programs, *libraries])]
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        return _compiled(nvcc, source, folder)

    _link(["nvcc", f"-arch={arch}"], folder, programs, libraries, compiled, ())
    return Built("cuda", folder)


def for_host(folder: Path, programs: Sequence[Path], libraries: Sequence[Path] = ()) -> Built:
    """Build with g++, the launches of kernels turned into loops (``on_host``)."""
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    given = (*programs, *libraries)
    headers = [header for place in {HERE, *(path.parent for path in given)} for header in place.glob("*.h")]
    for path in (*headers, *given, *kernels("CUDA_SOURCES")):
        name = path.name if path.suffix == ".h" else f"{path.stem}.cc"
        (source / name).write_text(launches_on_host(path.read_text())[0])
    include = [f"-I{path}" for path in (source, CSRC, NATIVE, HERE / "on_host")]
    gxx = ["g++", *list_of_setup("CXX_FLAGS"), *QUICK, "-fPIC", *WARNINGS, *include]

    def compiled(path: Path) -> Path:
        return _compiled(gxx, source / f"{path.stem}.cc", folder)

    _link(["g++", "-pthread"], folder, programs, libraries, compiled, QUICK)
    return Built("host", folder)


def _compiled(command: list[str], source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    run(*command, "-c", source, "-o", target)
    return target


def _link(
    linker: list[str],
    folder: Path,
    programs: Sequence[Path],
    libraries: Sequence[Path],
    compiled: Callable[[Path], Path],
    cpu_flags: Sequence[str],
) -> None:
    """Compile everything at once; then link each program, and each library, with the kernels."""
    gxx = ["g++", *list_of_setup("CXX_FLAGS"), *cpu_flags, "-fPIC"]
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(_compiled, gxx, source, folder) for source in kernels("CPU_SOURCES")]
        waiting += [pool.submit(compiled, source) for source in kernels("CUDA_SOURCES")]
        mains: list[tuple[Path, Future[Path]]]
        mains = [(path, pool.submit(compiled, path)) for path in (*programs, *libraries)]
        objects = [kernel.result() for kernel in waiting]
        for path, main in mains:
            shared, target = (["-shared"], f"{path.stem}.so") if path in libraries else ([], path.stem)
            run(*linker, *shared, main.result(), *objects, "-o", folder / target)


def undefined_symbols(folder: Path) -> list[str]:
    """Return the functions of CUDA that the kernels' object files can call."""
    listed = run("nm", "-u", *(folder / f"{source.stem}.o" for source in kernels("CUDA_SOURCES"))).split()
    return sorted({name for name in listed if name.lstrip("_").startswith("cuda")})


def resources(folder: Path, arch: str = "sm_90") -> str:
    """Return what the compiler says of registers and spills."""
    command = ["nvcc", *list_of_setup("NVCC_FLAGS"), f"-arch={arch}", "--resource-usage", *includes()]
    said = "".join(run(*command, "-c", source, "-o", folder / "resources.o") for source in kernels("CUDA_SOURCES"))
    filt = shutil.which("c++filt")
    return subprocess.run([filt], input=said, capture_output=True, text=True).stdout if filt else said
