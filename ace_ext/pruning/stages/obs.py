"""SparseGPT's update (arXiv 2301.00774): prune columns from left to right; later columns compensate for each.

The Gram matrix ``G [cols, cols]`` of the inputs measures errors (:mod:`ace_ext.pruning.gram`): the change ``e`` of a
row costs ``e G eᵀ``. Everything is computed in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.pruning.gram import DEAD, restore_dead_
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

OBS_BLOCK = 128
"""Columns that the update processes at a time, as in SparseGPT."""


@dataclass(frozen=True)
class Obs(Solve):
    """SparseGPT's update, column by column."""

    name = "obs"
    summary = "SparseGPT's update, column by column (arXiv 2301.00774)"
    groups = ("matrix", "row")

    damping: float = damping_option(0.01)
    gram: str = gram_option(AUTO, PLAIN, SHARED, COSINE)

    def solve(self, problem: Problem) -> Solved:
        """Prunes columns from left to right and updates the later columns to compensate for each removed weight.

        Without a mask, the mask of each block of columns is chosen when the block is reached, by ``w² / U_jj²``: the
        error that remains after the best update of the later columns.
        """
        factor = problem.whole_gram.obs_factor(self.damping)
        upper = factor.upper
        weight = problem.dense * torch.ones_like(upper[0]).masked_fill_(factor.dead, DEAD)
        rows, cols = weight.shape
        by_pattern = problem.mask is None and problem.pattern is not None  # then the op chooses each N:M group's mask
        keep_n, group_m = problem.nm if by_pattern else (0, 0)
        width = OBS_BLOCK // group_m * group_m if by_pattern else OBS_BLOCK
        mask = problem.mask
        chosen = torch.empty(rows, cols, dtype=torch.bool, device=weight.device) if mask is None else mask
        for start in range(0, cols, width):
            end = min(start + width, cols)
            block, inner = weight[:, start:end], upper[start:end, start:end]
            if mask is None and not by_pattern:
                chosen[:, start:end] = _block_mask(block, inner, (start, end), problem)
            error = torch.empty_like(block)
            ops.obs_block_(block, error, chosen[:, start:end], inner, keep_n, group_m)
            weight[:, end:].addmm_(error, upper[start:end, end:], alpha=-1)
        restore_dead_(weight, problem.dense, chosen, factor.dead)
        return Solved(weight, factor.damping, factor.attempts)

    def working_bytes(self, rows: int, cols: int) -> int:
        """The larger of two phases. While the Gram matrix is factorised: two copies of it in float64. Then: the factor
        in float32, two buffers of the weight's size, and the buffers of one block of columns."""
        return max(17 * cols * cols, 4 * cols * cols + 11 * rows * cols)

    def shared_bytes(self, cols: int) -> int:
        """The factor."""
        return 4 * cols * cols


def _block_mask(block: Tensor, inner: Tensor, columns: tuple[int, int], problem: Problem) -> Tensor:
    """The mask of one block of columns ``[start, end)``. The block keeps ``keep * end // cols - keep * start // cols``
    weights, so the numbers of all blocks add up to ``keep`` exactly."""
    start, end = columns
    cols = problem.dense.shape[1]
    share = problem.keep * end // cols - problem.keep * start // cols
    return ops.topk_mask(block, "score", share, moment=block.abs() / inner.diagonal(), group=problem.group.name)


STAGE = Obs
