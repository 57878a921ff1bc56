"""Refined masks and weight compensation: from one matrix's statistics to its pruned weight.

Notation: ``W [rows, cols]`` the dense weight, one output channel a row; ``G [cols, cols]`` the Gram matrix of its
inputs (:mod:`ace_ext.pruning.gram`, also on TF32). Every solver lowers ``Σ_i e_i G e_iᵀ``, ``e_i`` the change of
row i. They compute in float32 and leave exactly as many weights as the metric would; pruned ones are +0.0.
"""

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.errors import InputError
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.gram import RHO, AdmmFactor, GramState
from ace_ext.pruning.masks import keep_budget, keep_of_group, metric_mask, prune_weight_, score_mask, scored_weight
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import Solution

OBS_BLOCK = 128
"""Columns that the column-by-column update works on at a time, as in SparseGPT (arXiv 2301.00774)."""


@torch.no_grad()
def prune_linear_(
    weight: Tensor, stats: LinearStatistics, config: PruneConfig, keep: int | None = None
) -> Solution | None:
    """Prunes one matrix in place, by the metric alone or by the config's ``refine`` and ``update``.

    Args:
        weight: ``[rows, cols]`` float32, float16 or bfloat16; stays in its dtype.
        stats: of the kinds ``config.needs``.
        keep: how many weights of a row survive, in place of what ``config.sparsity`` says; for the group ``"matrix"``
            this times the rows survive in the matrix.

    Returns:
        What the solver did, or None where the metric alone decided.

    Raises:
        ValueError: the ops found something not finite, the Gram matrix cannot be factorised
            (see :mod:`ace_ext.pruning.gram`) or the update overflowed. The weight is then as it was.
    """
    scored = scored_weight(weight, stats, config)
    if not config.solver:
        prune_weight_(scored, config, keep)
        return None
    if keep_budget(weight, config, keep) == weight.numel():  # nothing is pruned, so there is nothing to make up for
        return Solution(config.solver, 0.0, 0, 0.0, 0.0)
    gram = stats.gram
    dense = weight.detach().to(torch.float32, copy=True)
    mask: Tensor | None = metric_mask(scored, config, keep)
    loss_before = gram.relative_loss(dense, dense.masked_fill(~mask, 0.0))
    if config.refine is None:
        mask = None  # the update chooses its own
    else:
        refine_mask_(mask, dense, gram, config)
    pruned, damping, attempts = _updated(dense, mask, gram, config, keep)
    if not torch.isfinite(pruned).all():
        raise InputError(f"the {config.solver} update overflowed with damping {damping:g}; raise damping")
    weight.copy_(pruned)
    del pruned
    return Solution(config.solver, damping, attempts, loss_before, gram.relative_loss(dense, weight.float()))


def _updated(
    dense: Tensor, mask: Tensor | None, gram: GramState, config: PruneConfig, keep: int | None
) -> tuple[Tensor, float, int]:
    """The pruned weight ``[rows, cols]`` float32, and the damping and attempts of its factorisation. ``mask`` fixes
    what is kept; with None the update chooses."""
    if config.update == "obs":
        return _obs(dense, mask, gram, config, keep)
    if config.update == "admm":
        factor = gram.admm_factor(config.used_damping)
        return _admm(dense, mask, factor, config, keep), factor.damping, factor.attempts
    return dense.masked_fill(~mask, 0.0), 0.0, 0


def refine_mask_(mask: Tensor, dense: Tensor, gram: GramState, config: PruneConfig) -> None:
    """Swaps kept and pruned weights of each row, inside its N:M groups where there is a pattern, while the error of the
    row's output falls. ``mask [rows, cols]`` bool, ``dense`` of its shape; no weight changes."""
    ops.refine_swaps_(mask, dense, gram.matrix, *_groups(config), config.max_swaps)


def _groups(config: PruneConfig) -> tuple[int, int]:
    """``keep_n`` and ``group_m`` as the ops take them: zeros without a pattern."""
    return (0, 0) if config.pattern is None else (config.pattern.keep_n, config.pattern.group_m)


# Column by column: SparseGPT


