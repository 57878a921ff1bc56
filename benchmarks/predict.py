#!/usr/bin/env python3
"""What the instruction counts of the memory-bound kernels allow, against what memory allows.

Counts are taken on nvcc's PTX, run on the host (csrc/simt/ptx), so no GPU is needed; ptxas makes somewhat fewer or more
instructions of them. Copies of a register are left out, as machine code has none. Where the lanes of a warp part, an
instruction in a loop counts as often as the lane that runs it most, which is less than a GPU issues if the lanes take
their turns at different times.

A kernel takes at least its instructions divided by what the card can issue (one a cycle and scheduler, four schedulers
a multiprocessor) and at least its bytes divided by the card's bandwidth: the larger is its floor. "of a copy" is the
share of a copy's speed that is left if nothing but instructions stood in the way: an upper bound, not a measurement.

    tools/test_cpp.sh build/cpp ""       builds the program that counts, and the PTX
    python benchmarks/predict.py         prints the table
    python benchmarks/predict.py --check     exit status 1 if a count is above the recorded one or above its budget
    python benchmarks/predict.py --update    records the counts (instructions.json) and writes the table to RESULTS.md
    python benchmarks/predict.py --measured FILE    writes what bench_ops.py --json measured on a GPU to RESULTS.md,
                                                    beside what the recorded counts allow
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import existing_file, existing_folder, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks/instructions.json"
RESULTS = ROOT / "benchmarks/RESULTS.md"
PREDICTED, MEASURED = "predicted", "measured"  # parts of RESULTS.md
LANES, SCHEDULERS = 32, 4


@dataclass(frozen=True)
class Card:
    """A card by its data sheet: multiprocessors, boost clock in Hz, bandwidth in bytes a second."""

    name: str
    processors: int
    clock: float
    bandwidth: float

    def issue(self, instructions: float) -> float:
        """Seconds that an element's instructions take."""
        return instructions / LANES / (self.processors * SCHEDULERS * self.clock)

    def transfer(self, moved: float) -> float:
        """Seconds that an element's bytes take, on the way in or out."""
        return moved / self.bandwidth

    def share_of_copy(self, instructions: float, moved: float) -> float:
        """The share of a copy's speed that the instructions leave."""
        return min(1.0, self.transfer(moved) / self.issue(instructions))


CARDS = (Card("H100 SXM", 132, 1.755e9, 3.35e12), Card("A100 80GB", 108, 1.41e9, 2.039e12))

# Op -> bytes of memory traffic an element of bfloat16 weights or activations (factors a column stay in the cache), and
# the budget of instructions an element. Products are of one token and a matrix of which half is stored: a bit for each
# weight, its value or code, and a bfloat16 scale for 128 columns. Their elements are all weights, stored or not.
OPS = {
    "row top-k": (4, 40),
    "2:4": (4, 18),
    "matrix top-k": (8, 50),
    "moments": (2, 8),
    "moments, weighted": (2, 8),
    "inverse_square_norm": (2, 6),
    "packed_linear": (1 / 8 + 2 / 2, 30),
    "quantized_linear, 8 bits": (1 / 8 + 1 / 2 + 2 / 128, 20),
    "quantized_linear, 4 bits": (1 / 8 + 1 / 4 + 2 / 128, 20),
}

# Op of bench_ops.py -> op above, where the names differ.
MEASURED_OPS = {"top-k by row": "row top-k", "top-k by matrix": "matrix top-k", "1/|a|^2": "inverse_square_norm"}

Counts = dict[str, float]
""""op, columns" -> a thread's instructions an element, to two digits."""


def budget_of(case: str) -> int:
    return OPS[case.rpartition(", ")[0]][1]


def counted(build: Path, ptx: Path) -> Counts:
    """Counts on the PTX for sm_80, which is also that for sm_90 (tools/make_ptx.sh).

    Raises:
        KeyError: an op that this file does not know.
    """
    program = build / "count_instructions"
    for needed in (program, ptx):
        if not needed.exists():
            sys.exit(f'predict: no {needed}: run tools/test_cpp.sh {build} "" first (with nvcc)')
    run = subprocess.run([program], env={**os.environ, "ACE_PTX": str(ptx)}, check=True, capture_output=True, text=True)
    found: Counts = {}
    for line in run.stdout.splitlines():
        op, columns, elements, instructions = line.split("\t")
        assert op in OPS, op
        found[f"{op}, {columns}"] = round(int(instructions) * LANES / int(elements), 2)
    return found


