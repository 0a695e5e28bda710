# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc without Paddle and runs the native tests: under sanitizers, and in builds that must agree in every bit.

Must not compute anything of a step: that is done in tests/native, whose programs say what is wrong and exit with 1.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from gpu.build import WARNINGS, kernels, launches_on_host, list_of_setup

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"
GXX = shutil.which("g++")
NVCC = shutil.which("nvcc")

# No clones: the loader chooses them before a sanitizer is ready.
SANITIZED = ("-Og", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DPADDLE_ASGD_NO_CLONES")
# Nor the processor's conversions of float16: as on one that has none.
NO_CLONES = ("-O3", "-DPADDLE_ASGD_NO_CLONES", "-DPADDLE_ASGD_NO_F16C")
# The kernel as setup.py builds it, without vector code, and each clone that it may become on another processor.
BUILDS = {
    "clones": ("-O3",),
    "O0": ("-O0", "-DPADDLE_ASGD_NO_CLONES"),
    "default": NO_CLONES,
    "v3": (*NO_CLONES, "-march=x86-64-v3"),
    "v4": (*NO_CLONES, "-march=x86-64-v4"),
}
NEEDED = {"v3": {"avx2", "fma", "f16c", "bmi2"}, "v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}}
# Those that run a kernel, and those that do not.
DRIVEN = ("step", "promises", "variants", "watch", "norm", "average", "average_sgd")
PROGRAMS = [
    "half",
    "block_scale",
    "formula",
    "power",
    "refresh",
    "slots",
    "launch",
    *(f"{name} {kernel}" for name in DRIVEN for kernel in ("cpu", "cuda")),
]

# The checksums that a program prints: of how many combinations of storage types and modes.
CHECKSUMS = {"step": 20 * 12, "average_sgd": 10 * 5}

needs_gxx = pytest.mark.skipif(GXX is None, reason="no g++ on PATH")


def call(*command: str | Path) -> str:
    """Run and return what was printed; fail with that and with what was said on the error stream."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    said = f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    if done.returncode != 0:
        pytest.fail(said, pytrace=False)
    return done.stdout


class Workshop:
    """A folder of objects and programs, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # g++ knows no <<< >>>, and the nvcc of no machine knows a sanitizer for the host.
        self.cuda_on_host, self.launches = [], 0
        for path in kernels("CUDA_SOURCES"):
            source, launches = launches_on_host(path.read_text())
            self.cuda_on_host.append(folder / f"{path.stem}_on_host.cc")
            self.cuda_on_host[-1].write_text(source)
            self.launches += launches

    def _make(self, product: str, inputs: list[Path], flags: tuple[str, ...]) -> Path:
        target = self.folder / product
        if not target.exists():
            flags = (*list_of_setup("CXX_FLAGS"), *flags, *WARNINGS)
            include = [f"-I{folder}" for folder in (CSRC, NATIVE, NATIVE / "cuda_on_host")]
            call(GXX, *flags, *include, *inputs, "-o", target)
        return target

    def _object(self, source: Path, build: str, flags: tuple[str, ...]) -> Path:
        return self._make(f"{source.stem}_{build}.o", [source], (*flags, "-c"))

    def sanitized(self, program: str) -> Path:
        """The program of tests/native/test_<program>.cc with both kernels, all under sanitizers."""
        sources = [*kernels("CPU_SOURCES"), *self.cuda_on_host] if program in DRIVEN else []
        objects = [self._object(source, "sanitized", SANITIZED) for source in sources]
        return self._make(f"{program}_sanitized", [NATIVE / f"test_{program}.cc", *objects], SANITIZED)

    def optimised(self, program: str, build: str) -> Path:
        """The same with the CPU's kernels in one of BUILDS; what is around it is always built alike."""
        around = [NATIVE / f"test_{program}.cc", *self.cuda_on_host]
        objects = [self._object(source, "around", ("-Og",)) for source in around]
        objects += [self._object(source, build, BUILDS[build]) for source in kernels("CPU_SOURCES")]
        return self._make(f"{program}_{build}", objects, ())


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = tmp_path_factory.mktemp("probe") / "empty.cc"
    source.write_text("int main() { return 0; }")
    probe = [GXX, "-fsanitize=address,undefined", str(source), "-o", str(source.with_suffix(""))]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("g++ has no sanitizers here (libasan, libubsan)")


def skip_unless_runs(build: str) -> None:
    if build in ("default", "O0"):
        return
    if platform.machine() != "x86_64":
        pytest.skip("instruction sets of x86-64")
    cpuinfo = Path("/proc/cpuinfo")
    missing = NEEDED.get(build, set()) - set(cpuinfo.read_text().split() if cpuinfo.exists() else ())
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")


@needs_gxx
@pytest.mark.usefixtures("sanitizers")
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_sanitizer_complains(workshop: Workshop, program: str) -> None:
    name, *arguments = program.split()
    call(workshop.sanitized(name), *arguments)


@needs_gxx
@pytest.mark.usefixtures("sanitizers")
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("program", CHECKSUMS)
def test_every_build_gives_the_same_bits(workshop: Workshop, program: str, build: str) -> None:
    skip_unless_runs(build)
    expected = call(workshop.sanitized(program), "cpu", "checksums")
    assert len(set(expected.splitlines())) == CHECKSUMS[program]
    assert call(workshop.optimised(program, build), "cpu", "checksums") == expected


@needs_gxx
@pytest.mark.parametrize("name", CHECKSUMS)
def test_cuda_kernel_gives_the_bits_of_the_cpu(workshop: Workshop, name: str) -> None:
    program = workshop.optimised(name, "default")
    assert workshop.launches == sum(path.read_text().count("<<<") for path in kernels("CUDA_SOURCES")) > 0
    assert call(program, "cuda", "checksums") == call(program, "cpu", "checksums")


@needs_gxx
@pytest.mark.parametrize("program", DRIVEN)
def test_kernel_as_it_is_shipped(workshop: Workshop, program: str) -> None:
    call(workshop.optimised(program, "clones"), "cpu")


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_cuda_sources_compile_alone_and_without_contraction(tmp_path: Path, architecture: str) -> None:
    # Alone: what they include is here, and Paddle is not.
    for path in (*kernels("CUDA_SOURCES"), *CSRC.glob("*.h")):
        shutil.copy(path, tmp_path)
    operations: list[str] = []
    for source in kernels("CUDA_SOURCES"):
        call(
            *(NVCC, *list_of_setup("NVCC_FLAGS"), f"-arch={architecture}", "-Werror", "all-warnings"),
            *("--keep", "--keep-dir", tmp_path, "-c", tmp_path / source.name, "-o", tmp_path / "kernel.o"),
        )
        # Not the sums of atom.add and red.add, which nothing can be fused with.
        assembly = (tmp_path / f"{source.stem}.ptx").read_text()
        operations += re.findall(r"(?<![\w.])(?:add|sub|mul|fma|mad)\.[\w.]*f(?:32|64)\b", assembly)
    # Without .rn the assembler, or the driver years later, may still fuse a product and a sum.
    assert set(operations) == {f"{name}.rn.f{bits}" for name in ("add", "sub", "mul") for bits in (32, 64)}


def test_setup_builds_every_source() -> None:
    """A file that is in none of the lists would be compiled by nothing, neither for the library nor by these tests."""
    listed = [name for lists in ("PADDLE_SOURCES", "CPU_SOURCES", "CUDA_SOURCES") for name in list_of_setup(lists)]
    assert sorted(listed) == sorted(f"csrc/{path.name}" for path in CSRC.iterdir() if path.suffix in (".cc", ".cu"))


def test_who_knows_paddle() -> None:
    knows = {path.name for path in CSRC.iterdir() if re.search(r"#include [<\"]paddle/", path.read_text())}
    assert all(name.startswith("paddle_") for name in knows)
