"""Thanos (arXiv 2504.05346): prune blocks of columns from left to right, all weights of a row and block at once.

One update of the remaining weights in and after the block compensates for all of them together.

The Gram matrix ``G [cols, cols]`` of the inputs measures errors (:mod:`ace_ext.pruning.gram`): the change ``e`` of a
row costs ``e G eᵀ``. Updates are computed in float32, and the systems of equations of the rows in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.pruning.gram import DEAD, restore_dead_
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import (
    AUTO,
    COSINE,
    PLAIN,
    SHARED,
    Problem,
    Solve,
    Solved,
    damping_option,
    gram_option,
)

PART_ENTRIES = 2**18
"""Entries of the systems of equations that are solved at a time, unless one row has more."""


@dataclass(frozen=True)
class Thanos(Solve):
    """Joint removal of all weights of a row and block of columns."""

    name = "thanos"
    summary = "removes all weights of a row and block of columns at once, and updates the others (arXiv 2504.05346)"
    groups = ("matrix", "row")
    mask_options = ()

    damping: float = damping_option(0.01)
    block: int = option(128, "columns of a block; with a pattern rounded down to whole groups", Limits(at_least=1))
    gram: str = gram_option(AUTO, PLAIN, SHARED, COSINE)

    def solve(self, problem: Problem) -> Solved:
        """The pruned weight. Without a mask, Wanda's scores of the weights as they are when a block is reached choose
        the mask of the block: with a pattern in each of its groups, else among all columns that are left."""
        factor = problem.whole_gram.obs_factor(self.damping)
        norm = problem.whole_gram.matrix.diagonal().sqrt().masked_fill(factor.dead, DEAD)
        weight, cols = problem.dense.clone(), problem.dense.shape[1]
        mask = torch.zeros_like(weight, dtype=torch.bool) if problem.mask is None else problem.mask
        group = problem.nm[1] or 1
        width = max(group, self.block // group * group)
        for start in range(0, cols, width):
            block = slice(start, min(start + width, cols))
            if problem.mask is None:
                mask[:, block] = _block_mask(weight, mask, norm, block, problem)
            _remove_(weight[:, start:], ~mask[:, block], factor.upper[block, start:])
        restore_dead_(weight, problem.dense, mask, factor.dead)
        return Solved(weight, factor.damping, factor.attempts)

    def working_bytes(self, rows: int, cols: int) -> int:
        """The larger of two phases. While the Gram matrix is factorised: two copies of it in float64. Then: the factor
        in float32, the new weight, and the scores or the systems of equations of some rows with their factors."""
        width = min(self.block, cols)
        systems = 20 * max(min(PART_ENTRIES, rows * width * width), width * width)
        return max(17 * cols * cols, 4 * cols * cols + 4 * rows * cols + max(8 * rows * cols, systems))

    def shared_bytes(self, cols: int) -> int:
        """The factor."""
        return 4 * cols * cols


def _block_mask(weight: Tensor, mask: Tensor, norm: Tensor, block: slice, problem: Problem) -> Tensor:
    """``[rows, width]`` bool: the mask of a block, if the ``mask`` of the columns before it is chosen."""
    if problem.pattern is not None:
        columns = norm[block].contiguous()
        return ops.nm_mask(weight[:, block], "scaled", problem.pattern.keep_n, problem.pattern.group_m, column=columns)
    score = weight.abs().mul_(norm)
    score[:, : block.start] = torch.where(mask[:, : block.start], torch.finfo(score.dtype).max, -1.0)
    return ops.topk_mask(weight, "score", problem.keep, moment=score, group=problem.group.name)[:, block]


def _remove_(weight: Tensor, removed: Tensor, upper: Tensor) -> None:
    """Removes weights of the first columns, and updates all others so that the error is least.

    With ``S`` the inverse of the Gram matrix of these columns and ``q`` the removed ones of a row w, the update is
    ``w -= λ S[q]`` with ``λ S[q, q] = w[q]``.

    Args:
        weight: ``[rows, cols]`` float32, the columns from this block on.
        removed: ``[rows, width]`` bool, of the first columns.
        upper: ``[width, cols]`` float32, the first rows of the triangular factor of ``S = upperᵀ upper``.
    """
    width, most = removed.shape[1], int(removed.sum(1).max())
    inner = upper[:, :width].double()
    inverse, step = inner.T @ inner, max(1, PART_ENTRIES // max(1, most * most))
    for start in range(0, len(weight) if most else 0, step):
        part = slice(start, start + step)
        multipliers = _multipliers(weight[part, :width], removed[part], inverse, most)
        weight[part].addmm_((multipliers @ inner.T).float(), upper, alpha=-1)
    weight[:, :width].masked_fill_(removed, 0.0)


def _multipliers(weight: Tensor, removed: Tensor, inverse: Tensor, most: int) -> Tensor:
    """``λ [rows, width]`` float64 with ``λ inverse = weight`` in the removed columns of each row, at most ``most``, and
    zero in the others. Rows with fewer removed weights have equations ``λ = 0`` added."""
    places = removed.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # removed columns first
    added = ~removed.gather(1, places)
    systems = inverse[places[:, :, None], places[:, None, :]]
    systems.masked_fill_(added[:, :, None] | added[:, None, :], 0.0)
    systems.diagonal(dim1=1, dim2=2).masked_fill_(added, 1.0)
    values = weight.gather(1, places).double().masked_fill_(added, 0.0)
    found = torch.cholesky_solve(values[:, :, None], torch.linalg.cholesky(systems))[:, :, 0]
    return torch.zeros_like(weight, dtype=torch.float64).scatter_(1, places, found)


STAGE = Thanos
