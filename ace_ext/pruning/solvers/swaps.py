"""Swaps (arXiv 2512.10922): exchange kept and pruned weights of a row while the error of its output falls."""

from dataclasses import dataclass

from ace_ext import ops
from ace_ext.pruning.settings import Limits, Options, option
from ace_ext.pruning.solvers._problem import MaskSolver, Problem


@dataclass(frozen=True)
class SwapOptions(Options):
    """Options of ``refine="swaps"``."""

    max_swaps: int = option(100, "the most swaps in a row", Limits(at_least=1))


def refine_(problem: Problem, options: SwapOptions) -> None:
    """Swaps kept and pruned entries of each row of ``problem.mask`` in place; with a pattern, within its N:M groups. No
    weight changes."""
    assert problem.mask is not None  # a mask solver always gets the metric's mask
    ops.refine_swaps_(problem.mask, problem.dense, problem.whole_gram.matrix, *problem.nm, options.max_swaps)


def working_bytes(rows: int, cols: int) -> int:
    """The gradient of the error in float64, working copies of rows, and vectors."""
    return 12 * rows * cols + 24 * cols


SOLVER = MaskSolver(
    name="swaps",
    summary="exchanges kept and pruned weights of a row while the error of its output falls; no weight changes",
    options=SwapOptions,
    groups=("row",),
    refine_=refine_,
    working_bytes=working_bytes,
    row_wise=True,
)
