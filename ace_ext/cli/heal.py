"""``ace-prune heal``: distil a pruned folder from its dense model into a new folder."""

import argparse
import contextlib

from ace_ext.cli import args as shared
from ace_ext.cli.parser import VERBS
from ace_ext.data.corpora import SOURCES
from ace_ext.engine.devices import pick_device
from ace_ext.healing.progress import HealProgress
from ace_ext.healing.settings import HealSettings
from ace_ext.process_memory import parse_bytes
from ace_ext.reporting.run_page import write_run_report
from ace_ext.runs.heal import heal_folder
from ace_ext.runs.heal_request import TOKENS, HealOptions, HealRequest
from ace_ext.runs.heal_text import calibration_of, recorded_fields
from ace_ext.runs.options import Calibration
from ace_ext.runs.output import read_report

EXAMPLES = (
    "heal pruned --output healed --tokens 65536",
    "heal pruned --output healed --minutes 30 --max-memory 8GB --resume",
)
"""Commands that ``--help`` shows."""


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("heal", help=VERBS["heal"])
    parser.add_argument("folder", help="a folder that ace-prune run wrote; it is not changed")
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    parser.add_argument(
        "--dense", metavar="MODEL", help="the dense model (default: the model that the report of FOLDER names)"
    )
    shared.add_remote_code(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no notes on stderr")
    _add_training(parser.add_argument_group("training"))
    _add_text(parser.add_argument_group("text (default: the calibration text of FOLDER)"))
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--resume", action="store_true", help="continue an interrupted run with the same arguments, if there is one"
    )
    group.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="limit on the process's resident memory, e.g. 2GB; if it is too small to train all blocks together, "
        "windows of blocks are trained one after another",
    )
    shared.add_reports(group, "step")
    parser.set_defaults(action=heal)


def _add_training(group: argparse._ArgumentGroup) -> None:
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--tokens",
        type=int,
        help="tokens to train on; each pass over a window counts, and is rounded up to whole steps (default: "
        f"{TOKENS})",
    )
    budget.add_argument(
        "--minutes",
        type=float,
        help="instead of --tokens: about how long the run may take; the speed is measured once, so runs may train "
        "on different numbers of tokens",
    )
    for setting in HealSettings.settings():
        if setting.name != "seed":  # --seed is that of the text, and is used for both
            shared.add_setting(group, setting)


def _add_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration",
        metavar="TEXT",
        help=f"{', '.join(SOURCES)}, self (the dense model writes it), FILE.txt, FILE.jsonl or a mixture",
    )
    shared.add_bos(group, "window", "as in the calibration of FOLDER")
    group.add_argument("--seqlen", type=int, help="tokens of a window")
    group.add_argument("--seed", type=int, help="seed of the choice of windows, and of the order of the steps")
    default = Calibration().text_field
    shared.add_text_field(group, f"as in the calibration of FOLDER; with --calibration {default}")


def request_from(args: argparse.Namespace) -> HealRequest:
    """The request of the parsed arguments. Raises InputError for a value that is not valid."""
    report = read_report(args.folder)
    names = {"source": "calibration", "seqlen": "seqlen", "seed": "seed", "text_field": "text_field", "bos": "bos"}
    given = {name: getattr(args, flag) for name, flag in names.items() if getattr(args, flag) is not None}
    recorded = recorded_fields(report)
    if "source" in given:
        recorded.pop("text_field", None)  # it is that of the recorded text
    text = calibration_of(recorded | given)
    if not text.reads_text:
        shared.check_only_media(text.source, given)
    if args.text_field is not None:
        shared.text_field_of(args, text.source)
    flags = {setting.name: getattr(args, setting.name, None) for setting in HealSettings.settings()}
    settings = HealSettings(
        **{name: value for name, value in (flags | {"seed": text.seed}).items() if value is not None}
    )
    budget = None if args.max_memory is None else parse_bytes(args.max_memory)
    options = HealOptions(args.tokens, args.minutes, overwrite=args.overwrite, resume=args.resume, max_memory=budget)
    return HealRequest(args.folder, args.output, text, args.dense, settings, options, pick_device(args.device))


def heal(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    shared.check_written(args)
    request = request_from(args)
    with contextlib.ExitStack() as opened:
        progress = HealProgress(shared.shows_progress(args), shared.open_log(args, opened))
        report, path = heal_folder(request, progress, lambda line: shared.note(args, line))
    if args.report is not None:
        write_run_report(report, args.report, path)
    print(report.to_json() if args.json else f"{report.table()}\nwritten to {path}")
    return 0
