#!/usr/bin/env python3
"""What the instruction counts of the memory-bound kernels allow, against what memory allows.

Counts are taken on nvcc's PTX, run on the host (csrc/simt/ptx), so no GPU is needed; ptxas makes somewhat fewer or more
instructions of them. A kernel takes at least its instructions divided by what the card can issue (one a cycle and
scheduler, four schedulers a multiprocessor) and at least its bytes divided by the card's bandwidth. "of a copy" is the
share of a copy's speed that is left if nothing but instructions stood in the way: an upper bound, not a measurement.

    tools/test_cpp.sh build/cpp ""                     builds the program that counts, and the PTX
    python benchmarks/predict.py [--arch 90] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANES, SCHEDULERS = 32, 4


@dataclass(frozen=True)
class Card:
    """A card by its data sheet: multiprocessors, boost clock in Hz, bandwidth in bytes a second."""

    name: str
    processors: int
    clock: float
    bandwidth: float

    def share_of_copy(self, instructions: float, moved: float) -> float:
        """Time of the bytes divided by the time of the instructions, both an element's; at most 1."""
        issue = instructions / LANES / (self.processors * SCHEDULERS * self.clock)
        return min(1.0, moved / self.bandwidth / issue)


CARDS = (Card("H100 SXM", 132, 1.755e9, 3.35e12), Card("A100 80GB", 108, 1.41e9, 2.039e12))

# Op -> bytes of memory traffic an element of bfloat16 weights or activations (factors a column stay in the cache), and
# the budget of instructions an element.
OPS = {
    "row top-k": (4, 40),
    "2:4": (4, 18),
    "matrix top-k": (8, 50),
    "moments": (2, 8),
    "moments, weighted": (2, 8),
    "inverse_square_norm": (2, 6),
}


@dataclass(frozen=True)
class Case:
    """One op at one width: instructions are a thread's, an element."""

    op: str
    columns: int
    instructions: float
    bytes: int
    budget: int
    of_copy: dict[str, float]


def cases(counted: str) -> list[Case]:
    """The lines that count_instructions printed, with what they imply.

    Raises:
        KeyError: an op that this file does not know.
    """
    found = []
    for line in counted.splitlines():
        op, columns, elements, instructions = line.split("\t")
        moved, budget = OPS[op]
        each = int(instructions) * LANES / int(elements)
        shares = {card.name: card.share_of_copy(each, moved) for card in CARDS}
        found.append(Case(op, int(columns), each, moved, budget, shares))
    return found


def table(found: list[Case]) -> str:
    """A Markdown table."""
    heads = ["op", "columns", "instructions / element", "budget", "bytes / element"]
    heads += [f"{card.name}: of a copy, at most" for card in CARDS]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for case in found:
        over = "" if case.instructions <= case.budget else " (over)"
        cells = [case.op, str(case.columns), f"{case.instructions:.1f}{over}", str(case.budget), str(case.bytes)]
        lines.append("| " + " | ".join(cells + [f"{share:.0%}" for share in case.of_copy.values()]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="What the kernels' instruction counts allow.")
    parser.add_argument("--build", type=Path, default=ROOT / "build/cpp", help="folder of the C++ build")
    parser.add_argument("--ptx", type=Path, default=ROOT / "build/ptx", help="folder of tools/make_ptx.sh")
    parser.add_argument("--arch", default="80", help="architecture of the PTX, 80 or 90 (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the cases here")
    args = parser.parse_args()
    program, folder = args.build / "count_instructions", args.ptx / f"sm_{args.arch}"
    for needed in (program, folder):
        if not needed.exists():
            sys.exit(f'predict: no {needed}: run tools/test_cpp.sh {args.build} "" first')
    run = subprocess.run(
        [program], env={**os.environ, "ACE_PTX": str(folder)}, check=True, capture_output=True, text=True
    )
    found = cases(run.stdout)
    print(f"PTX for sm_{args.arch}, bfloat16; counted on the host, not run on a GPU\n")
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps([asdict(case) for case in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
