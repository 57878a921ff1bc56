"""Pruning by the metric alone: binds a weight to its scores and calls the op of the comparison group."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.ops import ScoredWeight
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.criteria import bind
from ace_ext.pruning.pattern import keep_count
from ace_ext.pruning.statistics import LinearStatistics

COUNTED_AT_ONCE = 1 << 22
"""Entries that :func:`count_kept` converts to bool at a time."""


def count_kept(weight: Tensor) -> Tensor:
    """How many entries of ``weight [rows, cols]`` are not zero: ``[]`` int64, on the weight's device.

    Summing bools in parts is over four times as fast as ``count_nonzero`` of bfloat16 on a CPU, and needs only a few
    megabytes.
    """
    parts = torch.split(weight, max(1, COUNTED_AT_ONCE // max(1, weight.shape[1])))
    return torch.stack([part.bool().sum() for part in parts]).sum()


@contextmanager
def as_rows(weight: Tensor) -> Iterator[Tensor]:
    """``weight [rows, cols]`` as the ops take it: itself if its rows are contiguous, else a copy, which is written back
    at the end. A parameter that is stored transposed needs the copy."""
    if weight.shape[1] <= 1 or weight.stride(1) == 1:
        yield weight
        return
    rows = weight.detach().contiguous()
    yield rows
    weight.detach().copy_(rows)


def scored_weight(weight: Tensor, stats: LinearStatistics | None, config: PruneConfig) -> ScoredWeight:
    """Binds a weight to the method's scores; see :func:`ace_ext.pruning.criteria.bind`."""
    score = config.method.scored_by
    return bind(weight, stats, score.metric, score.exponent)


def keep_of_group(weight: Tensor, config: PruneConfig, keep_row: int | None = None) -> int:
    """How many weights of one comparison group are kept. ``keep_row``, if given, is the number kept of each row and
    replaces ``config.sparsity`` (see :mod:`ace_ext.pruning.allocation`)."""
    rows, cols = weight.shape
    return config.comparison.keep(rows, cols, config.sparsity, keep_row)


def keep_budget(weight: Tensor, config: PruneConfig, keep_row: int | None = None) -> int:
    """How many weights of a matrix are kept. For the group ``model``: how many would be if every matrix kept the same
    share."""
    rows, cols = weight.shape
    return config.comparison.budget(rows, cols, config.sparsity, keep_row)


def prune_weight_(scored: ScoredWeight, config: PruneConfig, keep_row: int | None = None) -> None:
    """Zeroes the weight's entries with the lowest scores in place, compared within rows, the matrix, or N:M groups."""
    config.comparison.prune_(scored, keep_of_group(scored.weight, config, keep_row))


def metric_mask(scored: ScoredWeight, config: PruneConfig, keep_row: int | None = None) -> Tensor:
    """``[rows, cols]`` bool, True where :func:`prune_weight_` would keep a weight. The weight is not changed."""
    return config.comparison.mask(scored, keep_of_group(scored.weight, config, keep_row))


def prune_model_wide_(weights: list[ScoredWeight], sparsity: float) -> None:
    """Zeroes the entries with the lowest scores of all weights taken together, in place.

    Exactly as many are zeroed as ``sparsity`` says. Scores are recomputed rather than stored. Ties are broken by the
    order of the list, then row, then column.
    """
    keep = keep_count(sum(scored.weight.numel() for scored in weights), sparsity)
    ops.prune_topk_across_(weights, keep)
