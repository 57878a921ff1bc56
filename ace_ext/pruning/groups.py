"""The comparison groups: which weights compete with each other, and how many of a group survive.

A group of :data:`GROUPS` is chosen by name; an N:M pattern brings groups of its own. To add one, write a class here and
register it: the command line, the masks, the plan and ``verify`` read the registry.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from ace_ext import ops
from ace_ext.pruning.criteria import ScoredWeight
from ace_ext.pruning.pattern import SparsityPattern, keep_count


class ComparisonGroup(ABC):
    """Weights that compete. Every method takes a matrix of ``rows x cols``."""

    name: str
    summary: str
    plural = ""
    """What a matrix's groups are called, where it has several."""
    over_matrices = False
    """Whether it spans several matrices, so that no matrix can be pruned by itself."""

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def size(self, rows: int, cols: int) -> int:
        """How many weights of the matrix are in one group."""

    def keep(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        """How many weights of one group survive; ``keep_row`` of a row replace what ``sparsity`` says."""
        size = self.size(rows, cols)
        return keep_count(size, sparsity) if keep_row is None else keep_row * size // max(1, cols)

    def budget(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        """How many weights of the matrix survive (of a group over matrices: would, had each the same share)."""
        groups = rows * cols // max(1, self.size(rows, cols))
        return self.keep(rows, cols, sparsity, keep_row) * groups

    @abstractmethod
    def prune_(self, scored: ScoredWeight, keep: int) -> None:
        """Zeroes all but the best ``keep`` of each group, in place."""

    @abstractmethod
    def mask(self, scored: ScoredWeight, keep: int) -> Tensor:
        """``[rows, cols]`` bool, True where :meth:`prune_` keeps; the weight is left as it is."""

    @abstractmethod
    def counts(self, weight: Tensor) -> Tensor:
        """``[groups]`` int64: the non-zeros of each group."""


class RowGroup(ComparisonGroup):
    """The weights of one output channel."""

    name, summary = "row", "the weights of one row (output channel)"
    plural = "rows"

    def size(self, rows: int, cols: int) -> int:
        return cols

    def budget(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        return rows * self.keep(rows, cols, sparsity, keep_row)

    def prune_(self, scored: ScoredWeight, keep: int) -> None:
        ops.prune_topk_(scored.weight, scored.formula, keep, scored.column, scored.moment, "row")

    def mask(self, scored: ScoredWeight, keep: int) -> Tensor:
        return ops.topk_mask(scored.weight, scored.formula, keep, scored.column, scored.moment, "row")

    def counts(self, weight: Tensor) -> Tensor:
        return weight.count_nonzero(dim=1)


class MatrixGroup(ComparisonGroup):
    """All weights of one matrix."""

    name, summary = "matrix", "all weights of one matrix"

    def size(self, rows: int, cols: int) -> int:
        return rows * cols

    def budget(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        return self.keep(rows, cols, sparsity, keep_row)

    def prune_(self, scored: ScoredWeight, keep: int) -> None:
        ops.prune_topk_(scored.weight, scored.formula, keep, scored.column, scored.moment, "matrix")

    def mask(self, scored: ScoredWeight, keep: int) -> Tensor:
        return ops.topk_mask(scored.weight, scored.formula, keep, scored.column, scored.moment, "matrix")

    def counts(self, weight: Tensor) -> Tensor:
        return weight.count_nonzero()[None]


class ModelGroup(MatrixGroup):
    """All weights of the model: pruned together by :func:`ace_ext.pruning.masks.prune_model_wide_`."""

    name, summary = "model", "all weights of the model"
    over_matrices = True


class PatternGroup(ComparisonGroup):
    """``group_m`` consecutive weights of a row, of which ``keep_n`` survive."""

    name, summary = "N:M", "consecutive weights of a row, as the pattern says"

    def __init__(self, pattern: SparsityPattern) -> None:
        self.pattern = pattern
        self.plural = f"groups of {pattern.group_m}"

    def __str__(self) -> str:
        return str(self.pattern)

    def size(self, rows: int, cols: int) -> int:
        return self.pattern.group_m

    def keep(self, rows: int, cols: int, sparsity: float, keep_row: int | None = None) -> int:
        return self.pattern.keep_n

    def prune_(self, scored: ScoredWeight, keep: int) -> None:
        ops.prune_nm_(scored.weight, scored.formula, keep, self.pattern.group_m, scored.column, scored.moment)

    def mask(self, scored: ScoredWeight, keep: int) -> Tensor:
        return ops.nm_mask(scored.weight, scored.formula, keep, self.pattern.group_m, scored.column, scored.moment)

    def counts(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (-1, self.pattern.group_m)).count_nonzero(dim=2).flatten()


GROUPS: dict[str, ComparisonGroup] = {group.name: group for group in (RowGroup(), MatrixGroup(), ModelGroup())}
"""Every group that can be chosen by name."""


def group_of(name: str, pattern: SparsityPattern | None) -> ComparisonGroup:
    """The comparison group of a configuration: the pattern's own, or the one of this name."""
    return PatternGroup(pattern) if pattern is not None else GROUPS[name]
