"""Sparsity allocation: how many weights of a row each matrix keeps if blocks may differ and the total is fixed.

A rule gives each block its sparsity. One rounding turns sparsities into whole numbers and keeps the total
(:func:`allocate`). Without the stage ``allocate`` all blocks have the same sparsity.

That is the default because both rules had a higher perplexity at 50 % where they were measured: SmolLM2-135M, bfloat16
on a CPU, ``ace``, 64 x 128 tokens of wiki-mini, seed 0, default ranges, 12 windows of 512 tokens; perplexity on
wiki-mini and news-mini: the same sparsity 70.4 and 73.6, owl 73.0 and 74.3, error 83.0 and 82.8. The rule ``error``
prunes the first and last blocks most, because their own outputs have the smallest error. It does not measure how later
blocks amplify that error.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from ace_ext import ops
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.masks import scored_weight
from ace_ext.pruning.pattern import keep_count
from ace_ext.pruning.stages.allocate import ERROR, OWL, Allocate
from ace_ext.pruning.statistics import LinearStatistics

OUTLIER_FACTOR = 5.0
"""A score is an outlier above this many times its block's mean (``M`` of OWL, arXiv 2310.05175)."""
ERROR_REACH = 3.0
"""With ``by=error`` a block's sparsity may differ from the target by this many times the option ``range``. This rule
reads a whole error curve and OWL one number, so its bound can be wider: it only limits unreliable curves."""
CURVE_POINTS = 61
"""Number of sparsities at which a block's error is measured."""

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class BlockMeasure:
    """What the allocation rules read about one dense block."""

    outlier_share: float
    """The share of the block's scores that exceed ``OUTLIER_FACTOR`` times their mean."""
    errors: FloatArray | None
    """``[CURVE_POINTS]`` float64, for ``by=error``: the block's error at each sparsity of :func:`sparsity_grid`."""


def _stage(config: PruneConfig) -> Allocate:
    assert config.method.allocate is not None  # only called for methods that have the stage
    return config.method.allocate


def sparsity_grid(config: PruneConfig) -> FloatArray:
    """``[CURVE_POINTS]`` float64: the sparsities that ``by=error`` chooses from, both ends included."""
    reach = ERROR_REACH * _stage(config).range
    return np.linspace(max(0.0, config.sparsity - reach), min(1.0, config.sparsity + reach), CURVE_POINTS)


def measure_block(
    linears: dict[str, nn.Linear], stats: dict[str, LinearStatistics], config: PruneConfig
) -> BlockMeasure:
    """Measures a dense block.

    Args:
        linears: the block's Linears by name.
        stats: their statistics by the same names, of the kinds ``config.needs.measure``.
        config: its method has the scores and the allocation rule.

    Raises:
        ValueError: a weight, a factor or a score is not finite.
    """
    scores = {}
    for child, linear in linears.items():
        scored = scored_weight(linear.weight.detach().contiguous(), stats[child], config)
        scores[child] = ops.score(scored.weight, scored.formula, scored.column, scored.moment)
    size = max(1, sum(score.numel() for score in scores.values()))
    mean = sum(float(score.double().sum()) for score in scores.values()) / size
    outliers = sum(int((score > OUTLIER_FACTOR * mean).sum()) for score in scores.values())
    errors = None
    if _stage(config).by == ERROR:
        curves = [_error_curve(linear.weight, scores[child], stats[child], config) for child, linear in linears.items()]
        errors = np.sum(curves, axis=0) if curves else np.zeros(CURVE_POINTS)
    return BlockMeasure(outliers / size, errors)


def _error_curve(weight: Tensor, score: Tensor, stats: LinearStatistics, config: PruneConfig) -> FloatArray:
    """``[CURVE_POINTS]`` float64: the mean over tokens of ``‖A'_t - A_t‖² / ‖A_t‖²`` when the lowest scores are pruned.

    This is an approximation: of ``G = Σ_t r_t X_t X_tᵀ`` in the error ``Σ_i e_i G e_iᵀ`` only the diagonal is used,
    ``Σ_j e_ij² Σ_t r_t X_tj²``. A cumulative sum over the sorted weights then gives the error at every sparsity.
    """
    error = weight.detach().double().square() * stats.weighted_square_sum / max(1, stats.tokens)
    groups = len(weight) if config.group == "row" else 1
    order = score.reshape(groups, -1).argsort(dim=1)
    removed = error.reshape(groups, -1).gather(1, order).sum(0).cumsum(0).cpu().numpy()
    size = len(removed)
    curve: FloatArray = np.interp(sparsity_grid(config) * size, np.arange(size + 1), np.concatenate([[0.0], removed]))
    return curve


