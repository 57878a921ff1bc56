"""What tools/mutate.py and tools/mutate_python.py share: which changes are tried, and how many must be noticed."""

import argparse
import random
from collections.abc import Sequence
from typing import TypeVar

Mutant = TypeVar("Mutant")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--sample``, ``--seconds``, ``--seed`` and ``--least``."""
    parser.add_argument("--sample", type=int, help="how many changes, drawn at random; all by default")
    parser.add_argument("--seconds", type=float, help="begin no change after so many; they are then drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.9, help="the share that must be noticed")


def drawn(mutants: Sequence[Mutant], args: argparse.Namespace) -> Sequence[Mutant]:
    """All changes, or those that are tried first by the options."""
    if args.sample is None and args.seconds is None:
        return mutants
    return random.Random(args.seed).sample(mutants, min(args.sample or len(mutants), len(mutants)))
