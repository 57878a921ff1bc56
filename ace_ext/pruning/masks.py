"""From statistics to zeros: hands each weight to its comparison group, which calls the op."""

from torch import Tensor

from ace_ext import ops
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.criteria import ScoredWeight, bind
from ace_ext.pruning.pattern import keep_count
from ace_ext.pruning.statistics import LinearStatistics

COUNTED_AT_ONCE = 1 << 22


def count_kept(weight: Tensor) -> int:
    """How many entries of ``weight [rows, cols]`` are not zero. As bools, a part at a time: over four times as fast as
    ``count_nonzero`` of bfloat16 on a CPU, for a fixed few megabytes."""
    parts = weight.split(max(1, COUNTED_AT_ONCE // max(1, weight.shape[1])))
    return sum(int(part.bool().sum()) for part in parts)


def scored_weight(weight: Tensor, stats: LinearStatistics | None, config: PruneConfig) -> ScoredWeight:
    """Binds a weight to the configuration's metric. ``stats`` may be None for ``magnitude``."""
    return bind(weight, stats, config.metric, config.ria_exponent)


def keep_of_group(weight: Tensor, config: PruneConfig, keep_row: int | None = None) -> int:
    """How many weights of one comparison group survive; ``keep_row`` of a row, in place of what ``config.sparsity``
    says (see :mod:`ace_ext.pruning.allocation`)."""
    rows, cols = weight.shape
    return config.comparison.keep(rows, cols, config.sparsity, keep_row)


def keep_budget(weight: Tensor, config: PruneConfig, keep_row: int | None = None) -> int:
    """How many weights of a matrix survive (for the group ``model``: would, if each matrix had the same share)."""
    rows, cols = weight.shape
    return config.comparison.budget(rows, cols, config.sparsity, keep_row)


def prune_weight_(scored: ScoredWeight, config: PruneConfig, keep_row: int | None = None) -> None:
    """Zeroes the weight's least important entries in place, compared within rows, the matrix, or N:M groups."""
    config.comparison.prune_(scored, keep_of_group(scored.weight, config, keep_row))


def metric_mask(scored: ScoredWeight, config: PruneConfig, keep_row: int | None = None) -> Tensor:
    """``[rows, cols]`` bool, True where :func:`prune_weight_` would keep. The weight is left as it is."""
    return config.comparison.mask(scored, keep_of_group(scored.weight, config, keep_row))


def prune_model_wide_(weights: list[ScoredWeight], sparsity: float) -> None:
    """Zeroes the least important entries of all weights taken together, exactly as many as ``sparsity`` says. No score
    is stored. Ties are broken by the order of the list, then row, then column."""
    keep = keep_count(sum(scored.weight.numel() for scored in weights), sparsity)
    ops.prune_topk_across_(weights, keep)