def _obs(
    dense: Tensor, mask: Tensor | None, gram: GramState, config: PruneConfig, keep: int | None
) -> tuple[Tensor, float, int]:
    """Prunes columns from left to right and moves each removed weight's part of the output to the columns after it.

    ``mask`` fixes what is kept; with None each block of columns chooses by ``w² / U_jj²``, the error left after the
    best update of the later columns, when it is reached. Returns as :func:`_updated`.
    """
    factor = gram.obs_factor(config.used_damping)
    upper = factor.upper
    weight = dense.masked_fill(factor.dead, 0.0)
    rows, cols = weight.shape
    chooses = mask is None and config.pattern is not None  # then the op writes the mask, group by group
    groups = _groups(config) if chooses else (0, 0)
    width = OBS_BLOCK // groups[1] * groups[1] if chooses else OBS_BLOCK
    chosen = torch.empty(rows, cols, dtype=torch.bool, device=weight.device) if mask is None else mask
    for start in range(0, cols, width):
        end = min(start + width, cols)
        block, inner = weight[:, start:end], upper[start:end, start:end]
        if mask is None and not chooses:
            chosen[:, start:end] = _obs_mask(block, inner, (start, end), dense.shape, config, keep)
        error = torch.empty_like(block)
        ops.obs_block_(block, error, chosen[:, start:end], inner, *groups)
        weight[:, end:].addmm_(error, upper[start:end, end:], alpha=-1)
    return weight, factor.damping, factor.attempts


def _obs_mask(
    block: Tensor, inner: Tensor, columns: tuple[int, int], shape: torch.Size, config: PruneConfig, keep: int | None
) -> Tensor:
    """The mask of one block of columns. Each block keeps its share of what the group keeps in all: the whole part of
    the share up to the block's end, less what the blocks before it got, so the shares add up exactly."""
    start, end = columns
    total = keep_of_group(tuple(shape), config, keep)
    share = total * end // shape[1] - total * start // shape[1]
    return score_mask(block.abs() / inner.diagonal(), share, config.group)


# ADMM


def _admm(dense: Tensor, mask: Tensor | None, factor: AdmmFactor, config: PruneConfig, keep: int | None) -> Tensor:
    """Weights and mask together by the alternating direction method of multipliers (arXiv 2401.02938).

    On columns multiplied by ``norm``, with ``H`` the normalised Gram matrix: ``Z`` is the masked ``W + U``; then
    ``U ← U + W - Z`` and ``W ← (H W₀ + ρ (Z - U)) (H + ρ)⁻¹``. The mask (None: to be chosen) tightens along a cubic
    curve in the first half of the iterations and stays from there on. Matrix products only. Returns the last ``Z``.

    All in four buffers of the weight's size, for they are what a wide matrix needs most memory for.
    """
    weight = dense.masked_fill(factor.dead, 0.0).mul_(factor.norm)
    target, dual, kept = weight @ factor.hessian, torch.zeros_like(weight), torch.empty_like(weight)
    dropped = None if mask is None else ~mask
    tightening = max(1, config.iterations // 2)
    for step in range(config.iterations):
        kept.copy_(weight.add_(dual))
        if dropped is not None:
            kept.masked_fill_(dropped, 0.0)
        else:
            _keep_most_salient_(kept, (step + 1) / tightening, factor, config, keep)
            if step + 1 == tightening:
                dropped = kept == 0  # a kept zero (a dead input's weight) stays one, too
        torch.sub(weight, kept, out=dual)
        torch.mm(kept.sub_(dual).mul_(RHO).add_(target), factor.inverse, out=weight)
    return weight.add_(dual).masked_fill_(dropped, 0.0).div_(factor.norm)


def _keep_most_salient_(
    weight: Tensor, progress: float, factor: AdmmFactor, config: PruneConfig, keep: int | None
) -> None:
    """Zeroes the entries of ``weight [rows, cols]`` that ADMM's mask leaves out when ``progress`` of it has tightened.

    Saliency ``"obs"`` is ``|w_j| / sqrt((H⁻¹)_jj)``, the root of the error that stays after the best update of the
    others; ``"magnitude"`` is ``|w_j|``, which on normalised columns is the error without any.
    """
    if config.saliency == "obs":
        formula, column = "scaled", factor.inverse_diagonal.rsqrt()
    else:
        formula, column = "magnitude", None
    if config.pattern is not None:
        ops.prune_nm_(weight, formula, config.pattern.keep_n, config.pattern.group_m, column=column)
        return
    cols = weight.shape[1]
    pruned = cols - keep_of_group(tuple(weight.shape), config, keep)
    ops.prune_topk_(weight, formula, cols - int(pruned * (1 - (1 - progress) ** 3)), column=column)
