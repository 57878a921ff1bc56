"""The parser of the command line, and what each verb does. Nothing here loads torch, so that help is quick."""

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

from ace_ext.errors import suggestion

VERBS = {
    "run": "prune a model",
    "heal": "train the kept weights of a pruned folder to predict like the dense model",
    "plan": "what a run would prune, and the memory and time it would take",
    "compare": "compare methods, sparsities and calibration on one model",
    "eval": "perplexity of a model on held-out text",
    "verify": "check a folder: weights, zeros, loading",
    "pack": "write a smaller copy of a pruned folder, without its zeros",
    "unpack": "restore the dense folder of a packed one, byte for byte",
    "bench": "compare packed or smaller folders with the dense one, on the CPU: speed, memory, size",
}
"""The verbs in the order of the help text, and their lines in it. One module of this package implements each."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, like every other error of this program.

    If ``common`` is not empty, ``--help`` shows only these options. ``--help-all`` shows all options and ``tables``. If
    ``common`` is empty, it prints the same as ``--help``.
    """

    common: frozenset[str] = frozenset()
    tables: Callable[[], str] | None = None

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._help_all = self.add_argument("--help-all", action=_HelpAll, nargs=0, help=argparse.SUPPRESS)

    def show_common(self, *names: str, tables: Callable[[], str]) -> None:
        """Makes ``--help`` show only these options, and ``--help-all`` all options with ``tables()`` at the end."""
        self.common, self.tables = frozenset(names), tables
        self._help_all.help = "show all options, and all stages of methods"

    def format_help(self) -> str:
        """The help with only the common options, if there are any."""
        shown = {action.dest: action.help for action in self._actions}
        for action in self._actions:
            if self.common and action.dest not in {*self.common, "help", "help_all"}:
                action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action in self._actions:
                action.help = shown[action.dest]

    def format_help_all(self) -> str:
        """The help with all options and tables."""
        common, epilog = self.common, self.epilog
        self.common, self.epilog = frozenset(), "\n\n".join(filter(None, (epilog, self.tables and self.tables())))
        try:
            return self.format_help()
        finally:
            self.common, self.epilog = common, epilog

    def parse_args(self, *arguments: Any, **more: Any) -> Any:
        """As in argparse. Its older versions read ``--option=--`` as an empty list, which is refused here."""
        found = super().parse_args(*arguments, **more)
        for name, value in vars(found).items():
            if (value == [] and name not in ("skip", "towers")) or (isinstance(value, list) and [] in value):
                self.error(f"argument --{name.replace('_', '-')}: expected a value (got '--')")
        return found

    def parse_known_args(self, *arguments: Any, **more: Any) -> Any:
        """As in argparse, but with an error for arguments that are not known: the parser of a verb knows which of its
        options were meant, and the parser above it does not."""
        found, rest = super().parse_known_args(*arguments, **more)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(map(str, rest))}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with 2."""
        self.exit(2, f"{self.prog}: {message}{self._suggestion(message)}; see {self.prog} --help\n")

    def _suggestion(self, message: str) -> str:
        """The option, verb or value that the user probably meant."""
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            from ace_ext.pruning.method import option_hint  # imported here: it loads torch

            meant = suggestion(unknown[1], self._options(), cutoff=0.8)
            return option_hint(unknown[1].removeprefix("--").replace("-", "_")) or meant
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        return suggestion(choice[1], re.findall(r"[\w:.-]+", choice[2])) if choice else ""

    def _options(self) -> list[str]:
        """All options, with those of the verbs."""
        verbs = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        parsers = [self, *(parser for choices in verbs for parser in choices.values())]
        return [name for parser in parsers for name in parser._option_string_actions]


class _HelpAll(argparse.Action):
    """Prints the help with all options and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, OneLineParser)
        print(parser.format_help_all(), end="")
        parser.exit()
