"""The types that every solver uses: its declaration, its input and its result."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ace_ext.pruning.gram import GramState
from ace_ext.pruning.groups import ComparisonGroup, PatternGroup
from ace_ext.pruning.kinds import GRAM
from ace_ext.pruning.moment_gram import MomentGram
from ace_ext.pruning.pattern import SparsityPattern
from ace_ext.pruning.settings import Limits, Options, option
from ace_ext.pruning.sketch import SketchState


def damping_option(default: float) -> Any:
    """The option ``damping``, which every solver that factorises the Gram matrix has with its own default."""
    return option(
        default,
        "share of the Gram matrix's mean diagonal added to its diagonal",
        Limits(at_least=0, words="a share of the mean diagonal, 0 or more"),
    )


@dataclass
class Problem:
    """One matrix to solve. A solver may write to ``mask`` if it is given, and to nothing else.

    Weights and statistics of unusual size are divided by powers of two (:mod:`ace_ext.pruning.scaling`): a solver's
    result must not depend on their units.
    """

    dense: Tensor  # [rows, cols] float32: the dense weight
    matrix: GramState | SketchState | None  # the Gram matrix of the inputs, or its sketch, if a solver needs it
    group: ComparisonGroup
    keep: int
    """How many weights of one group are kept."""
    mask: Tensor | None = None  # [rows, cols] bool: what is kept; None: the solver chooses
    vectors: MomentGram | None = None  # mean and variance of each input column, if a solver needs them

    def of_rows(self, rows: slice) -> "Problem":
        """The problem of some of the rows. Its mask is a view of this one's."""
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, dense=self.dense[rows], mask=mask)

    @property
    def gram(self) -> GramState | SketchState:
        """The Gram matrix or its sketch; ValueError if it was not collected."""
        if self.matrix is None:
            raise ValueError("the solver needs the Gram matrix of the inputs (got statistics without)")
        return self.matrix

    @property
    def moments(self) -> MomentGram:
        """Mean and variance of the input columns; ValueError if they were not collected."""
        if self.vectors is None:
            raise ValueError("the solver needs the moments of the inputs (got statistics without)")
        return self.vectors

    @property
    def measure(self) -> GramState | SketchState | MomentGram:
        """By what the report's losses are measured: the Gram matrix where it was collected."""
        return self.moments if self.matrix is None else self.matrix

    @property
    def whole_gram(self) -> GramState:
        """The Gram matrix, for solvers that a sketch does not serve."""
        assert isinstance(self.gram, GramState)  # SolverConfig refuses a sketch for such solvers
        return self.gram

    @property
    def pattern(self) -> SparsityPattern | None:
        """The N:M pattern, if there is one."""
        return self.group.pattern if isinstance(self.group, PatternGroup) else None

    @property
    def nm(self) -> tuple[int, int]:
        """``keep_n`` and ``group_m`` as the ops take them: both 0 without a pattern."""
        return (0, 0) if self.pattern is None else (self.pattern.keep_n, self.pattern.group_m)


@dataclass(frozen=True)
class Solved:
    """A pruned weight, and how the Gram matrix was factorised."""

    weight: Tensor  # [rows, cols] float32, in the units of Problem.dense
    damping: float = 0.0  # relative to the Gram matrix's mean diagonal
    attempts: int = 0  # factorisations that were tried


@dataclass(frozen=True)
class BlockSizes:
    """The sizes from which the memory of training a block is estimated."""

    trained: int  # entries of all its Linears
    largest: int  # entries of its largest Linear
    itemsize: int  # bytes of one entry in the model's dtype
    activations: int  # bytes of one gradient step's activations


@dataclass(frozen=True, kw_only=True)
class Solver:
    """What all solvers declare. ``options`` is a dataclass of :func:`ace_ext.pruning.settings.option` fields, and
    ``stage`` the setting by which the solver is chosen."""

    stage: ClassVar[str]
    name: str
    summary: str
    """One line for help texts, with the source of the method."""
    options: type[Options]


@dataclass(frozen=True, kw_only=True)
class MatrixSolver(Solver):
    """What the solvers of one matrix declare."""

    groups: tuple[str, ...]
    """The comparison groups that it supports; a pattern counts as ``row``."""
    working_bytes: Callable[[int, int], int]
    """``working_bytes(rows, cols)``: bytes besides the weight, its float32 copy, the mask and the statistics."""
    sketch_working_bytes: Callable[[int, int], int] | None = None
    """The same where a sketch takes the place of the Gram matrix; None if one cannot serve it."""
    row_wise: bool = False
    """Whether, except for the group ``matrix``, a row's result depends on no other row of the matrix. Several processes
    then solve a share of the rows each."""
    needs: frozenset[str] = frozenset({GRAM})
    """The kinds of statistics that it reads (:mod:`ace_ext.pruning.kinds`), named without token weights: the setting
    ``gram`` exchanges them for weighted ones, or for a sketch (:mod:`ace_ext.pruning.needs`)."""

    @property
    def takes_sketch(self) -> bool:
        """Whether ``gram="sketch"`` serves it: it declares so, or reads no Gram matrix."""
        return GRAM not in self.needs or self.sketch_working_bytes is not None

    def held_bytes(self, rows: int, cols: int, gram: str) -> int:
        """The working bytes with the setting ``gram``."""
        count = self.sketch_working_bytes if gram == "sketch" else None
        return (count or self.working_bytes)(rows, cols)


@dataclass(frozen=True, kw_only=True)
class MaskSolver(MatrixSolver):
    """Improves the metric's mask in place and does not change weights (``refine``)."""

    stage = "refine"
    refine_: Callable[[Problem, Any], None]
    """``refine_(problem, options)`` writes to ``problem.mask``."""


@dataclass(frozen=True, kw_only=True)
class WeightSolver(MatrixSolver):
    """Updates the remaining weights to compensate for the removed ones, and chooses the mask if none is given and
    ``chooses_mask`` (``update``)."""

    stage = "update"
    solve: Callable[[Problem, Any], Solved]
    """``solve(problem, options)``."""
    chooses_mask: bool = True
    """Whether it chooses the mask if no mask solver ran; if not, it always gets the metric's."""


@dataclass(frozen=True, kw_only=True)
class BlockSolver(Solver):
    """Trains a block once all its matrices are pruned, with fixed masks (``update``, alone or after a weight
    solver)."""

    stage = "update"
    train_: Callable[..., Any]
    """``train_(block, inputs, targets, options, masks, token_masks)``: see :mod:`ace_ext.pruning.block_tuning`."""
    working_bytes: Callable[[BlockSizes], int]
    """Bytes that it holds in addition to the block, its inputs and its targets."""


@dataclass(frozen=True, kw_only=True)
class ModelSolver(Solver):
    """Trains the whole model once all its blocks are pruned, with fixed masks (``update``, alone or after other
    solvers). Only declared here: :mod:`ace_ext.engine.distillation` does it."""

    stage = "update"
