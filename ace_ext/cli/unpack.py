"""``ace-prune unpack``: the dense folder of a packed one, byte for byte."""

import argparse
from pathlib import Path

from ace_ext.cli import args as shared
from ace_ext.cli.parser import VERBS
from ace_ext.packed.packing import unpack
from ace_ext.runs.output import check_apart

EXAMPLES = ("unpack packed --output pruned",)
"""Commands that ``--help`` shows."""


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("unpack", help=VERBS["unpack"])
    parser.add_argument("folder", help="a folder that ace-prune pack wrote; it is not changed")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")
    parser.set_defaults(action=run)


def run(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    check_apart(Path(args.output), args.folder)
    size = unpack(args.folder, args.output)
    print(f"{size / 1e6:.1f} MB of weights, the same bytes as before packing\nwritten to {args.output}")
    return 0
