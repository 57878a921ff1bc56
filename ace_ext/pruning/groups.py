"""The comparison groups: which weights are ranked against each other, and how many of a group are kept; N:M patterns.

A user chooses a group of :data:`GROUPS` by name; an N:M pattern defines its own. To add a group, write a class here and
add it to :data:`GROUPS`: the command line, the masks, the plan and ``verify`` read that table.
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ace_ext import ops
from ace_ext.errors import InputError
from ace_ext.ops import ScoredWeight

MAX_GROUP_M = 32


def keep_count(size: int, sparsity: float) -> int:
    """How many of ``size`` weights are kept: ``size - floor(size * sparsity + 1/2)``. The only place that rounds."""
    return size - math.floor(size * sparsity + 0.5)


@dataclass(frozen=True)
class SparsityPattern:
    """N:M sparsity: ``keep_n`` of each ``group_m`` consecutive weights of a row are kept.

    Other authors use N for the number of pruned weights; 2:4 is the same in both.

    Raises:
        InputError: unless ``0 < keep_n < group_m <= 32``.
    """

    keep_n: int
    group_m: int

    def __post_init__(self) -> None:
        if not 0 < self.keep_n < self.group_m <= MAX_GROUP_M:
            raise InputError(
                f"pattern must be N:M with 0 < N < M <= {MAX_GROUP_M}, N weights kept of M (got {self}); e.g. 2:4"
            )

    @classmethod
    def parse(cls, text: str) -> "SparsityPattern":
        """The pattern of a text like ``"2:4"``.

        Raises:
            InputError: the text does not have this form, or as the class.
        """
        parts = text.split(":")
        if len(parts) != 2 or not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) for part in parts):
            raise InputError(f"pattern must be N:M, N weights kept of M (got {text[:100]!r}); e.g. 2:4")
        return cls(int(parts[0]), int(parts[1]))

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.keep_n / self.group_m

    def __str__(self) -> str:
        return f"{self.keep_n}:{self.group_m}"


class ComparisonGroup(ABC):
    """A kind of comparison group. Arguments ``rows`` and ``cols`` are the size of a matrix."""

    name: str
    summary: str
    plural = ""
    """The plural noun for the groups of a matrix; empty if a matrix is one group."""
    over_matrices = False
    """Whether a group spans several matrices. No matrix can then be pruned by itself."""

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def size(self, rows: int, cols: int) -> int:
        """How many weights of the matrix are in one group."""

    def keep(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        """How many weights of one group are kept. ``keep_row``, if given, is the number of weights to keep in each row;
        it replaces ``sparsity``."""
        size = self.size(rows, cols)
        return keep_count(size, sparsity) if keep_row is None else keep_row * size // max(1, cols)

    def budget(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        """How many weights of the matrix are kept. For a group that spans matrices: how many would be kept if every
        matrix kept the same share."""
        groups = rows * cols // max(1, self.size(rows, cols))
        return self.keep(rows, cols, sparsity, keep_row) * groups

    @abstractmethod
    def prune_(self, scored: ScoredWeight, keep: int) -> None:
        """Keeps the ``keep`` weights with the highest scores of each group, and zeroes the others in place."""

    @abstractmethod
    def mask(self, scored: ScoredWeight, keep: int) -> Tensor:
        """``[rows, cols]`` bool, True where :meth:`prune_` keeps a weight; the weight is not changed."""

    @abstractmethod
    def counts(self, weight: Tensor) -> Tensor:
        """``[groups]`` int64: the number of non-zeros of each group."""


class RowGroup(ComparisonGroup):
    """The weights of one output channel."""

    name, summary = "row", "the weights of one row (output channel)"
    plural = "rows"

    def size(self, rows: int, cols: int) -> int:
        """The weights of a row."""
        return cols

    def budget(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        """The number kept in a row, times the number of rows; also right for rows without columns."""
        return rows * self.keep(rows, cols, sparsity, keep_row)

    def prune_(self, scored: ScoredWeight, keep: int) -> None:
        """Top-k within each row."""
        ops.prune_topk_(scored.weight, scored.formula, keep, scored.column, scored.moment, "row")

    def mask(self, scored: ScoredWeight, keep: int) -> Tensor:
        """The mask of top-k within each row."""
        return ops.topk_mask(scored.weight, scored.formula, keep, scored.column, scored.moment, "row")

    def counts(self, weight: Tensor) -> Tensor:
        """``[rows]`` int64."""
        return weight.count_nonzero(dim=1)


class MatrixGroup(ComparisonGroup):
    """All weights of one matrix."""

    name, summary = "matrix", "all weights of one matrix"

    def size(self, rows: int, cols: int) -> int:
        """The weights of the matrix."""
        return rows * cols

    def budget(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        """The matrix is one group."""
        return self.keep(rows, cols, sparsity, keep_row)

    def prune_(self, scored: ScoredWeight, keep: int) -> None:
        """Top-k within the matrix."""
        ops.prune_topk_(scored.weight, scored.formula, keep, scored.column, scored.moment, "matrix")

    def mask(self, scored: ScoredWeight, keep: int) -> Tensor:
        """The mask of top-k within the matrix."""
        return ops.topk_mask(scored.weight, scored.formula, keep, scored.column, scored.moment, "matrix")

    def counts(self, weight: Tensor) -> Tensor:
        """``[1]`` int64."""
        return weight.count_nonzero()[None]


class ModelGroup(MatrixGroup):
    """All weights of the model. :func:`ace_ext.pruning.masks.prune_model_wide_` prunes them together."""

    name, summary = "model", "all weights of the model"
    over_matrices = True


class PatternGroup(ComparisonGroup):
    """``group_m`` consecutive weights of a row, of which ``keep_n`` are kept."""

    name, summary = "N:M", "consecutive weights of a row, as the pattern says"

    def __init__(self, pattern: SparsityPattern) -> None:
        self.pattern = pattern
        self.plural = f"groups of {pattern.group_m}"

    def __str__(self) -> str:
        return str(self.pattern)

    def size(self, rows: int, cols: int) -> int:
        """M of the pattern."""
        return self.pattern.group_m

    def keep(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        """N of the pattern, whatever the sparsity."""
        return self.pattern.keep_n

    def prune_(self, scored: ScoredWeight, keep: int) -> None:
        """Top-N within each group of M."""
        ops.prune_nm_(scored.weight, scored.formula, keep, self.pattern.group_m, scored.column, scored.moment)

    def mask(self, scored: ScoredWeight, keep: int) -> Tensor:
        """The mask of top-N within each group of M."""
        return ops.nm_mask(scored.weight, scored.formula, keep, self.pattern.group_m, scored.column, scored.moment)

    def counts(self, weight: Tensor) -> Tensor:
        """``[rows * cols / M]`` int64."""
        return weight.reshape(len(weight), -1, self.pattern.group_m).count_nonzero(dim=2).flatten()


GROUPS: dict[str, ComparisonGroup] = {group.name: group for group in (RowGroup(), MatrixGroup(), ModelGroup())}
"""Every group that a user can choose by name."""
