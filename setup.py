# SPDX-License-Identifier: Apache-2.0
"""Builds the one native module, for the CPU or with CUDA as the installed Paddle is. Metadata: pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

CPU_ONLY = os.environ.get("PADDLE_ASGD_CPU_ONLY", "0") not in ("", "0")

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    # The same bits on every CPU and on the GPU: no a * b + c in one rounding.
    "-ffp-contract=off",
    # Neither changes a result; without them gcc does not vectorise the half conversions.
    "-fno-math-errno",
    "-fno-trapping-math",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]

# Every source of the library stands in one of these lists. They and the flags are plain literals because tests and
# benchmarks read them without running this file, to compile the kernels where there is no Paddle.
PADDLE_SOURCES = [
    "csrc/paddle_asgd_op.cc",
    "csrc/paddle_average_op.cc",
    "csrc/paddle_average_sgd_op.cc",
    "csrc/paddle_module.cc",
]
CPU_SOURCES = [
    "csrc/asgd_step_cpu.cc",
    "csrc/asgd_history_cpu.cc",
    "csrc/asgd_refresh_cpu.cc",
    "csrc/asgd_watch_cpu.cc",
    "csrc/asgd_norm_cpu.cc",
    "csrc/average_cpu.cc",
    "csrc/average_sgd_cpu.cc",
]
CUDA_SOURCES = [
    "csrc/asgd_step_cuda.cu",
    "csrc/asgd_norm_cuda.cu",
    "csrc/average_cuda.cu",
    "csrc/average_sgd_cuda.cu",
]


def cuda_home() -> Path:
    """The toolkit's real root: Paddle takes it from where nvcc lies on PATH, and a wrapper script leads it astray."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    roots += ["/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for root in filter(None, roots):
        if (Path(root) / "include" / "cuda_runtime.h").is_file():
            return Path(root)
    raise SystemExit(
        "paddle_asgd: the installed Paddle is a GPU build, but no CUDA toolkit was found: no include/cuda_runtime.h in "
        "$CUDA_HOME, beside nvcc, or in /usr/local/cuda*. Install the toolkit or set CUDA_HOME; "
        "PADDLE_ASGD_CPU_ONLY=1 builds without CUDA."
    )


def machine_code(toolkit: Path) -> list[str]:
    """Code for the first GPU of each generation from Volta on that this nvcc knows; it runs on all of a generation."""
    listed = subprocess.run([toolkit / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = sorted(int(name.rpartition("_")[2]) for name in listed.stdout.split())
    first = {arch // 10: arch for arch in reversed(known) if arch >= 70}
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in sorted(first.values())]
    # And PTX of the last, for GPUs yet to come.
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


try:
    import paddle
except ImportError as error:
    raise SystemExit(
        f"paddle_asgd is compiled against the Paddle that will load it, and none can be imported here ({error}). "
        "Install paddlepaddle or paddlepaddle-gpu first, then: pip install --no-build-isolation ."
    ) from error

TOOLKIT = cuda_home() if paddle.is_compiled_with_cuda() and not CPU_ONLY else None
if TOOLKIT is not None:
    # Before the import below, which reads it once and for all.
    os.environ["CUDA_HOME"] = str(TOOLKIT)

from paddle.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


class BuildModule(BuildExtension):
    """Paddle's build command, less what it does for packages that consist of one operator and nothing else."""

    def _generate_python_api_file(self) -> None:
        # Would write a _C.py beside _C.so, which hides it.
        pass

    def _rename_inplace_shared_library(self) -> None:
        # Would rename _C.so to _C_pd_.so in an editable install.
        pass

    def run(self) -> None:
        super().run()
        for module in self.extensions:
            library = Path(self.get_ext_fullpath(module.name))
            if not library.is_file():
                # Paddle prints "compile failed" and goes on; the first "error:" above says why.
                raise SystemExit(f"paddle_asgd: {library.name} was not built; the first 'error:' above says why")
            library.with_name("version.txt").unlink(missing_ok=True)
        # Paddle keeps objects and notes on versions among what is to be packed.
        for leftover in Path(self.build_lib).glob("*"):
            if leftover.name != "paddle_asgd":
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


class PackSources(sdist):
    """Packs what a build, the tests and the documentation need; a CPU build lists the CUDA sources nowhere."""

    folders = ("csrc", "docs", "tests", "examples", "benchmarks")
    kinds = (".h", ".cc", ".cu", ".py", ".sh", ".md", ".json")

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        sources = [path for folder in self.folders for path in Path(folder).rglob("*") if path.suffix in self.kinds]
        # Other pictures are what the examples have drawn.
        sources += [*Path("docs").glob("*.png"), Path("CONTRIBUTING.md"), Path("Makefile")]
        super().make_release_tree(base_dir, sorted({*files, *map(str, sources)}))


def native_module() -> object:
    cxx = [*CXX_FLAGS, "-DPADDLE_ASGD_MODULE=_C", f'-DPADDLE_ASGD_BUILT_FOR_PADDLE="{paddle.__version__}"']
    headers = sorted(map(str, Path("csrc").glob("*.h")))
    sources = [*PADDLE_SOURCES, *CPU_SOURCES]
    if TOOLKIT is not None:
        nvcc = list(NVCC_FLAGS)
        if not os.environ.get("PADDLE_CUDA_ARCH_LIST"):
            nvcc += machine_code(TOOLKIT)
        module = CUDAExtension(
            sources=[*sources, *CUDA_SOURCES],
            # From CUDA 13 on, libcu++ lies in a folder of its own, and Paddle's headers ask for it.
            include_dirs=[str(TOOLKIT / "include" / "cccl")],
            extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        )
    else:
        module = CppExtension(sources=sources, extra_compile_args={"cxx": cxx})
    module.name = "paddle_asgd._C"
    # An edited header must rebuild what includes it.
    module.depends = [*headers, "setup.py"]
    return module


setup(
    license="Apache-2.0",
    ext_modules=[native_module()],
    cmdclass={"build_ext": BuildModule.with_options(no_python_abi_suffix=True), "sdist": PackSources},
)
