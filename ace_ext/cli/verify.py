"""``ace-prune verify``: check a written folder against its report."""

import argparse
import json

from ace_ext.cli import args as shared
from ace_ext.cli.parser import VERBS
from ace_ext.errors import counted
from ace_ext.runs.verify import verify

EXAMPLES = ("verify pruned",)
"""Commands that ``--help`` shows."""


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("verify", help=VERBS["verify"])
    parser.add_argument("folder", help="a folder that ace-prune run wrote")
    shared.add_remote_code(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.set_defaults(action=check)


def check(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status: 1 if the folder has a problem."""
    result = verify(args.folder)
    if args.json:
        told = {name: value for name, value in vars(result).items() if value or name not in ("removed", "grid")}
        print(json.dumps(told))
    else:
        rows = f", {result.exact_rows} of {result.rows} groups with exactly k non-zeros" if result.rows else ""
        for line in result.removed:
            print(f"{line} are left")
        if result.matrices or not result.removed:
            print(f"{counted(result.matrices, 'matrix')}, sparsity {result.sparsity:.4f}{rows}")
        problems = "\n".join(f"problem: {problem}" for problem in result.problems)
        grid = f"grid of {result.grid}, " if result.grid else ""
        print(problems or f"OK: counts, zeros, finite values, {grid}loading")
    return 1 if result.problems else 0