def allocate(measures: list[BlockMeasure], config: PruneConfig, shapes: list[Shapes]) -> list[dict[str, int]]:
    """How many weights of each row to keep, for each block and each of its matrices.

    All matrices of a block get the block's sparsity, up to rounding. The model keeps exactly as many weights as
    ``group="row"`` keeps without allocation. The same holds for each set of matrices with the same number of rows:
    within a set, one weight more per row in one matrix is one weight less per row in another. So a matrix keeps its
    share without allocation if no other matrix has its number of rows.

    Args:
        measures: one for each block; not read without the stage ``allocate``.
        config: its method has the rule, and it has the target sparsity.
        shapes: rows and columns of each block's matrices, by name.
    """
    if config.method.allocate is None:
        return [{child: keep_count(cols, config.sparsity) for child, (_, cols) in block.items()} for block in shapes]
    sizes = np.array([sum(rows * cols for rows, cols in block.values()) for block in shapes], dtype=np.float64)
    if config.method.allocate.by == OWL:
        sparsities = _owl(np.array([measure.outlier_share for measure in measures]), sizes, config)
    else:
        sparsities = _equal_marginal_error(np.array([measure.errors for measure in measures]), sizes, config)
    return _whole_numbers(sparsities, config, shapes)


def _owl(outliers: FloatArray, sizes: FloatArray, config: PruneConfig) -> FloatArray:
    """``[blocks]``: sparsity falls linearly with the share of outliers, by twice the option ``range`` in all. It is
    shifted so that its mean over weights is the target."""
    spread = outliers.max() - outliers.min()
    scaled = (outliers - outliers.min()) / spread if spread > 0 else np.zeros_like(outliers)
    offset = -2 * _stage(config).range * scaled
    return np.clip(config.sparsity + offset - np.average(offset, weights=sizes), 0.0, 1.0)


def _equal_marginal_error(errors: FloatArray, sizes: FloatArray, config: PruneConfig) -> FloatArray:
    """``[blocks]``: minimises the sum of the blocks' errors at the target's total (water-filling).

    At the minimum, one more pruned weight costs the same in every block that is not at the end of its range. Bisection
    finds that cost. The slopes of ``errors [blocks, CURVE_POINTS]`` are made non-decreasing: the curves are treated as
    convex.
    """
    grid = sparsity_grid(config)
    errors = np.ldexp(errors, -np.frexp(errors.max())[1])  # exact; the slopes of tiny errors would lose digits
    slopes = np.maximum.accumulate(np.gradient(errors, grid, axis=1) / sizes[:, None], axis=1)
    low, high = slopes.min(), slopes.max()
    target = config.sparsity * sizes.sum()
    for _ in range(100):
        level = (low + high) / 2
        if _at_level(level, slopes, grid) @ sizes < target:
            low = level
        else:
            high = level
    return _at_level(high, slopes, grid)


def _at_level(level: float, slopes: FloatArray, grid: FloatArray) -> FloatArray:
    """``[blocks]``: each block's sparsity where its slope reaches ``level``."""
    return np.array([np.interp(level, slope, grid) for slope in slopes])


def _whole_numbers(sparsities: FloatArray, config: PruneConfig, shapes: list[Shapes]) -> list[dict[str, int]]:
    """Rounds within each set of matrices that have the same number of rows. Each set keeps as many weights as it does
    without allocation."""
    keeps: list[dict[str, int]] = [dict.fromkeys(block, 0) for block in shapes]
    sets: dict[int, list[tuple[int, str]]] = {}
    for index, block in enumerate(shapes):
        for child, (rows, _) in block.items():
            sets.setdefault(rows, []).append((index, child))
    for members in sets.values():
        cols = np.array([shapes[index][child][1] for index, child in members])
        total = sum(keep_count(int(count), config.sparsity) for count in cols)
        wanted = _shifted(1 - sparsities[[index for index, _ in members]], cols, total)
        for (index, child), keep in zip(members, _largest_remainder(wanted, total), strict=True):
            keeps[index][child] = keep
    return keeps


def _shifted(shares: FloatArray, cols: FloatArray, total: int) -> FloatArray:
    """Weights to keep of a row, before rounding, with the sum ``total``: all shares are shifted by the same amount and
    clipped to 0 and 1."""
    low, high = -1.0, 1.0
    for _ in range(60):
        shift = (low + high) / 2
        if np.clip(shares + shift, 0, 1) @ cols < total:
            low = shift
        else:
            high = shift
    return np.clip(shares + high, 0, 1) * cols


def _largest_remainder(wanted: FloatArray, total: int) -> list[int]:
    """Whole numbers that sum to ``total``: rounded down, then one more for the largest remainders; ties go to the
    earlier entry."""
    down = np.floor(wanted + 1e-6)  # bisection may end just below a whole number
    keep = down.astype(int)
    for place in np.argsort(down - wanted, kind="stable")[: total - keep.sum()]:
        keep[place] += 1
    return [int(count) for count in keep]