def table(found: Counts) -> str:
    """A Markdown table: a line for each case."""
    heads = ["op, columns", "budget", "met", "instructions"]
    for card in CARDS:
        heads += [f"{card.name}: ps of them", "ps of the bytes", "of a copy, at most"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---:|---|" + "---:|" * (len(heads) - 3)]
    for case, count in found.items():
        moved, budget = OPS[case.rpartition(", ")[0]]
        cells = [case, str(budget), "yes" if count <= budget else "no", f"{count:.1f}"]
        for card in CARDS:
            issue, transfer, share = card.issue(count), card.transfer(moved), card.share_of_copy(count, moved)
            cells += [f"{issue * 1e12:.2f}", f"{transfer * 1e12:.2f}", f"{share:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def faults(found: Counts, recorded: Counts) -> list[str]:
    """Counts above the recorded ones or their budgets, and cases that are not recorded, a line each."""
    bad = []
    for case, count in found.items():
        was = recorded.get(case)
        if was is None or count > was:
            bad.append(f"{case}: {count} instructions an element, recorded: {was}")
        if count > budget_of(case):
            bad.append(f"{case}: {count} instructions an element, budget: {budget_of(case)}")
    return bad


def measured(file: Path, recorded: Counts) -> str:
    """A Markdown table of what bench_ops.py measured, with what its card's counts allow where they are known."""
    run = json.loads(file.read_text())
    card = next((card for card in CARDS if card.name.split()[0] in run["device"]), None)
    lines = [f"{run['device']}, torch {run['torch']}, {run['dtype']}", ""]
    lines += ["| op | shape | time | GB/s | of a copy | at most, by the counts |", "|---|---|---:|---:|---:|---:|"]
    for row in run["rows"]:
        case = f"{MEASURED_OPS.get(row['op'], row['op'])}, "
        counts = [n for name, n in recorded.items() if name.startswith(case)] if card else []
        allowed = f"{card.share_of_copy(max(counts), OPS[case[:-2]][0]):.0%}" if card and counts else ""
        cells = [row["op"], row["shape"], f"{row['us']:.1f} µs", f"{row['gb_s']:.0f}", f"{row['copy_percent']:.0f}%"]
        lines.append("| " + " | ".join([*cells, allowed]) + " |")
    return "\n".join(lines)


def write_results(part: str, text: str) -> None:
    """Replaces a part of RESULTS.md, which lies between two comments."""
    begin, end = f"<!-- predict.py: {part} -->\n", f"<!-- predict.py: end of {part} -->"
    before, _, rest = RESULTS.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"predict: {RESULTS} has no lines {begin.strip()} and {end}")
    RESULTS.write_text(before + begin + text + "\n" + end + after)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the kernels' instruction counts allow.")
    parser.add_argument("--build", type=existing_folder, default=ROOT / "build/cpp", help="folder of the C++ build")
    parser.add_argument("--ptx", type=existing_folder, default=ROOT / "build/ptx/sm_80", help="folder of PTX files")
    parser.add_argument("--check", action="store_true", help="fail where a count is above the recorded one")
    parser.add_argument("--update", action="store_true", help="record the counts, write the table to RESULTS.md")
    parser.add_argument("--measured", type=existing_file, help="the JSON of bench_ops.py: its table goes to RESULTS.md")
    args = parser.parse_args(argv)
    if args.measured:
        if args.check or args.update:
            parser.error("--measured counts nothing; leave out --check and --update")
        try:
            text = measured(args.measured, json.loads(RECORD.read_text()))
        except (ValueError, LookupError, TypeError):
            parser.error(f"--measured {str(args.measured)!r} is not what bench_ops.py --json writes")
        print(text)
        write_results(MEASURED, text)
        return 0
    with one_line_errors(parser):
        return count_and_check(args)


def count_and_check(args: argparse.Namespace) -> int:
    found = counted(args.build, args.ptx)
    print("bfloat16; instructions and picoseconds an element, counted on PTX on the host, not run on a GPU\n")
    print(table(found))
    if args.update:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        write_results(PREDICTED, table(found))
    bad = faults(found, json.loads(RECORD.read_text())) if args.check else []
    for fault in bad:
        print(f"predict: {fault} (if it must be so: python benchmarks/predict.py --update)", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
