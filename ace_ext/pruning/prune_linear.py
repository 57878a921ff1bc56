"""Prunes one matrix: by the metric alone, or by the solvers that follow it."""

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.gram import RelativeLoss
from ace_ext.pruning.masks import as_rows, keep_budget, keep_of_group, metric_mask, prune_weight_, scored_weight
from ace_ext.pruning.moment_gram import MomentGram
from ace_ext.pruning.row_shares import AllRows, RowShares
from ace_ext.pruning.scaling import exponent_of, times_power, times_power_
from ace_ext.pruning.solvers import Problem, Solved
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import Solution


@torch.no_grad()
def prune_linear_(
    weight: Tensor,
    stats: LinearStatistics,
    config: PruneConfig,
    keep_row: int | None = None,
    shares: RowShares | None = None,
) -> Solution | None:
    """Prunes one matrix in place, by the metric alone or by the config's solvers.

    Args:
        weight: ``[rows, cols]`` float32, float16 or bfloat16; keeps its dtype.
        stats: of the kinds ``config.needs.prune``.
        config: metric, comparison group and solvers.
        keep_row: how many weights of a row to keep; replaces ``config.sparsity``. With the group ``"matrix"`` the
            matrix keeps ``keep_row`` times the number of rows.
        shares: the processes that share the work; None: this one does all.

    Returns:
        What the solver did, or None if the metric alone decided.

    Raises:
        ValueError: a value is not finite, the Gram matrix cannot be factorised (see :mod:`ace_ext.pruning.gram`) or
            the update overflowed. The weight is then unchanged.
    """
    with as_rows(weight) as rows:
        try:
            return _prune_rows_(rows, stats, config, keep_row, shares)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise InputError(
                f"the Gram matrix of the inputs cannot be factorised ({error}); raise damping, or look for NaN or "
                "overflow in the activations"
            ) from error


def _prune_rows_(
    weight: Tensor,
    stats: LinearStatistics,
    config: PruneConfig,
    keep_row: int | None,
    shares: RowShares | None,
) -> Solution | None:
    """:func:`prune_linear_` of a weight with contiguous rows."""
    scored = scored_weight(weight, stats, config)
    name = config.solver.name
    if not name:
        prune_weight_(scored, config, keep_row)
        return None
    if keep_budget(weight, config, keep_row) == weight.numel():  # nothing is pruned: nothing to compensate for
        return Solution(name, 0.0, 0, 0.0, 0.0)
    by_rows = config.comparison.name != "matrix" and all(solver.row_wise for solver in config.solver.matrix_solvers)
    shares = shares if shares is not None and by_rows else AllRows()
    rows = shares.rows(len(weight))
    power = exponent_of(weight) or 0  # solvers multiply weights by weights
    dense = times_power_(weight.detach().to(torch.float32, copy=True), -power)
    mask = metric_mask(scored, config, keep_row)
    moments = stats.weighted if config.solver.gram == "cosine" else stats.input
    vectors = None if moments is None else MomentGram.of(moments)
    keep = keep_of_group(weight, config, keep_row)
    problem = Problem(dense, stats.gram, config.comparison, keep, mask, vectors).of_rows(rows)
    loss = RelativeLoss(problem.measure.energy, problem.dense, shares.add_up)
    loss_before = loss(problem.dense.masked_fill(~mask[rows], 0.0))
    del mask  # a solver that chooses its own needs the memory
    solved = _solve(problem, config)
    rounded = times_power(solved.weight, power).to(weight.dtype)
    if not torch.isfinite(rounded).all():  # also where only the weight's dtype, as float16, is too narrow
        wider = ", or load the model as bfloat16" if weight.dtype == torch.float16 else ""
        raise InputError(f"the {name} update overflowed with damping {solved.damping:g}; raise damping{wider}")
    weight.copy_(shares.gather_rows(rounded, len(weight)))
    damping, attempts = solved.damping, solved.attempts
    del solved, rounded
    pruned = weight[rows] if power == 0 else times_power(weight[rows].float(), -power)
    return Solution(name, damping, attempts, loss_before, loss(pruned))


def _solve(problem: Problem, config: PruneConfig) -> Solved:
    """Refines the metric's mask, then updates the weights; each only if the configuration asks for it."""
    solver = config.solver
    if solver.mask_solver is not None:
        solver.mask_solver.refine_(problem, solver.options_for(solver.mask_solver))
    elif solver.weight_solver is not None and solver.weight_solver.chooses_mask:
        problem.mask = None
    if solver.weight_solver is not None:
        return solver.weight_solver.solve(problem, solver.options_for(solver.weight_solver))
    assert problem.mask is not None
    return Solved(problem.dense.masked_fill(~problem.mask, 0.0))


def working_bytes(config: PruneConfig, rows: int, cols: int) -> int:
    """Bytes that pruning one matrix of ``rows x cols`` needs in addition to its weight and statistics.

    Without a solver: a mask of one byte per entry, and the scores of a callable metric. With a solver also the dense
    weight in float32, and what the solver declares.
    """
    entries = rows * cols
    scores = 4 * entries if callable(config.metric) else 0
    if not config.solver.name:
        return entries + scores
    solver = config.solver
    return 5 * entries + scores + max(held.held_bytes(rows, cols, solver.gram) for held in solver.matrix_solvers)
