"""``ace-prune run | heal | plan | compare | eval | verify | pack | unpack | bench``. Results go to stdout, progress
and errors to stderr.

Exit status: 0: done; 1: internal error (one line; ``--debug`` shows where), or ``verify`` found a problem; 2: bad input
(one line that says what is wrong and how to correct it); 130: interrupted.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import shtab

from ace_ext.cli.endings import ending
from ace_ext.cli.parser import VERBS, OneLineParser
from ace_ext.errors import InputError
from ace_ext.process_threads import allowed_cpus
from ace_ext.version import __version__


def module_of(verb: str) -> ModuleType:
    """The module that implements a verb."""
    return import_module(f"ace_ext.cli.{verb}")


def build_parser(argv: Sequence[str] = ()) -> OneLineParser:
    """The parser of the command line. If ``argv`` begins with a verb, it has this verb alone, and the other modules are
    not imported."""
    from ace_ext.cli.args import examples  # imported here: it loads torch

    parser, commands = _overview()
    modules = [module_of(verb) for verb in (argv[:1] if argv and argv[0] in VERBS else VERBS)]
    for module in modules:
        module.add(commands)
    for module, command in zip(modules, commands.choices.values(), strict=True):
        command.epilog = "\n\n".join(filter(None, (examples(*module.EXAMPLES), command.epilog)))
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _overview() -> tuple[OneLineParser, Any]:
    """The parser without its verbs, and what they are added to."""
    parser = OneLineParser(prog="ace-prune", description="One-shot pruning of Hugging Face models.")
    parser.add_argument("--version", action="version", version=f"ace-prune {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error; also after the verb")
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script for this shell")
    return parser, parser.add_subparsers(dest="command", required=True, metavar=" | ".join(VERBS))


def needs_verbs(argv: Sequence[str]) -> bool:
    """Whether a command line needs a verb's module, and so torch: not for the list of verbs or a name that is none."""
    if not argv or argv[0] in ("-h", "--help", "--version"):
        return False
    return argv[0] in VERBS or argv[0].startswith("-")


def load(argv: Sequence[str]) -> None:
    """Imports what takes seconds, if a command line needs it."""
    if needs_verbs(argv):
        import_module("ace_ext.cli.args")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    if needs_verbs(argv):
        parser = build_parser(argv)
    else:
        parser, commands = _overview()
        for verb, summary in VERBS.items():
            commands.add_parser(verb, help=summary)
    args: argparse.Namespace = parser.parse_args(argv)
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status. It raises no exception except argparse's ``SystemExit``."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        _replace_unprintable()
        args = _parse(argv)
        _check_encoding(argv)
        _quiet_libraries()
        _limit_threads()
        from ace_ext.models.location import remote_code  # imported here: it loads torch

        with remote_code(getattr(args, "trust_remote_code", False)), _warnings_in_a_line(getattr(args, "quiet", False)):
            status: int = args.action(args)
        sys.stdout.flush()  # here, where an error can still be reported
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        status = ending(error, next((word for word in argv if word in VERBS), ""))
    return status


def _check_encoding(argv: Sequence[str]) -> None:
    """Raises :class:`InputError` for an argument that is no UTF-8, such as the name of an old file: reports and cards
    name it, and are UTF-8."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(word).decode(errors="backslashreplace")
            raise InputError(
                f"arguments must be UTF-8 (got '{shown}'); rename the file, or use a UTF-8 locale"
            ) from error


def _limit_threads() -> None:
    """Limits threads to the CPUs that the process may use, unless the user chose a number."""
    import torch

    cpus = allowed_cpus()
    if "OMP_NUM_THREADS" not in os.environ and cpus < torch.get_num_threads():
        torch.set_num_threads(cpus)


@contextlib.contextmanager
def _warnings_in_a_line(quiet: bool) -> Iterator[None]:
    """Shows warnings like other notes of this program, or not at all if ``quiet``."""

    def say(message: Warning | str, *_: object, **__: object) -> None:
        print(f"ace-prune: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        warnings.showwarning = say
        yield


def _replace_unprintable() -> None:
    """Makes streams escape characters that their encoding does not have, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    """Turns off progress bars and warnings of libraries, so that this program's own lines are visible."""
    import transformers

    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers)(\.|$)")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
