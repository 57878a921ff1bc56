"""Builds ace_ext._C. CUDA or CPU-only: ACE_CUDA=auto (default), 0 or 1. See README, "Install"."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()


def set_cuda_home() -> None:
    """Sets CUDA_HOME to the toolkit's real folder: if nvcc on PATH is a link or wrapper, torch guesses a wrong one."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    nvcc = shutil.which("nvcc")
    guesses = [Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in [*guesses, Path("/usr/local/cuda")]:
        if (home / "include" / "cuda_runtime.h").exists():
            os.environ["CUDA_HOME"] = str(home)
            return


set_cuda_home()  # torch.utils.cpp_extension reads CUDA_HOME once, when it is imported
import torch  # noqa: E402
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def want_cuda() -> bool:
    """Whether to build for CUDA. It does not ask torch.cuda.is_available(), because a build machine may have no GPU."""
    switch = os.environ.get("ACE_CUDA", "auto").lower()
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"ACE_CUDA must be auto, 0 or 1 (got {switch!r})")
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    if switch == "1" and not possible:
        raise SystemExit(
            f"ACE_CUDA=1 needs a torch built for CUDA and a CUDA toolkit (got torch {torch.__version__}, built for "
            f"CUDA {torch.version.cuda}, toolkit {CUDA_HOME}); install both, or set CUDA_HOME, or ACE_CUDA=0"
        )
    return possible and switch != "0"


def sources(*patterns: str) -> list[str]:
    """The files that match, relative to the repository, sorted."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def in_one(name: str, paths: list[str]) -> str:
    """A file of the build folder that includes these. What they share is then compiled once: templates, and torch's
    headers, which take most of the time of a small file."""
    file = ROOT / "build" / name
    text = "".join(f'#include "{Path(path).relative_to("csrc").as_posix()}"\n' for path in paths)
    if not file.exists() or file.read_text() != text:  # otherwise it need not be compiled again
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return str(file.relative_to(ROOT))


SELECTIONS = ["csrc/cpu/across.cpp", "csrc/cpu/mask.cpp", "csrc/cpu/prune.cpp"]
"""These share templates. They take the longest to compile."""
LARGE = ["csrc/cpu/balance.cpp", "csrc/cpu/packed.cpp", "csrc/cpu/quantized.cpp"]
"""These share little."""


def cpu_sources() -> list[str]:
    """The ops and their code for the CPU."""
    small = [path for path in sources("csrc/cpu/*.cpp") if path not in (*SELECTIONS, *LARGE)]
    ops = in_one("ops.cpp", sources("csrc/ops/*.cpp"))
    return [in_one("selections.cpp", SELECTIONS), *LARGE, in_one("small.cpp", small), ops, *sources("csrc/*.cpp")]


def openmp() -> list[str]:
    """The OpenMP flag: without it at::parallel_for, a template in torch's headers, runs on one thread.

    Only for GCC: torch has already loaded GCC's OpenMP runtime, so nothing more is linked and the process has one
    thread pool. Clang would use another runtime.
    """
    compiler = os.environ.get("CXX", "c++").split()
    macros = subprocess.run(
        [*compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
    )
    gcc = "__GNUC__" in macros.stdout and "__clang__" not in macros.stdout
    return ["-fopenmp"] if gcc and sys.platform == "linux" else []


def extension():
    """The extension module, for CUDA and CPU or for the CPU only."""
    cuda = want_cuda()
    version = re.search(r'__version__ = "(.+)"', (ROOT / "ace_ext" / "version.py").read_text()).group(1)
    print(f"ace_ext: torch {torch.__version__}, {'CUDA ' + str(CUDA_HOME) if cuda else 'CPU-only'} build")
    # -ffp-contract=off, --fmad=false: scores have the same bits on every instruction set and device.
    flags = {"cxx": ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]}
    flags["cxx"] += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]  # the last two change no value
    flags["cxx"] += openmp()
    macros = [("ACE_VERSION", version)]
    files = cpu_sources()
    if cuda:
        files += [in_one("cuda_glue.cpp", sources("csrc/cuda/*.cpp")), *sources("csrc/cuda/*.cu")]
        macros += [("ACE_WITH_CUDA", None), ("ACE_CUDA_VERSION", torch.version.cuda)]
        flags["nvcc"] = ["-O3", "-lineinfo", "--fmad=false", "-Xcompiler=-ffp-contract=off"]
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
            os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"  # torch has no default on a machine without a GPU
    kind = CUDAExtension if cuda else CppExtension
    return kind(
        "ace_ext._C", sources=files, include_dirs=[str(ROOT / "csrc")], define_macros=macros, extra_compile_args=flags
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
