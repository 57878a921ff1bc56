"""The update that restores means: the kept weights of a row take over what the pruned ones gave its output on average.

Reads the mean and the variance of each input column and no Gram matrix (:mod:`ace_ext.pruning.moment_gram`). For a
given mask this is the best update of the kept weights if columns are uncorrelated, in closed form: with
``s = Σ_pruned w_j m_j``, ``w_j += s (m_j / σ_j²) / (1 + Σ_kept m²/σ²)``.
"""

from dataclasses import dataclass

from torch import Tensor

from ace_ext import ops
from ace_ext.pruning.kinds import INPUT
from ace_ext.pruning.moment_gram import MomentGram
from ace_ext.pruning.settings import Options
from ace_ext.pruning.solvers._problem import Problem, Solved, WeightSolver

VARIANCE_FLOOR = 1e-4
"""The least variance of a column that is reckoned with, as a share of the largest; nearly constant columns would
otherwise take over everything. As ``Σ σ_j² (change of w_j)²`` is at most ``s²/4``, no weight moves by more than
``|s| / (2 sqrt(VARIANCE_FLOOR) σ)``, ``σ`` the largest deviation."""


@dataclass(frozen=True)
class MeanUpdateOptions(Options):
    """``update="mean"`` has none."""


def direction(moments: MomentGram) -> Tensor:
    """``m_j / max(σ_j², floor)``: ``[cols]`` float32; zeros if no column varies, since then nothing can be weighed."""
    largest = moments.variance.max() if len(moments.variance) else moments.variance.sum()
    floored = moments.variance.clamp_min(largest * VARIANCE_FLOOR)
    return (moments.mean / floored).masked_fill(floored == 0, 0.0)


def solve(problem: Problem, options: MeanUpdateOptions) -> Solved:
    """The pruned weight with the mask of the metric or of a mask solver."""
    assert problem.mask is not None  # it chooses none itself
    weight = problem.dense.clone()
    ops.restore_mean_(weight, problem.mask, problem.moments.mean, direction(problem.moments))
    return Solved(weight)


def working_bytes(rows: int, cols: int) -> int:
    """The new weight and the check that it is finite, and copies of the vectors."""
    return 11 * rows * cols + 24 * cols


SOLVER = WeightSolver(
    name="mean",
    summary="lets the remaining weights of a row restore its mean output, in closed form; needs no Gram matrix",
    options=MeanUpdateOptions,
    groups=("row", "matrix"),
    solve=solve,
    working_bytes=working_bytes,
    row_wise=True,
    needs=frozenset({INPUT}),
    chooses_mask=False,
)
