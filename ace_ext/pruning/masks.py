"""Pruning by scores alone: the scores of a weight, the number of weights to keep, and the mask."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.ops import ScoredWeight
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.groups import keep_count
from ace_ext.pruning.metrics import METRICS, column_factor, custom_score
from ace_ext.pruning.statistics import LinearStatistics

COUNTED_AT_ONCE = 1 << 22
"""Entries that :func:`count_kept` converts to bool at a time."""


def count_kept(weight: Tensor) -> Tensor:
    """How many entries of ``weight [rows, cols]`` are not zero: ``[]`` int64, on the weight's device.

    Sums of bools in parts are over four times as fast as ``count_nonzero`` of bfloat16 on a CPU. They need only a few
    megabytes.
    """
    parts = torch.split(weight, max(1, COUNTED_AT_ONCE // max(1, weight.shape[1])))
    return torch.stack([part.bool().sum() for part in parts]).sum()


@contextmanager
def as_rows(weight: Tensor) -> Iterator[Tensor]:
    """``weight [rows, cols]`` in the layout of the ops: itself if its rows are contiguous, else a copy that is written
    back at the end. A parameter that is stored transposed needs the copy."""
    if weight.shape[1] <= 1 or weight.stride(1) == 1:
        yield weight
        return
    rows = weight.detach().contiguous()
    yield rows
    weight.detach().copy_(rows)


def scored_weight(weight: Tensor, stats: LinearStatistics | None, config: PruneConfig) -> ScoredWeight:
    """A weight ``[rows, cols]`` with what its scores are computed from. ``stats`` may be None for ``magnitude``.

    Raises:
        InputError: a callable metric returned something other than a float tensor of the weight's shape.
        ValueError: the metric needs statistics that ``stats`` does not hold.
    """
    stage = config.method.scored_by
    if callable(stage.metric):
        return ScoredWeight(weight, "score", None, custom_score(stage.metric, weight, stats))
    moment = None if stats is None else stats.moment
    column = column_factor(stage.metric, stats, stage.exponent)
    return ScoredWeight(weight, METRICS[stage.metric].op_formula, column, moment)


def keep_of_group(weight: Tensor, config: PruneConfig, keep_row: int | None = None) -> int:
    """How many weights of one comparison group are kept. ``keep_row``, if given, is the number of weights to keep in
    each row; it replaces ``config.sparsity`` (see :mod:`ace_ext.pruning.allocation`)."""
    rows, cols = weight.shape
    return config.comparison.keep(rows, cols, config.sparsity, keep_row)


def keep_budget(weight: Tensor, config: PruneConfig, keep_row: int | None = None) -> int:
    """How many weights of a matrix are kept. For the group ``model``: how many would be kept if every matrix kept the
    same share."""
    rows, cols = weight.shape
    return config.comparison.budget(rows, cols, config.sparsity, keep_row)


def prune_model_wide_(weights: list[ScoredWeight], sparsity: float) -> None:
    """Zeroes the entries with the lowest scores of all weights together, in place.

    The number of zeroed entries is exactly the one that ``sparsity`` gives. Scores are not stored but computed again.
    Ties are broken by the order of the list, then row, then column.
    """
    keep = keep_count(sum(scored.weight.numel() for scored in weights), sparsity)
    ops.prune_topk_across_(weights, keep)
