"""What a solver is, and what it is given: the types that every file of this package uses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ace_ext.pruning.gram import GramState
from ace_ext.pruning.groups import ComparisonGroup, PatternGroup
from ace_ext.pruning.pattern import SparsityPattern
from ace_ext.pruning.settings import Options


@dataclass
class Problem:
    """One matrix to solve. A solver may write to ``mask`` where it is given, and to nothing else."""

    dense: Tensor  # [rows, cols] float32: the dense weight
    gram: GramState  # of the inputs, [cols, cols]
    group: ComparisonGroup
    keep: int
    """How many weights of one group survive."""
    mask: Tensor | None = None  # [rows, cols] bool: what is kept; None: the solver chooses

    @property
    def pattern(self) -> SparsityPattern | None:
        """The N:M pattern, where there is one."""
        return self.group.pattern if isinstance(self.group, PatternGroup) else None

    @property
    def nm(self) -> tuple[int, int]:
        """``keep_n`` and ``group_m`` as the ops take them: zeros without a pattern."""
        return (0, 0) if self.pattern is None else (self.pattern.keep_n, self.pattern.group_m)


@dataclass(frozen=True)
class Solved:
    """A pruned weight, and what its factorisation took."""

    weight: Tensor  # [rows, cols] float32
    damping: float = 0.0
    attempts: int = 0


@dataclass(frozen=True)
class BlockSizes:
    """What training a block is estimated from, in bytes and entries."""

    trained: int  # entries of all its Linears
    largest: int  # entries of its largest Linear
    itemsize: int
    activations: int  # bytes of one gradient step's activations


@dataclass(frozen=True)
class Solver:
    """What all solvers declare. ``options`` is a dataclass of :func:`ace_ext.pruning.settings.option` fields."""

    stage: ClassVar[str]
    name: str
    summary: str
    """One line for help texts, with the source of the method."""
    options: type[Options]


@dataclass(frozen=True)
class MaskSolver(Solver):
    """Improves the metric's mask in place and leaves the weights alone (``refine``)."""

    stage = "refine"
    groups: tuple[str, ...]
    """The comparison groups it works within; a pattern counts as ``row``."""
    refine_: Callable[[Problem, Any], None]
    working_bytes: Callable[[int, int], int]
    """Of ``rows, cols``: the bytes it holds beside the weight, its float32 copy, the mask and the statistics."""


@dataclass(frozen=True)
class WeightSolver(Solver):
    """Updates the remaining weights to compensate for the removed ones, and chooses the mask unless it is given
    (``update``)."""

    stage = "update"
    groups: tuple[str, ...]
    solve: Callable[[Problem, Any], Solved]
    working_bytes: Callable[[int, int], int]
    """As of :class:`MaskSolver`."""


@dataclass(frozen=True)
class BlockSolver(Solver):
    """Trains a block once all its matrices are pruned, masks fixed (``update``, alone or after a weight solver)."""

    stage = "update"
    train_: Callable[..., Any]
    """``train_(block, inputs, targets, options, masks, token_masks)``: see :mod:`ace_ext.pruning.block_tuning`."""
    working_bytes: Callable[[BlockSizes], int]
    """What it holds beside the block, its inputs and its targets."""
