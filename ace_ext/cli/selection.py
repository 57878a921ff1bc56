"""The options ``--skip``, ``--exclude`` and ``--include``: which weights of the blocks are pruned."""

import argparse
import re
from collections.abc import Iterable
from typing import Any


def add_selection(group: Any, help: str) -> None:
    """Adds the three options. ``help`` is the help of ``--skip``."""
    group.add_argument("--skip", action="append", default=[], metavar="REGEX", help=help)
    group.add_argument(
        "--exclude", action="append", metavar="GLOB", help="the same, as a pattern of the whole name, e.g. '*.o_proj'"
    )
    group.add_argument("--include", action="append", metavar="GLOB", help="prune only these weights, e.g. '*.mlp.*'")


def skip_from(args: argparse.Namespace) -> tuple[str, ...]:
    """The regular expressions that the options of :func:`add_selection` stand for."""
    skip = [*args.skip, *(f"^{glob_pattern(glob)}$" for glob in args.exclude or ())]
    return (*skip, _all_but(args.include)) if args.include else tuple(skip)


def _all_but(globs: Iterable[str]) -> str:
    return f"^(?!({'|'.join(map(glob_pattern, globs))})$)"


def glob_pattern(glob: str) -> str:
    """The regular expression of a pattern in which ``*`` stands for any characters and ``?`` for one."""
    return re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".")
