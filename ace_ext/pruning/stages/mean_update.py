"""An update that restores means: the kept weights of a row compensate for the mean output of its pruned weights.

The stage reads the mean and the variance of each input column, and no Gram matrix
(:mod:`ace_ext.pruning.moment_gram`). If columns are uncorrelated, this is the best update for a given mask, in closed
form: ``w_j += s (m_j / σ_j²) / (1 + Σ_kept m²/σ²)`` with ``s = Σ_pruned w_j m_j``.
"""

from dataclasses import dataclass

from torch import Tensor

from ace_ext import ops
from ace_ext.pruning.kinds import INPUT
from ace_ext.pruning.moment_gram import MomentGram
from ace_ext.pruning.stages._stage import Problem, Solve, Solved

VARIANCE_FLOOR = 1e-4
"""The lower bound of a column's variance, as a share of the largest variance. Without it, nearly constant columns would
get the whole update. ``Σ σ_j² (change of w_j)²`` is at most ``s²/4``, so no weight changes by more than
``|s| / (2 sqrt(VARIANCE_FLOOR) σ)``, where ``σ`` is the largest deviation."""


def direction(moments: MomentGram) -> Tensor:
    """``m_j / max(σ_j², floor)``: ``[cols]`` float32; zeros if no column varies."""
    largest = moments.variance.max() if len(moments.variance) else moments.variance.sum()
    floored = moments.variance.clamp_min(largest * VARIANCE_FLOOR)
    return (moments.mean / floored).masked_fill(floored == 0, 0.0)


@dataclass(frozen=True)
class MeanUpdate(Solve):
    """Updates the kept weights of a row so that its mean output is restored, in closed form."""

    name = "mean-update"
    summary = "updates the kept weights of a row so that its mean output is restored; needs no Gram matrix"
    groups = ("row", "matrix")
    reads = frozenset({INPUT})
    chooses_mask = False

    def solve(self, problem: Problem) -> Solved:
        """The pruned weight with the mask of an earlier stage."""
        assert problem.mask is not None  # it chooses none itself
        weight = problem.dense.clone()
        ops.restore_mean_(weight, problem.mask, problem.moments.mean, direction(problem.moments))
        return Solved(weight)

    def working_bytes(self, rows: int, cols: int) -> int:
        """The new weight and the check that it is finite, and copies of the vectors."""
        return 11 * rows * cols + 24 * cols


STAGE = MeanUpdate
