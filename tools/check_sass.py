#!/usr/bin/env python3
"""Checks the machine code that nvcc generated for the memory-bound kernels.

- Streaming kernels load global memory 128 bits at a time (``LDG.E.128``). Those that write packs store 128 bits too, or
  eight bytes of a mask (``STG.E.64``).
- No kernel uses local memory (``LDL``, ``STL``): no register was spilled, and no array is outside registers.
- Those that read each value once have at least three 128-bit loads in flight: so many are issued before the first value
  that one of them brings is used.
- Histograms increment shared counters by ``ATOMS.POPC.INC``: the hardware adds up lanes that hit the same counter.

Run tools/check_nvcc.sh first; it writes the .cubin files. The disassembler comes with the CUDA toolkit, or from PyPI:
``pip install nvidia-cuda-nvdisasm``. Nothing is run on a GPU: this checks instructions, not speed.

    python tools/check_sass.py [folder of .cubin files, default build/nvcc]
"""

import collections
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

# Kernel name -> instructions that each of its template instances must contain.
EXPECTED = {
    "prune_rows_kernel": ("LDG.E.128", "STG.E.128", "ATOMS.POPC.INC"),
    "histogram_kernel": ("LDG.E.128", "ATOMS.POPC.INC"),
    "settle_kernel": ("LDG.E.128", "STG.E.128", "ATOMS.POPC.INC"),
    "count_ties_kernel": ("LDG.E.128",),
    "apply_kernel": ("LDG.E.128", "STG.E.128"),
    "prune_nm_pack_kernel": ("LDG.E.128", "STG.E.128"),
    "prune_nm_lane_kernel": (),
    "partial_moments_kernel": ("LDG.E.128",),
    "inverse_square_norm_kernel": ("LDG.E.128",),
    "scaled_squares_kernel": ("LDG.E.128", "STG.E.128"),
    "score_kernel": ("LDG.E.128", "STG.E.128"),
    "row_sums_kernel": ("LDG.E.128",),
    "column_partials_kernel": ("LDG.E.128",),
    "refine_swaps_kernel": (),
    "packed_linear_kernel": ("LDG.E.128",),
    "unpack_bitmap_kernel": ("LDG.E.128",),
    "quantized_linear_kernel": ("LDG.E.128",),
    "unpack_quantized_kernel": ("LDG.E.128", "STG.E.128"),
}
# Kernel name -> 128-bit loads that each of its template instances must have in flight.
IN_FLIGHT = {
    "histogram_kernel": 3,
    "prune_nm_pack_kernel": 3,
    "partial_moments_kernel": 3,
    "inverse_square_norm_kernel": 3,
    "score_kernel": 3,
}
# In groups of eight ptxas puts off some loads of a kernel that has no factors to load: 28 comparisons hide two as well.
FEWER_IN_FLIGHT = {("prune_nm_pack_kernel", "MagnitudeScore", "Li8E"): 2}
LABEL = re.compile(r"^\s*\.L_x_\d+:")
REGISTER = re.compile(r"\bR(\d+)\b(\.64)?")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
FUNCTION = re.compile(r"^\.text\.(\S+):")


