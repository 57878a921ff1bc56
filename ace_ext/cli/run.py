"""``ace-prune run``: prune a model into a new folder."""

import argparse
import contextlib
from pathlib import Path

from ace_ext.cli import args as shared
from ace_ext.cli.parser import VERBS
from ace_ext.engine.distributed import launched, number_of
from ace_ext.engine.progress import Progress
from ace_ext.formats import DEFAULT_FORMAT, FORMATS
from ace_ext.runs.pipeline import prune_folder

EXAMPLES = (
    "run --model MODEL --output pruned",
    "run --model MODEL --output pruned --method balanced --calibration wiki-mini",
    "run --model MODEL --output pruned --pattern 2:4 --calibration text.jsonl --text-field content",
    "run --model MODEL --output smaller --remove neurons=0.2 --calibration wiki-mini",
    "run --model MODEL --output pruned --calibration wiki-mini --max-memory 8GB --resume",
)
"""Commands that ``--help`` shows."""


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser(
        "run",
        help=VERBS["run"],
        epilog=shared.preset_table(),
    )
    shared.add_model(parser)
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument(
        "--format", choices=FORMATS, default=DEFAULT_FORMAT, help="output format, see --help-all (default: %(default)s)"
    )
    shared.add_pruning(parser)
    shared.add_calibration(parser)
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--resume", action="store_true", help="continue an interrupted run with the same arguments, if there is one"
    )
    shared.add_memory(group)
    _add_files(group)
    parser.show_common(
        *("model", "output", "method", "sparsity", "pattern", "remove", "calibration", "nsamples", "seqlen", "device"),
        *("max_memory", "resume", "overwrite", "format", "evaluate", "report"),
        tables=lambda: f"{shared.stage_tables()}\n\n{_formats()}",
    )
    parser.set_defaults(action=run)


def _formats() -> str:
    return shared.table("formats", {name: output_format.summary for name, output_format in FORMATS.items()})


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--save-stats",
        metavar="FILE",
        type=Path,
        help="save the statistics of the dense model, so that later runs can prune from them (--stats); this run then "
        "uses collect(order=block)",
    )
    group.add_argument(
        "--stats",
        metavar="FILE",
        type=Path,
        help="prune from saved statistics, without a forward pass and without calibration text: at any sparsity or "
        "pattern, with any method that needs no other statistics",
    )
    shared.add_reports(group, "block")


def run(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    shared.check_written(args)
    request = shared.request_from(
        args,
        overwrite=args.overwrite,
        resume=args.resume,
        save_stats=args.save_stats,
        stats=args.stats,
        format=args.format,
    )
    with contextlib.ExitStack() as opened:
        progress = Progress(shared.shows_progress(args), shared.open_log(args, opened), notes=not args.quiet)
        report, path = prune_folder(
            request.model,
            args.output,
            request.config,
            request.calibration,
            request.options,
            request.device,
            request.dtype,
            progress,
        )
    if not launched() or number_of("RANK", 0) == 0:
        if args.report is not None:
            from ace_ext.reporting.run_page import write_run_report  # imported here: most runs write no page

            write_run_report(report, args.report, path)
        print(report.to_json() if args.json else f"{report.table()}\nwritten to {path}")
    return 0
