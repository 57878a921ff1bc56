#!/usr/bin/env python3
"""Leaves out each barrier and each atomic of the kernels' PTX in turn, and says which removals the C++ tests notice.

Barriers of a warp, too. A removal is noticed if a test then fails, ends in a deadlock or does not end. One instance of
each kernel is taken, for bfloat16 weights with a factor a column; a loop that the compiler unrolled has several copies
of an instruction, each removed by itself. What is not noticed is printed with its kernel and line: either the tests
lack a case, or the instruction is not needed for these inputs. benchmarks/RESULTS.md says which.

    tools/test_cpp.sh build/cpp "" && ACE_CUDA_ARCHS=80 tools/test_cpp.sh build/cpp-tsan thread
    tools/drop_ptx.py --then build/cpp-tsan [--family moments]    takes seconds to minutes a removal: for a nightly run

Nothing is run on a GPU: threads run one after another here, in several orders, and a removal is noticed where a result
changes. What is left is tried with ThreadSanitizer, which sees two accesses that nothing separates in whatever order
they happened.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from program import count, existing_folder, one_line_errors

ROOT = Path(__file__).resolve().parent.parent

# File of PTX -> its test and the filter that runs its kernels for bfloat16.
FAMILIES = {
    "moments": ("cuda_moments_test", "MomentsOf/2.*"),
    "prune_nm": ("cuda_nm_test", "NmOf/2.*"),
    "prune_rows": ("cuda_rows_test", "RowsOf/2.*"),
    "prune_matrix": ("cuda_matrix_test", "MatrixOf/2.*"),
    "score": ("cuda_matrix_test", "MatrixOf/2.*"),
    "swaps": ("cuda_swaps_test", "SwapsOf/2.*"),
    "balance": ("cuda_balance_test", "BalanceOf/2.*"),
    "restore": ("cuda_restore_test", "*"),
    "obs_block": ("cuda_obs_block_test", "*"),
    "packed": ("cuda_packed_test", "CudaPacked/2.*"),
    "quantize_block": ("cuda_quantize_block_test", "QuantizeBlockOf/2.*"),
    "quantized": ("cuda_quantized_test", "CudaQuantized/2.*"),
}
ENTRY = re.compile(r"\.entry (\w+)\(")
DROPPED = re.compile(r"^\s*(bar\.sync|bar\.warp\.sync|barrier\.sync|atom\.\S+|red\.\S+)\s+([^;]*);")


@dataclass(frozen=True)
class Removal:
    """A line of a file, counted from 0, without which the kernel is tried."""

    kernel: str
    line: int
    text: str
    instead: str


def taken(kernels: list[str]) -> set[str]:
    """Which instances of the templates are tried; kernels that are no templates are."""
    typed = {template_of(kernel) for kernel in kernels if "BFloat16" in kernel}
    right = {kernel for kernel in kernels if "BFloat16" in kernel or template_of(kernel) not in typed}
    scored = {kernel for kernel in right if "Score" not in kernel or "ScaledScore" in kernel}
    return {kernel for kernel in scored if "MaskOutcome" not in kernel and "Lb0" not in kernel}


def template_of(kernel: str) -> str:
    """The part of a mangled name before the template's arguments."""
    return kernel.partition("kernel")[0]


def removals(lines: list[str]) -> Iterator[Removal]:
    """What is left out, one after the other."""
    tried = taken([entry[1] for line in lines if (entry := ENTRY.search(line))])
    kernel = ""
    for n, line in enumerate(lines):
        if entry := ENTRY.search(line):
            kernel = entry[1]
        elif kernel in tried and (found := DROPPED.match(line)):
            opcode, operands = found[1], found[2]
            instead = ""
            if opcode.startswith("atom"):  # who waits for the old value gets 0
                bits = re.sub(r"\D", "", opcode.split(".")[-1])
                instead = f"\tmov.b{bits} {operands.split(',')[0].strip()}, 0;"
            yield Removal(kernel, n, line.strip(), instead)


def is_noticed(program: Path, tests: str, folder: Path, limit: int) -> bool:
    """Whether the tests fail on the PTX of the folder, or take over ``limit`` seconds of CPU."""
    run = subprocess.run(
        [program, f"--gtest_filter={tests}", "--gtest_brief=1", "--gtest_fail_fast"],
        env={**os.environ, "ACE_PTX": str(folder), "TSAN_OPTIONS": "halt_on_error=1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),  # it waits for nobody
    )
    return run.returncode != 0


def try_family(family: str, builds: list[Path], ptx: Path, limit: int) -> tuple[int, list[Removal]]:
    """How many removals there are, and those that the tests do not notice."""
    test, tests = FAMILIES[family]
    lines = (ptx / f"{family}.ptx").read_text().splitlines()
    everything, unnoticed = list(removals(lines)), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for other in ptx.glob("*.ptx"):
            if other.stem != family:
                (folder / other.name).symlink_to(other.resolve())
        for removal in [None, *everything]:
            changed = [removal.instead if removal and n == removal.line else line for n, line in enumerate(lines)]
            (folder / f"{family}.ptx").write_text("\n".join(changed) + "\n")
            noticed = any(is_noticed(build / test, tests, folder, limit) for build in builds)
            if removal is None and noticed:
                sys.exit(f"drop_ptx: {test} fails with nothing removed")
            if removal is not None and not noticed:
                unnoticed.append(removal)
                print(f"  not noticed: {family}.ptx:{removal.line + 1} {removal.kernel}: {removal.text}", flush=True)
    return len(everything), unnoticed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Leaves out each barrier and each atomic of the kernels' PTX in turn.")
    parser.add_argument("--build", type=existing_folder, default=ROOT / "build/cpp", help="folder of the C++ build")
    parser.add_argument("--then", type=existing_folder, help="another one, for what the first does not notice")
    parser.add_argument("--ptx", type=existing_folder, default=ROOT / "build/ptx", help="folder of tools/make_ptx.sh")
    parser.add_argument("--arch", default="80", help="architecture of the PTX (default: %(default)s)")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="only this file; may be repeated")
    parser.add_argument("--limit", type=count, default=300, help="seconds of CPU for a run (default: %(default)s)")
    args = parser.parse_args(argv)
    builds = [build for build in (args.build, args.then) if build]
    ptx, families = args.ptx / f"sm_{args.arch}", args.family or list(FAMILIES)
    needed = [ptx / f"{family}.ptx" for family in families]
    needed += [build / FAMILIES[family][0] for build in builds for family in families]
    if missing := [path for path in needed if not path.is_file()]:  # before minutes of tests
        parser.error(f"no {missing[0]}; run tools/test_cpp.sh and tools/make_ptx.sh first (with nvcc)")
    with one_line_errors(parser):
        for family in families:
            tried, unnoticed = try_family(family, builds, ptx, args.limit)
            print(f"{family}: {tried - len(unnoticed)} of {tried} removals noticed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