def find_nvdisasm() -> str:
    """The disassembler's path; exits if there is none."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = shutil.which("nvdisasm") or next(map(str, sorted(packages.glob("**/bin/nvdisasm"))), None)
    if found is None:
        sys.exit("check_sass: no nvdisasm: put the CUDA toolkit on PATH or pip install nvidia-cuda-nvdisasm")
    return found


def code_of(nvdisasm: str, cubin: Path) -> dict[str, list[str]]:
    """The lines of each kernel of the file, by mangled name."""
    text = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if function := FUNCTION.match(line):
            current = kernels.setdefault(function[1], [])
        else:
            current.append(line)
    return kernels


def counts_of(lines: list[str]) -> collections.Counter:
    """Instructions by opcode."""
    return collections.Counter(found[1] for line in lines if (found := INSTRUCTION.search(line)))


def in_flight(lines: list[str]) -> int:
    """The most 128-bit global loads of which no value is used yet, in code without a label in between."""
    most = 0
    pending: list[set[int]] = []  # the registers of each
    for line in lines:
        if LABEL.match(line):
            pending = []
        found = INSTRUCTION.search(line)
        if not found:
            continue
        operands = line[found.end() :].split(";")[0].split(",")
        registers = [
            {int(number) + n for number, wide in REGISTER.findall(operand) for n in range(2 if wide else 1)}
            for operand in operands
        ]
        loads = found[1].startswith("LDG.E.128")
        used = set().union(*(registers[1:] if loads else registers))
        pending = [load for load in pending if not load & used]
        if loads:
            first = min(registers[0])
            pending.append(set(range(first, first + 4)))
            most = max(most, len(pending))
    return most


def has(counts: collections.Counter, opcode: str) -> bool:
    """Whether the opcode occurs, with any modifiers."""
    return any(name == opcode or name.startswith(opcode + ".") for name in counts)


def faults(mangled: str, lines: list[str]) -> list[str]:
    """What is wrong with a kernel's code, one line each."""
    counts = counts_of(lines)
    bad = [f"{mangled}: local memory ({name})" for name in counts if name.split(".")[0] in ("LDL", "STL")]
    for kernel, opcodes in EXPECTED.items():
        # Mangled names have their length before them: with it, score_kernel does not match as part of a longer name.
        if f"{len(kernel)}{kernel}I" in mangled:
            if "MaskOutcome" in mangled:
                opcodes = tuple("STG.E.64" if opcode == "STG.E.128" else opcode for opcode in opcodes)
            bad += [f"{mangled}: no {opcode}" for opcode in opcodes if not has(counts, opcode)]
    for kernel, usual in IN_FLIGHT.items():
        if f"{len(kernel)}{kernel}I" not in mangled:
            continue
        fewer = [n for parts, n in FEWER_IN_FLIGHT.items() if all(part in mangled for part in parts)]
        least, found = min([usual, *fewer]), in_flight(lines)
        if found < least:
            bad.append(f"{mangled}: {found} 128-bit loads in flight, not {least}")
    return bad


def examine(nvdisasm: str, cubin: Path) -> tuple[str, list[str], collections.Counter]:
    """A file's line of the table, what is wrong with it, and how many kernels it has of each that is expected."""
    kernels = code_of(nvdisasm, cubin)
    total = sum(map(counts_of, kernels.values()), collections.Counter())
    row = [
        sum(n for name, n in total.items() if name.startswith(wanted))
        for wanted in (("LDG.E.128",), ("STG.E.128",), ("ATOMS.POPC.INC",), ("LDL", "STL"))
    ]
    line = f"{cubin.stem:<28}{len(kernels):>8}{row[0]:>9}{row[1]:>9}{row[2]:>10}{row[3]:>9}"
    bad = [fault for mangled, lines in kernels.items() for fault in faults(mangled, lines)]
    seen = [kernel for mangled in kernels for kernel in EXPECTED if f"{len(kernel)}{kernel}I" in mangled]
    return line, bad, collections.Counter(seen)


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/nvcc")
    cubins = sorted(folder.glob("*.cubin"), key=lambda file: -file.stat().st_size)
    if not cubins:
        sys.exit(f"check_sass: no .cubin in {folder}: run tools/check_nvcc.sh {folder} first")
    bad, seen = [], collections.Counter()
    print(f"{'file':<28}{'kernels':>8}{'LDG.128':>9}{'STG.128':>9}{'POPC.INC':>10}{'LDL/STL':>9}")
    with ProcessPoolExecutor() as pool:
        for line, faulty, kernels in pool.map(partial(examine, find_nvdisasm()), cubins):
            print(line)
            bad += faulty
            seen.update(kernels)
    bad += [f"no instance of {kernel} was found" for kernel in EXPECTED if not seen[kernel]]
    for fault in bad:
        print(f"check_sass: {fault}", file=sys.stderr)
    if not bad:
        print("check_sass: 128-bit loads in every streaming kernel, no local memory (compiled only, not run on a GPU)")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
