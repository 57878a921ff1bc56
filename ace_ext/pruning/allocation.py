"""How many weights of a row each matrix keeps, so that blocks which suffer less give up more, at the same total.

Three rules give a block its sparsity; one rounding turns it into whole numbers and keeps the total (:func:`allocate`).

Uniform is the default because the others lost where they were measured: SmolLM2-135M, bfloat16 on a CPU, metric ace at
50 %, 64 x 128 tokens of wiki-mini, seed 0, ranges as by default, 12 windows of 512 tokens; perplexity on wiki-mini and
news-mini 70.4 and 73.6 uniform, 73.0 and 74.3 owl, 83.0 and 82.8 error. The error rule takes much from the first and
last blocks, whose own outputs suffer least; what the rest of the model makes of their errors it does not see.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ace_ext import ops
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.masks import scored_weight
from ace_ext.pruning.pattern import keep_count
from ace_ext.pruning.statistics import LinearStatistics

OUTLIER_FACTOR = 5.0
"""A score is an outlier above this many times its block's mean (``M`` of OWL, arXiv 2310.05175)."""
ERROR_REACH = 3.0
"""Under ``"error"`` a block's sparsity may lie this many times ``allocation_range`` from the target: the rule has a
curve to follow, where OWL has one number, so the bound is only there for blocks whose curve cannot be trusted."""
CURVE_POINTS = 61

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class BlockMeasure:
    """What allocation reads about one dense block."""

    outlier_share: float
    """Of all scores in the block, those above ``OUTLIER_FACTOR`` times their mean."""
    errors: np.ndarray | None
    """``[CURVE_POINTS]`` float64, for ``"error"``: the block's error at each sparsity of :func:`sparsity_grid`."""


def sparsity_grid(config: PruneConfig) -> np.ndarray:
    """``[CURVE_POINTS]`` float64: the sparsities that ``"error"`` chooses from, both ends included."""
    reach = ERROR_REACH * config.allocation_range
    return np.linspace(max(0.0, config.sparsity - reach), min(1.0, config.sparsity + reach), CURVE_POINTS)


def measure_block(
    linears: dict[str, nn.Linear], stats: dict[str, LinearStatistics], config: PruneConfig
) -> BlockMeasure:
    """Measures a dense block: ``stats`` of the kinds ``config.needs.measure``, by the names of ``linears``.

    Raises:
        ValueError: a weight, a factor or a score is not finite.
    """
    scores = {}
    for child, linear in linears.items():
        scored = scored_weight(linear.weight, stats[child], config)
        scores[child] = ops.score(scored.weight, scored.formula, scored.column, scored.moment)
    size = max(1, sum(score.numel() for score in scores.values()))
    mean = sum(float(score.double().sum()) for score in scores.values()) / size
    outliers = sum(int((score > OUTLIER_FACTOR * mean).sum()) for score in scores.values())
    errors = None
    if config.allocation == "error":
        errors = sum(
            _error_curve(linear.weight, scores[child], stats[child], config) for child, linear in linears.items()
        )
    return BlockMeasure(outliers / size, errors)


def _error_curve(weight: Tensor, score: Tensor, stats: LinearStatistics, config: PruneConfig) -> np.ndarray:
    """``[CURVE_POINTS]`` float64: the mean over tokens of ``‖A'_t - A_t‖² / ‖A_t‖²`` when the lowest scores are pruned.

    Of the error ``Σ_i e_i G e_iᵀ`` with ``G = Σ_t r_t X_t X_tᵀ`` only the diagonal counts, ``Σ_j e_ij² Σ_t r_t X_tj²``:
    sums over sorted weights then give the error at every sparsity at once.
    """
    error = weight.detach().double().square() * stats.weighted_square_sum / max(1, stats.tokens)
    groups = len(weight) if config.group == "row" else 1
    order = score.reshape(groups, -1).argsort(dim=1)
    removed = error.reshape(groups, -1).gather(1, order).sum(0).cumsum(0).cpu().numpy()
    size = len(removed)
    return np.interp(sparsity_grid(config) * size, np.arange(size + 1), np.concatenate([[0.0], removed]))


def allocate(measures: list[BlockMeasure], config: PruneConfig, shapes: list[Shapes]) -> list[dict[str, int]]:
    """How many weights of each row to keep, for each block and each of its matrices.

    All matrices of a block get the block's sparsity, up to rounding. The total over the model is exactly what
    ``group="row"`` keeps at uniform sparsity, and so is, for each number of rows, the total over the matrices that have
    as many rows: among them one more a row here is one less there. A matrix with a number of rows of its own thus stays
    as it is.

    Args:
        measures: of each block; not read for ``"uniform"``.
        shapes: rows and columns of each block's matrices, by name.
    """
    if config.allocation == "uniform":
        return [{child: keep_count(cols, config.sparsity) for child, (_, cols) in block.items()} for block in shapes]
    sizes = np.array([sum(rows * cols for rows, cols in block.values()) for block in shapes], dtype=np.float64)
    if config.allocation == "owl":
        sparsities = _owl(np.array([measure.outlier_share for measure in measures]), sizes, config)
    else:
        sparsities = _equal_marginal_error(np.array([measure.errors for measure in measures]), sizes, config)
    return _whole_numbers(sparsities, config, shapes)


def _owl(outliers: np.ndarray, sizes: np.ndarray, config: PruneConfig) -> np.ndarray:
    """``[blocks]``: the more outliers the lower the sparsity, linearly over a width of twice ``allocation_range``,
    shifted so that the mean over weights is the target."""
    spread = outliers.max() - outliers.min()
    scaled = (outliers - outliers.min()) / spread if spread > 0 else np.zeros_like(outliers)
    offset = -2 * config.allocation_range * scaled
    return np.clip(config.sparsity + offset - np.average(offset, weights=sizes), 0.0, 1.0)


def _equal_marginal_error(errors: np.ndarray, sizes: np.ndarray, config: PruneConfig) -> np.ndarray:
    """``[blocks]``: minimises the sum of the blocks' errors for the total of the target (water-filling).

    At the minimum one more pruned weight costs the same in every block that is not at the end of its range. That level
    is found by bisection; the curves ``errors [blocks, CURVE_POINTS]`` are taken as convex (their slopes as rising).
    """
    grid = sparsity_grid(config)
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


def _at_level(level: float, slopes: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return np.array([np.interp(level, slope, grid) for slope in slopes])


def _whole_numbers(sparsities: np.ndarray, config: PruneConfig, shapes: list[Shapes]) -> list[dict[str, int]]:
    """Rounds within each set of matrices of as many rows, so that the set keeps what it would at uniform sparsity."""
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


def _shifted(shares: np.ndarray, cols: np.ndarray, total: int) -> np.ndarray:
    """Real numbers kept of a row, summing to ``total``: all shares moved by the same amount, within 0 and 1."""
    low, high = -1.0, 1.0
    for _ in range(60):
        shift = (low + high) / 2
        if np.clip(shares + shift, 0, 1) @ cols < total:
            low = shift
        else:
            high = shift
    return np.clip(shares + high, 0, 1) * cols


def _largest_remainder(wanted: np.ndarray, total: int) -> list[int]:
    """Whole numbers that sum to ``total``: rounded down, then one more for the largest rests, the earlier first."""
    down = np.floor(wanted + 1e-6)  # what bisection left just below a whole number
    keep = down.astype(int)
    for place in np.argsort(down - wanted, kind="stable")[: total - keep.sum()]:
        keep[place] += 1
    return keep.tolist()
