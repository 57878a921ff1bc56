"""Perplexity beside bits a weight: a dense model, quantized, pruned, and both.

    python benchmarks/equal_bytes.py --model MODEL --output DIR
    python benchmarks/equal_bytes.py --table DIR [DIR ...]

Each row of the grid prunes and quantizes the model in memory, saves it, packs it and evaluates it on three texts. Bits
a weight are those of the written file: every part of the matrices in the blocks, with bitmaps and scales. Rows without
zeros are written in the form compressed-tensors, which has no bitmap; it stores codes of 4 and 8 bits, so the row of
3 bits counts 3 bits a code and the scales. A second call continues where the first one stopped.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ace_ext.compare.bench import Bench
from ace_ext.compare.grid import Evaluation, Grid, Study
from ace_ext.compare.journal import Cell
from ace_ext.engine.devices import pick_device
from ace_ext.models.blocks import find_blocks
from ace_ext.models.loading import load_model
from ace_ext.packed.compressed_tensors import compress
from ace_ext.packed.packing import pack
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.method import parse

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import count, one_line_errors

TEXTS = ("wiki-mini", "news-mini", "code-mini")
BITS = (16, 8, 4, 3)
ROWS = "rows.jsonl"
NONE = "0"
"""The amount of rows that remove nothing."""


def method(zeros: str, bits: int, arguments: argparse.Namespace, then: str = "") -> str:
    """The text of a row's method, with the stage ``then`` at its end; empty for the dense model."""
    stages = [] if zeros == NONE else [arguments.prune]
    group = "" if arguments.group is None else f", group={arguments.group}"
    stages += [] if bits == 16 else [f"quantize(bits={bits}{group})"]
    stages += [then] if then else []
    return " + ".join(stages)


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Zeros, bits and method of each row. Survivors have 16, 8 or 4 bits; 3 bits are for rows without zeros."""
    for then in ("", arguments.then) if arguments.then else ("",):
        for zeros in (NONE, *arguments.zeros):
            for bits in BITS:
                text = method(zeros, bits, arguments, then)
                if (bits == 3 and zeros != NONE) or text == then:  # the dense model
                    continue
                yield zeros, bits, text


def bits_a_weight(bench: Bench, config: PruneConfig, zeros: str, bits: int) -> float:
    """Bits of a weight in the written file."""
    grid = config.method.grid
    with tempfile.TemporaryDirectory(prefix="equal-bytes-") as folder:
        dense = Path(folder, "dense")
        bench.model.save_pretrained(dense)
        if zeros == NONE:
            assert grid is not None
            blocks = find_blocks(bench.model)
            if bits == 3:
                shapes = [linear.weight.shape for block in blocks for linear in block.linears.values()]
                scales = sum(rows * grid.groups(cols) for rows, cols in shapes)
                return bits + 16 * scales / sum(rows * cols for rows, cols in shapes)
            names = [block.full_name(child) for block in blocks for child in block.linears]
            return compress(dense, Path(folder, "packed"), grid, names).bits
        pattern = None if config.pattern is None else (config.pattern.keep_n, config.pattern.group_m)
        return pack(dense, Path(folder, "packed"), "bitmap", pattern, grid).bits


def measure(
    bench: Bench, config: PruneConfig, zeros: str, bits: int, text: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row: prunes, quantizes, evaluates and packs."""
    cell = Cell(text, zeros, arguments.calibration, arguments.nsamples, arguments.seqlen, arguments.seed)
    run = bench.run(cell, config, "auto", None)
    return {
        "zeros": zeros,
        "bits": bits,
        "method": text,
        "bits_a_weight": bits_a_weight(bench, config, zeros, bits),
        "sparsity": run.sparsity,
        "seconds": run.seconds,
        "perplexity": {name: found.perplexity for name, found in run.perplexity.items()},
    }


def run(arguments: argparse.Namespace) -> None:
    """Measures the rows that the journal does not have."""
    done = {(row["zeros"], row["method"]) for row in read(arguments.output)}
    grid = Grid((parse("wanda"),), calibrations=(arguments.calibration,))
    evaluation = Evaluation(texts=TEXTS, windows=arguments.eval_windows)
    study = Study(arguments.model, grid, evaluation)
    configs = {  # all of them before the first is measured
        (zeros, bits, text): PruneConfig(text) if zeros == NONE else study.config(parse(text), zeros)
        for zeros, bits, text in rows(arguments)
    }
    bench = Bench(load_model(study.model, "bfloat16", pick_device("cpu")), evaluation, study.text_field)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / ROWS).open("a", encoding="utf-8") as file:
        if not done:
            dense = {name: found.perplexity for name, found in bench.evaluate().items()}
            write(file, {"zeros": NONE, "bits": 16, "method": "dense", "bits_a_weight": 16.0, "perplexity": dense})
        for (zeros, bits, text), config in configs.items():
            if (zeros, text) not in done:
                write(file, measure(bench, config, zeros, bits, text, arguments))


def write(file: Any, row: dict[str, Any]) -> None:
    """One line, at once."""
    print(json.dumps(row), file=file, flush=True)
    print(line(row), file=sys.stderr)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows that were measured."""
    journal = folder / ROWS
    return [json.loads(text) for text in journal.read_text(encoding="utf-8").splitlines()] if journal.exists() else []


def line(row: dict[str, Any]) -> str:
    """A row of the table. The last figure is the geometric mean over the texts."""
    values = list(row["perplexity"].values())
    figures = " | ".join(f"{value:.2f}" for value in [*values, statistics.geometric_mean(values)])
    zeros = "" if row["zeros"] == NONE else row["zeros"]
    return f"| {zeros} | `{row['method']}` | {row['bits_a_weight']:.2f} | {figures} |"


def main(argv: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or a GGUF file")
    parser.add_argument("--output", type=Path, help="the folder of the journal")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of these folders and stop")
    parser.add_argument("--prune", default="balanced", help="the method before quantize")
    parser.add_argument("--zeros", nargs="+", default=["0.5", "2:4", "0.7"])
    parser.add_argument("--group", type=int, help="columns that share a scale (default: that of quantize)")
    parser.add_argument("--then", choices=("train", "distill"), help="each row also with this stage after rounding")
    parser.add_argument("--calibration", default="wiki-mini")
    parser.add_argument("--nsamples", type=count, default=64)
    parser.add_argument("--seqlen", type=count, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-windows", type=count, default=12)
    arguments = parser.parse_args(argv)
    if arguments.table:
        ignored = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
        ignored.remove("table")
        if ignored:
            parser.error(f"--table prints what was measured; leave out --{ignored[0].replace('_', '-')}")
        missing = [str(folder) for folder in arguments.table if not (folder / ROWS).is_file()]
        if missing:
            parser.error(f"--table {missing[0]!r} has no {ROWS}; give a folder that --output wrote")
        for folder in arguments.table:
            print(f"\n{folder.name}\n\n| zeros | method | bits | {' | '.join(TEXTS)} | mean |")
            print("|---|---|--:|--:|--:|--:|--:|")
            print("\n".join(map(line, read(folder))))
    elif arguments.model and arguments.output:
        if arguments.output.exists() and not arguments.output.is_dir():
            parser.error(f"--output {str(arguments.output)!r} is a file; give a folder")
        with one_line_errors(parser):
            run(arguments)
    else:
        parser.error("give --model and --output, or --table")


if __name__ == "__main__":
    main()
