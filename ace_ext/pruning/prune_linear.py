"""Prunes one matrix: by its scores alone, or with the stages that follow them. Several processes may share its rows."""

from typing import Protocol

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.gram import RelativeLoss, masked
from ace_ext.pruning.masks import as_rows, keep_budget, keep_of_group, scored_weight
from ace_ext.pruning.moment_gram import MomentGram
from ace_ext.pruning.scaling import exponent_of, times_power, times_power_
from ace_ext.pruning.stages import MatrixStage, Problem, Solved, Units, overflow
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import Solution


class RowShares(Protocol):
    """The processes that share the rows of each matrix: each prunes a part."""

    def rows(self, count: int) -> slice:
        """This process's rows of a matrix of ``count`` rows."""
        ...

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """``[count, cols]``, the same in every process, from the ``part [own rows, cols]`` of each."""
        ...

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of the ``part`` of every process, with the same bits in each."""
        ...


class AllRows:
    """:class:`RowShares` of a single process: it has all rows."""

    def rows(self, count: int) -> slice:
        """All rows."""
        return slice(0, count)

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """The part is the whole."""
        return part

    def add_up(self, part: Tensor) -> Tensor:
        """The part is the whole."""
        return part


@torch.no_grad()
def prune_linear_(
    weight: Tensor,
    stats: LinearStatistics,
    config: PruneConfig,
    keep_row: int | None = None,
    shares: RowShares | None = None,
) -> Solution | None:
    """Prunes one matrix in place, by its scores alone or with the stages that follow them.

    Args:
        weight: ``[rows, cols]`` float32, float16 or bfloat16; keeps its dtype.
        stats: of the kinds ``config.needs.prune``.
        config: the method and the comparison group.
        keep_row: how many weights to keep in each row; it replaces ``config.sparsity``. With the group ``"matrix"``
            the matrix keeps ``keep_row`` times the number of rows.
        shares: the processes that share the rows; None: this process prunes all of them.

    Returns:
        What the stages did, or None if the scores alone decided.

    Raises:
        ValueError: a value is not finite, the Gram matrix cannot be factorised (see :mod:`ace_ext.pruning.gram`) or
            a stage overflowed. The weight is then unchanged.
    """
    with as_rows(weight) as rows:
        if not config.method.matrix_stages:
            config.comparison.prune_(scored_weight(rows, stats, config), keep_of_group(rows, config, keep_row))
            return None
        try:
            return _run_stages_(rows, stats, config, keep_row, shares)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise InputError(
                f"the Gram matrix of the inputs cannot be factorised ({error}); raise damping, or look for NaN or "
                "overflow in the activations"
            ) from error


def _run_stages_(
    weight: Tensor,
    stats: LinearStatistics,
    config: PruneConfig,
    keep_row: int | None,
    shares: RowShares | None,
) -> Solution | None:
    """Runs the stages that follow the scores, and measures the error after each."""
    method, quantize = config.method, config.method.quantize
    prunes = keep_budget(weight, config, keep_row) < weight.numel()
    if not prunes and quantize is None:
        return Solution(method.name, 0.0, 0, None, 0.0)
    by_rows = config.comparison.name != "matrix" and all(stage.shares_rows for stage in method.matrix_stages)
    shares = shares if shares is not None and by_rows else AllRows()
    rows = shares.rows(len(weight))
    power = exponent_of(weight) or 0  # stages multiply weights by weights
    dense = times_power_(weight.detach().to(torch.float32, copy=True), -power)
    keep = keep_of_group(weight, config, keep_row)
    scored = prunes and method.score is not None
    mask = config.comparison.mask(scored_weight(weight, stats, config), keep) if scored else None
    vectors = None if stats.input is None else MomentGram.of(stats.input)
    whole = Problem(dense, stats.gram, config.comparison, keep, mask, vectors, Units(weight.dtype, power))
    problem = whole.of_rows(rows)
    loss = RelativeLoss(problem.measure.energy, problem.dense, shares.add_up)
    alone = None if mask is None else masked(problem.dense, mask[rows], out=torch.empty_like(problem.dense))
    loss_before = None if alone is None else loss(alone)
    del mask, whole, alone  # the stages need the memory
    solved = _solve(problem, config) if prunes else Solved(problem.dense)
    damping, attempts, loss_unquantized = solved.damping, solved.attempts, None
    if quantize is not None:
        loss_unquantized = loss(solved.weight)
        on_grid = quantize.quantize(problem, solved.weight)
        rounded = on_grid.weight
        if not attempts:
            damping, attempts = on_grid.damping, on_grid.attempts
        del on_grid
    else:
        rounded = problem.units.in_dtype(solved.weight)
        if not torch.isfinite(rounded).all():
            raise overflow(method.name, damping, weight.dtype)
    weight.copy_(shares.gather_rows(rounded, len(weight)))
    del solved, rounded
    pruned = weight[rows] if power == 0 else times_power(weight[rows].float(), -power)
    return Solution(method.name, damping, attempts, loss_before, loss(pruned), loss_unquantized)


def _solve(problem: Problem, config: PruneConfig) -> Solved:
    """Refines the mask, then updates the weights; each only if the method has such a stage."""
    method = config.method
    if method.refine is not None:
        method.refine.refine_(problem)
    if method.solve is not None:
        return method.solve.solve(problem)
    assert problem.mask is not None
    return Solved(problem.dense.masked_fill(~problem.mask, 0.0))


def working_bytes(config: PruneConfig, rows: int, cols: int) -> int:
    """Bytes that pruning one matrix of ``rows x cols`` needs in addition to its weight and statistics.

    By scores alone: a mask of one byte per entry, and the scores of a callable metric. With stages that follow them
    also the dense weight in float32, and what the stages declare. The stage ``quantize`` has the result of the stages
    before it in memory.
    """
    entries, method = rows * cols, config.method
    scores = 4 * entries if callable(method.scored_by.metric) else 0
    if not method.matrix_stages:
        return entries + scores
    held = sum(stage.shared_bytes(cols) for stage in method.matrix_stages)

    def needed(stage: MatrixStage) -> int:
        before = 4 * entries if stage is method.quantize and method.prunes else 0
        return before + stage.working_bytes(rows, cols) + held - stage.shared_bytes(cols)

    return (5 if method.prunes else 4) * entries + scores + max(map(needed, method.matrix_stages))
