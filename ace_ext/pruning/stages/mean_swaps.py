"""Mean-balanced swaps: exchange kept and pruned weights of a row so that pruning shifts its mean output less.

The stage reads the mean and the variance of each input column, and no Gram matrix. The pruned weights of a row cost
``Σ w_j² σ_j² + (Σ w_j m_j)²`` (:mod:`ace_ext.pruning.moment_gram`).
"""

from dataclasses import dataclass

from ace_ext import ops
from ace_ext.pruning.kinds import INPUT
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import Problem, Refine


@dataclass(frozen=True)
class MeanSwaps(Refine):
    """Exchanges kept and pruned weights of a row, with a pattern within its N:M groups."""

    name = "mean-swaps"
    summary = "exchanges kept and pruned weights of a row so that its mean output shifts less; needs no Gram matrix"
    groups = ("row", "matrix")
    reads = frozenset({INPUT})

    rounds: int = option(
        1, "scans of each row; up to 32 of its weights are swapped after each scan", Limits(at_least=1)
    )

    def refine_(self, problem: Problem) -> None:
        """Swaps entries of ``problem.mask`` in place."""
        assert problem.mask is not None  # a stage before it chose it
        moments, group_m = problem.moments, problem.nm[1]
        ops.balance_mean_(problem.mask, problem.dense, moments.variance, moments.mean, group_m, self.rounds)

    def working_bytes(self, rows: int, cols: int) -> int:
        """The pruned weight and the check that it is finite, three numbers for each row, and copies of the vectors."""
        return 11 * rows * cols + 32 * rows + 24 * cols


STAGE = MeanSwaps
