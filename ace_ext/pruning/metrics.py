"""The table of metrics: which statistics each reads, and the column factor that it passes to the ops.

The ops compute the score of a weight (``csrc/core/score.h``). This file holds the factor that all weights of a column
share. A new metric that is a column factor is one entry in :data:`METRICS` and one line in
:func:`ace_ext.ops.reference.column_factor`.

Notation: ``W [d_out, d_in]``, inputs ``X [T, d_in]``, dense outputs ``A = X Wᵀ``, ``r_t = 1 / ‖A_t‖²``; ``σ_j`` is the
standard deviation of ``X_j`` over tokens, ``σʳ_j = sqrt(Σ_t r_t (X_tj - m_j)²)`` with ``m_j`` the ``r``-weighted mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.pruning.kinds import INPUT, MOMENT, WEIGHTED
from ace_ext.pruning.statistics import LinearStatistics

Column = Callable[[LinearStatistics, float], Tensor]
"""A column factor: ``(stats, ria_exponent) -> [d_in]`` float64."""
CustomMetric = Callable[[Tensor, LinearStatistics], Tensor]
"""A user's own metric: ``(weight [rows, cols], stats) -> score [rows, cols]``, a float tensor, higher = keep."""


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    formula: str
    """In mathematical notation, for help texts and documentation."""
    op_formula: str
    """The formula's name in the ops: ``scaled`` is ``|W_ij|`` times the column factor."""
    needs: frozenset[str]
    """The kinds of statistics that it reads, of :mod:`ace_ext.pruning.kinds`."""
    column: Column | None
    """None for a metric without a column factor."""


def _metric(formula: str, op_formula: str, *needs: str, column: Column | None = None) -> Metric:
    return Metric(formula, op_formula, frozenset(needs), column)


METRICS: dict[str, Metric] = {
    "magnitude": _metric("|W_ij|", "magnitude"),
    "wanda": _metric("|W_ij| ‖X_j‖", "scaled", INPUT, column=lambda s, _: s.norm),
    "ria": _metric("(|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) ‖X_j‖^a", "ria", INPUT, column=lambda s, a: s.norm**a),
    "stade": _metric("|W_ij| σ_j", "scaled", INPUT, column=lambda s, _: s.deviation),
    "cosp": _metric(
        "|W_ij| ‖X_j‖ · |W_ij| sqrt(Σ_t (A_ti X_tj r_t)²)", "cosp", INPUT, MOMENT, column=lambda s, _: s.norm
    ),
    "cosp-exact": _metric(
        "|W_ij| sqrt((Σ_t r_t X_tj² - Σ_t r_t² A_ti² X_tj²) / 2)",
        "cosp_exact",
        WEIGHTED,
        MOMENT,
        column=lambda s, _: s.weighted_square_sum,
    ),
    "cosvar": _metric("|W_ij| σʳ_j", "scaled", WEIGHTED, column=lambda s, _: s.weighted_deviation),
    "norm-cosvar": _metric(
        "|W_ij| sqrt(‖X_j‖ σʳ_j)", "scaled", INPUT, WEIGHTED, column=lambda s, _: (s.norm * s.weighted_deviation).sqrt()
    ),
    "ace": _metric("cosp · σ_j", "cosp", INPUT, MOMENT, column=lambda s, _: s.norm * s.deviation),
}
"""Every metric by name, in the order of help texts. ``ace`` is the method of the paper (arXiv 2505.21987), the product
of its two metrics, as far as its public record describes it."""
METRICS["varp"] = METRICS["stade"]  # the paper's name of the same formula

DEFAULT_METRIC = "wanda"
"""The cheapest metric that is usable on every measured model. For a lower perplexity use a preset."""


def metric_needs(metric: str | CustomMetric) -> frozenset[str]:
    """The kinds of statistics to collect for a metric.

    A callable gets ``input`` and ``weighted``. It also gets the cross moment if it has the attribute
    ``needs_moment = True``. The cross moment costs a matrix product as large as the Linear's own.
    """
    if callable(metric):
        wanted = {INPUT, WEIGHTED}
        return frozenset(wanted | {MOMENT} if getattr(metric, "needs_moment", False) else wanted)
    return METRICS[metric].needs


def column_factor(metric: str, stats: LinearStatistics | None, ria_exponent: float) -> Tensor | None:
    """The factor of each column as the ops take it: ``[d_in]`` float32, contiguous; None for ``magnitude``.

    Raises:
        ValueError: the metric needs statistics that ``stats`` does not hold, or ``stats`` is None.
    """
    column = METRICS[metric].column
    if column is None:
        return None
    if stats is None:
        raise ValueError(f"metric {metric} needs statistics (got none)")
    return column(stats, ria_exponent).float().contiguous()


def custom_score(metric: CustomMetric, weight: Tensor, stats: LinearStatistics | None) -> Tensor:
    """The scores ``[rows, cols]`` float32 that a user's own metric gives a weight.

    Raises:
        InputError: the metric returned something other than finite floats in the weight's shape.
    """
    given = weight.detach().clone()  # it may compute in place
    score: object = metric(given, cast(LinearStatistics, stats))  # None only if the caller passed None
    if not (isinstance(score, Tensor) and score.shape == weight.shape and score.is_floating_point() and _dense(score)):
        shape = list(weight.shape)
        raise InputError(f"metric must return a float tensor of the weight's shape {shape} (got {_words(score)})")
    score = score.to(weight.device, torch.float32).contiguous()
    finite = torch.isfinite(score)
    if not bool(finite.all()):
        place = divmod(int(finite.flatten().byte().argmin()), score.shape[1])
        raise InputError(f"metric must return finite scores (got {score[place]:g} at {list(place)}, in float32)")
    return score


def _dense(score: Tensor) -> bool:
    return score.layout == torch.strided and not score.is_meta


def _words(answer: object) -> str:
    if not isinstance(answer, Tensor):
        return type(answer).__name__
    kind = "" if _dense(answer) else "meta " if answer.is_meta else "sparse "
    return f"{kind}{answer.dtype} {list(answer.shape)}"
