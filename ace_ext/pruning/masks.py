"""From statistics to zeros: hands each weight to the op that its pattern and group ask for."""

from collections.abc import Callable

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.errors import InputError
from ace_ext.ops import ScoredWeight
from ace_ext.pruning.config import PruneConfig, keep_count
from ace_ext.pruning.criteria import METRICS, column_factor
from ace_ext.pruning.statistics import LinearStatistics

COUNTED_AT_ONCE = 1 << 22


def count_kept(weight: Tensor) -> int:
    """How many entries of ``weight [rows, cols]`` are not zero. As bools, a part at a time: over four times as fast as
    ``count_nonzero`` of bfloat16 on a CPU, for a fixed few megabytes."""
    parts = weight.split(max(1, COUNTED_AT_ONCE // max(1, weight.shape[1])))
    return sum(int(part.bool().sum()) for part in parts)


def scored_weight(weight: Tensor, stats: LinearStatistics | None, config: PruneConfig) -> ScoredWeight:
    """Binds a weight to its metric. ``stats`` may be None for ``magnitude``."""
    if callable(config.metric):
        return ScoredWeight(weight, "score", None, _custom_score(config.metric, weight, stats))
    moment = None if stats is None else stats.moment
    column = column_factor(config.metric, stats, config.ria_exponent)
    return ScoredWeight(weight, METRICS[config.metric].op_formula, column, moment)


def _custom_score(metric: Callable, weight: Tensor, stats: LinearStatistics | None) -> Tensor:
    score = metric(weight.detach(), stats)
    if not isinstance(score, Tensor) or score.shape != weight.shape or not score.is_floating_point():
        found = f"{score.dtype} {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise InputError(f"metric must return a float tensor of the weight's shape {list(weight.shape)} (got {found})")
    return score.to(weight.device, torch.float32).contiguous()


def keep_of_group(shape: tuple[int, int], config: PruneConfig, keep: int | None = None) -> int:
    """How many weights of one group, a row or a matrix, survive.

    Args:
        shape: the weight's rows and columns.
        keep: how many of a row, in place of what ``config.sparsity`` says (see :mod:`ace_ext.pruning.allocation`).
    """
    rows, cols = shape
    if config.group == "row":
        return keep_count(cols, config.sparsity) if keep is None else keep
    return keep_count(rows * cols, config.sparsity) if keep is None else rows * keep


def keep_budget(weight: Tensor, config: PruneConfig, keep: int | None = None) -> int:
    """How many weights of a matrix survive (for the group ``model``: would, if each matrix had the same share)."""
    rows, cols = weight.shape
    if config.pattern is not None:
        return rows * (cols // config.pattern.group_m) * config.pattern.keep_n
    return keep_of_group((rows, cols), config, keep) * (rows if config.group == "row" else 1)


def prune_weight_(scored: ScoredWeight, config: PruneConfig, keep: int | None = None) -> None:
    """Zeroes the weight's least important entries in place, compared within rows, the matrix, or N:M groups."""
    arguments = {"column": scored.column, "moment": scored.moment}
    if config.pattern is not None:
        ops.prune_nm_(scored.weight, scored.formula, config.pattern.keep_n, config.pattern.group_m, **arguments)
        return
    keep_k = keep_of_group(tuple(scored.weight.shape), config, keep)
    ops.prune_topk_(scored.weight, scored.formula, keep_k, group=config.group, **arguments)


def metric_mask(scored: ScoredWeight, config: PruneConfig, keep: int | None = None) -> Tensor:
    """``[rows, cols]`` bool, True where :func:`prune_weight_` would keep. The weight is left as it is."""
    arguments = {"column": scored.column, "moment": scored.moment}
    if config.pattern is not None:
        pattern = config.pattern
        return ops.nm_mask(scored.weight, scored.formula, pattern.keep_n, pattern.group_m, **arguments)
    keep_k = keep_of_group(tuple(scored.weight.shape), config, keep)
    return ops.topk_mask(scored.weight, scored.formula, keep_k, group=config.group, **arguments)


def score_mask(score: Tensor, keep_k: int, group: str = "row") -> Tensor:
    """``[rows, cols]`` bool, True at the best ``keep_k`` of ``score [rows, cols]`` in each row or the ``"matrix"``."""
    score = score.to(torch.float32).contiguous()
    return ops.topk_mask(score, "score", keep_k, moment=score, group=group)


def prune_model_wide_(weights: list[ScoredWeight], sparsity: float) -> None:
    """Zeroes the least important entries of all weights taken together, exactly as many as ``sparsity`` says.

    Ties are broken by the order of the list, then row, then column.
    """
    ops.prune_topk_across_(weights, keep_count(sum(scored.weight.numel() for scored in weights), sparsity))
