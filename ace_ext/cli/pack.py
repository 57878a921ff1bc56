"""``ace-prune pack``: a smaller copy of a pruned folder, without its zeros."""

import argparse
import json
from pathlib import Path

from ace_ext.cli import args as shared
from ace_ext.cli.parser import VERBS
from ace_ext.formats import grid_of, pattern_of, table_grids_of
from ace_ext.packed import CODECS, DEFAULT_CODEC
from ace_ext.packed.compressed_tensors import NAME, SUMMARY, compress
from ace_ext.packed.files import is_packed
from ace_ext.packed.packing import pack
from ace_ext.records import REPORT_NAME
from ace_ext.runs.output import check_apart, read_report
from ace_ext.runs.verify import check_unchanged

EXAMPLES = (
    "pack pruned --output packed",
    "pack pruned --output small --format archive",
)
"""Commands that ``--help`` shows."""


FORMATS = {name: codec.summary for name, codec in CODECS.items()} | {NAME: SUMMARY}


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser(
        "pack",
        help=VERBS["pack"],
        epilog=shared.table("formats", FORMATS),
    )
    parser.add_argument("folder", help="a folder that ace-prune run wrote; it is not changed")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")
    parser.add_argument("--format", default=DEFAULT_CODEC, choices=FORMATS, help="see below (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.set_defaults(action=run)


def run(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    check_apart(Path(args.output), args.folder)
    report = None
    if (Path(args.folder) / REPORT_NAME).is_file():
        report = read_report(args.folder)
        if not is_packed(args.folder):  # which is refused below
            check_unchanged(args.folder)
    grid = None if report is None else grid_of(report)
    if args.format == NAME:
        names = [] if report is None else [matrix.name for matrix in report.matrices]
        result = compress(args.folder, args.output, grid, names)
    else:
        pattern, tables = (None, {}) if report is None else (pattern_of(report), table_grids_of(report))
        result = pack(args.folder, args.output, args.format, pattern, grid, tables)
    if args.json:
        print(json.dumps(vars(result)))
        return 0
    share, matrices = (
        packed / dense
        for packed, dense in (
            (result.packed_bytes, result.dense_bytes),
            (result.matrix_packed_bytes, result.matrix_dense_bytes),
        )
    )
    same = "unpacking restores the same bytes" if args.format in CODECS else "the weights are the same"
    codes = f" ({result.quantized} as codes), {result.bits:.2f} bits a weight" if result.quantized else ""
    print(
        f"{result.matrices} matrices{codes}, {result.packed_bytes / 1e6:.1f} MB: {share:.3f} of the dense files, "
        f"{matrices:.3f} of the matrices alone; {same}\nwritten to {result.folder}"
    )
    pruned = 0 if report is None else sum(matrix.size for matrix in report.matrices)
    if result.matrix_weights < pruned:
        print(
            f"{1 - result.matrix_weights / pruned:.0%} of the pruned weights are stored dense: their tensors have no "
            f"N:M along their rows, or too few zeros for format {args.format}"
        )
    return 0
