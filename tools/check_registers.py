#!/usr/bin/env python3
"""Checks that the registers of every kernel suffice for each launch of it that its launch bounds allow.

A multiprocessor has 65,536 registers for the threads of the blocks that run on it, of sm_80 as of sm_90. A launch whose
block needs more fails. So each kernel must declare the most threads of its blocks (``__launch_bounds__``, ``.maxntid``
in PTX; the tests on PTX refuse a launch above it), and with them, and as many blocks at a time as it declares, its
registers must fit. They are those that ptxas reports, rounded up as they are handed out: by 8 a thread, to four warps
at a time (CUDA's occupancy calculator).

Run tools/check_nvcc.sh first; it writes the reports and the PTX. Nothing is run on a GPU.

    python tools/check_registers.py [folder of reports, default build/nvcc] [folder of PTX, default build/ptx/sm_80]
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

REGISTERS = 65536
"""Of a multiprocessor."""
ENTRY = re.compile(r"\.entry (\w+)\(.*?\)\s*((?:\.\w+ [^\n{]*\s)*)\{", re.DOTALL)
DIRECTIVE = re.compile(r"\.(\w+) ([\d, ]+)")
USED = re.compile(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", re.DOTALL)


class Bounds(NamedTuple):
    """What a kernel declares of its launches."""

    threads: int  # the most of a block; 0: not declared
    blocks: int  # at a time on a multiprocessor, at least


def bounds_in(ptx: str) -> dict[str, Bounds]:
    """The bounds of each kernel, by its mangled name."""
    found = {}
    for name, directives in ENTRY.findall(ptx):
        declared = dict(DIRECTIVE.findall(directives))
        threads = 1 if "maxntid" in declared else 0
        for size in declared.get("maxntid", "0").split(","):
            threads *= int(size)
        found[name] = Bounds(threads, int(declared.get("minnctapersm", "1")))
    return found


def registers_in(report: str) -> dict[str, int]:
    """The registers of a thread of each kernel, by its mangled name."""
    return {name: int(count) for name, count in USED.findall(report)}


def needed(registers: int, threads: int) -> int:
    """The registers that a block gets."""
    warps = -(-threads // 32)
    return -(-registers // 8) * 8 * 32 * (-(-warps // 4) * 4)


def faults(bounds: dict[str, Bounds], registers: dict[str, int]) -> list[str]:
    """What is wrong, one line a kernel."""
    bad = [f"{name}: no report of its registers" for name in bounds if name not in registers]
    for name, count in registers.items():
        threads, blocks = bounds[name]
        if not threads:
            bad.append(f"{name}: no __launch_bounds__, so nothing says that a block of it fits")
        elif needed(count, threads) * blocks > REGISTERS:
            bad.append(f"{name}: {count} registers, {threads} threads, {blocks} blocks at a time need over {REGISTERS}")
    return bad


def main() -> int:
    folder, ptx = map(Path, [*sys.argv[1:], *("build/nvcc", "build/ptx/sm_80")[len(sys.argv) - 1 :]])
    reports = sorted(folder.glob("*.log"))
    if not reports:
        sys.exit(f"check_registers: no .log in {folder}: run tools/check_nvcc.sh {folder} first")
    bad = []
    print(f"{'file':<28}{'kernels':>8}{'registers':>11}{'threads':>9}{'most of 65536 a block':>24}")
    for report in reports:
        name = report.stem.rsplit(".", 1)[0]  # without its architecture
        registers, bounds = registers_in(report.read_text()), bounds_in((ptx / f"{name}.ptx").read_text())
        bad += [f"{report.stem}: no kernel"] if not registers else faults(bounds, registers)
        blocks = [(needed(count, bounds[k].threads), count, bounds[k].threads) for k, count in registers.items()]
        most, count, threads = max(blocks, default=(0, 0, 0))
        print(f"{report.stem:<28}{len(registers):>8}{count:>11}{threads:>9}{most:>24}")
    for fault in bad:
        print(f"check_registers: {fault}", file=sys.stderr)
    if not bad:
        print("check_registers: every launch within launch bounds fits (compiled only, not run on a GPU)")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
