"""Swaps (arXiv 2512.10922): exchange kept and pruned weights of a row while the error of its output falls."""

from dataclasses import dataclass

from ace_ext import ops
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import AUTO, COSINE, PLAIN, SHARED, Problem, Refine, gram_option


@dataclass(frozen=True)
class Swaps(Refine):
    """Exchanges kept and pruned weights of a row, with a pattern within its N:M groups."""

    name = "swaps"
    summary = "exchanges kept and pruned weights of a row while the error of its output falls (arXiv 2512.10922)"
    groups = ("row",)

    max_swaps: int = option(100, "the maximum number of swaps in a row", Limits(at_least=1))
    gram: str = gram_option(AUTO, PLAIN, SHARED, COSINE)

    def refine_(self, problem: Problem) -> None:
        """Swaps entries of ``problem.mask`` in place."""
        assert problem.mask is not None  # a stage before it chose it
        ops.refine_swaps_(problem.mask, problem.dense, problem.whole_gram.matrix, *problem.nm, self.max_swaps)

    def working_bytes(self, rows: int, cols: int) -> int:
        """The gradient of the error in float64, working copies of rows, and vectors."""
        return 12 * rows * cols + 24 * cols


STAGE = Swaps
