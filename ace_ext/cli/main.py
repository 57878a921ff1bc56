"""``ace-prune run | heal | plan | compare | eval | verify``. Results go to stdout, progress and errors to stderr.

Exit status: 0: done; 1: internal error, or ``verify`` found a problem; 2: bad input (one line that says what is wrong
and how to correct it); 130: interrupted.
"""

import argparse
import logging
import os
import sys

import shtab
import torch

from ace_ext.cli import compare, eval, heal, plan, run, verify
from ace_ext.cli.args import OneLineParser
from ace_ext.errors import InputError
from ace_ext.models.location import remote_code
from ace_ext.process_threads import allowed_cpus
from ace_ext.version import __version__

VERBS = (run, heal, plan, compare, eval, verify)
"""One module per verb, in the order of the help text."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = OneLineParser(prog="ace-prune", description="One-shot pruning of Hugging Face causal language models.")
    parser.add_argument("--version", action="version", version=f"ace-prune {__version__}")
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script for this shell")
    names = " | ".join(verb.__name__.rpartition(".")[2] for verb in VERBS)
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for verb in VERBS:
        verb.add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    args = build_parser().parse_args(argv)
    _quiet_libraries()
    _limit_threads()
    try:
        with remote_code(args.trust_remote_code):
            status: int = args.action(args)
    except InputError as error:
        print(f"ace-prune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ace-prune: interrupted; run and heal go on with --resume where it stopped", file=sys.stderr)
        return 130
    return status


def _limit_threads() -> None:
    """No more threads than CPUs that the process may use, unless the user chose; more would wait for each other."""
    cpus = allowed_cpus()
    if "OMP_NUM_THREADS" not in os.environ and cpus < torch.get_num_threads():
        torch.set_num_threads(cpus)


def _quiet_libraries() -> None:
    """Turns off progress bars and warnings of libraries, so that this program's own lines are seen."""
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
