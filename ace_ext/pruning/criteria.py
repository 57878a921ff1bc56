"""The table of metrics: what each reads from the statistics, and the column factor it hands to the ops.

The score of one weight is a functor of ``csrc/core/score.h``; here stands what is the same for a whole column.
Notation: ``W [d_out, d_in]``, inputs ``X [T, d_in]``, dense outputs ``A = X Wᵀ``, ``r_t = 1 / ‖A_t‖²``; ``σ_j`` is the
standard deviation of ``X_j`` over tokens, ``σʳ_j = sqrt(Σ_t r_t (X_tj - m_j)²)`` with ``m_j`` the ``r``-weighted mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ace_ext.pruning.kinds import INPUT, MOMENT, WEIGHTED

if TYPE_CHECKING:
    from ace_ext.pruning.statistics import LinearStatistics


@dataclass(frozen=True)
class Metric:
    """One row of the table. ``column(stats, ria_exponent)`` is float64 ``[d_in]``, or None where it has no factor."""

    formula: str
    needs: frozenset[str]
    column: Callable[["LinearStatistics", float], Tensor] | None
    op_formula: str = "scaled"
    """The formula of :mod:`ace_ext.ops` that scores it."""


def _metric(
    formula: str,
    *needs: str,
    column: Callable[["LinearStatistics", float], Tensor] | None = None,
    op_formula: str = "scaled",
) -> Metric:
    return Metric(formula, frozenset(needs), column, op_formula)


METRICS: dict[str, Metric] = {
    "magnitude": _metric("|W_ij|", op_formula="magnitude"),
    "wanda": _metric("|W_ij| ‖X_j‖", INPUT, column=lambda s, _: s.norm),
    "ria": _metric(
        "(|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) ‖X_j‖^a",
        INPUT,
        column=lambda s, a: s.norm**a,
        op_formula="ria",
    ),
    "stade": _metric("|W_ij| σ_j", INPUT, column=lambda s, _: s.deviation),
    "cosp": _metric(
        "|W_ij| ‖X_j‖ · |W_ij| sqrt(Σ_t (A_ti X_tj r_t)²)",
        INPUT,
        MOMENT,
        column=lambda s, _: s.norm,
        op_formula="cosp",
    ),
    "cosp-exact": _metric(
        "|W_ij| sqrt((Σ_t r_t X_tj² - Σ_t r_t² A_ti² X_tj²) / 2)",
        WEIGHTED,
        MOMENT,
        column=lambda s, _: s.weighted_square_sum,
        op_formula="cosp_exact",
    ),
    "varp": _metric("|W_ij| σ_j", INPUT, column=lambda s, _: s.deviation),
    "cosp+varp": _metric("cosp · σ_j", INPUT, MOMENT, column=lambda s, _: s.norm * s.deviation, op_formula="cosp"),
    "cosvar": _metric("|W_ij| σʳ_j", WEIGHTED, column=lambda s, _: s.weighted_deviation),
    "ace": _metric(
        "|W_ij| sqrt(‖X_j‖ σʳ_j)", INPUT, WEIGHTED, column=lambda s, _: (s.norm * s.weighted_deviation).sqrt()
    ),
}
"""Every metric by name, in the order in which they are listed to users. ``ace`` is the default."""

DEFAULT_METRIC = "ace"


def metric_needs(metric: str | Callable) -> frozenset[str]:
    """The statistics to collect. A user's callable gets the two vectors, and the cross moment if it sets
    ``needs_moment = True`` on itself (that one costs a matrix product as large as the layer's own)."""
    if callable(metric):
        wanted = {INPUT, WEIGHTED}
        return frozenset(wanted | {MOMENT} if getattr(metric, "needs_moment", False) else wanted)
    return METRICS[metric].needs


def column_factor(metric: str, stats: "LinearStatistics", ria_exponent: float) -> Tensor | None:
    """The factor of each column as the ops take it: ``[d_in]`` float32, contiguous; None for ``magnitude``."""
    column = METRICS[metric].column
    return None if column is None else column(stats, ria_exponent).float().contiguous()
