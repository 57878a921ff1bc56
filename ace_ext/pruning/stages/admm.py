"""ADMM pruning (arXiv 2401.02938): weights and mask together, with matrix products only.

The Gram matrix ``G [cols, cols]`` of the inputs measures errors (:mod:`ace_ext.pruning.gram`): the change ``e`` of a
row costs ``e G eᵀ``. Everything is computed in float32, except
products in bfloat16 where :func:`_dtype_of_products` says so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.models.products import slow_dtypes
from ace_ext.pruning.damping import ADMM_DAMPING, ADMM_FLOOR
from ace_ext.pruning.gram import AdmmFactor, dtype_for, masked, restore_dead_
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.sketch import SketchFactor, direction_count
from ace_ext.pruning.stages._stage import (
    AUTO,
    COSINE,
    PLAIN,
    SKETCHED,
    Problem,
    Solve,
    Solved,
    damping_option,
    gram_option,
)

PART_ENTRIES = 2**24
"""A larger matrix is solved in parts of about this many entries, in whole rows. This limits the peak memory of the
buffers."""

ROUNDED_BYTES = 11
"""Bytes of an entry after the iterations: the new weight, its rounded copy and the check that it is finite."""


@dataclass(frozen=True)
class Admm(Solve):
    """Weights and mask together by ADMM (arXiv 2401.02938)."""

    name = "admm"
    summary = "weights and mask together by ADMM (arXiv 2401.02938)"
    groups = ("row",)
    mask_options = ("saliency",)

    damping: float = damping_option(ADMM_DAMPING)
    floor: float = option(
        ADMM_FLOOR,
        "share of a typical column's energy (the geometric mean) that is added to the energy of each column: a column "
        "with small inputs in the calibration text may have large inputs in other text",
        Limits(at_least=0, words="a share of the geometric mean, 0 or more"),
    )
    iterations: int = option(
        16, "iterations; the mask becomes sparser in the first half and is fixed in the second", Limits(at_least=1)
    )
    relaxation: float = option(
        1.6,
        "over-relaxation: by how much each iteration exaggerates its change (1: as it is); fewer iterations are needed",
        Limits(above=0, below=2, words="more than 0 and less than 2"),
    )
    saliency: str = option(
        "obs",
        "what chooses the mask: magnitude (of weights on normalised columns) or obs (the error that remains after the "
        "best update of the other weights)",
        Limits(choices=("magnitude", "obs")),
    )
    gram: str = gram_option(AUTO, PLAIN, COSINE, SKETCHED)

    def solve(self, problem: Problem) -> Solved:
        """The pruned weight after ``iterations``, on columns normalised by ``sqrt(G_jj + floor)``."""
        factor = problem.gram.admm_factor(self.damping, self.floor, self.relaxation)
        factor = factor.multiplying_in(_dtype_of_products(problem))
        rows, height = len(problem.dense), _part_rows(*problem.dense.shape)
        if height == rows:
            return Solved(iterate(problem, factor, self), factor.damping, factor.attempts)
        weight = torch.empty_like(problem.dense)
        for start in range(0, rows, height):
            part = slice(start, start + height)
            weight[part] = iterate(problem.of_rows(part), factor, self)
        return Solved(weight, factor.damping, factor.attempts)

    def working_bytes(self, rows: int, cols: int) -> int:
        """The larger of two phases. With a Gram matrix: two copies of it while it is inverted, in float64 if the
        damping is small; then one in float32, its copy in bfloat16, and what the iterations use. With a sketch: five
        copies of it in float64; then three factors in float32, what the iterations use, and a product with the
        directions."""
        if self.gram != SKETCHED:
            inverting = 2 * cols * cols * dtype_for(self.damping, cols).itemsize + 64 * cols
            rounding = self.held_bytes(cols) + ROUNDED_BYTES * rows * cols
            return max(inverting, 6 * cols * cols + _iterating_bytes(rows, cols), rounding)
        directions = direction_count(cols)
        product = 4 * _part_rows(rows, cols) * directions
        weights = max(_iterating_bytes(rows, cols), ROUNDED_BYTES * rows * cols)
        return max(40 * cols * directions, 12 * cols * directions + weights + product)

    def held_bytes(self, cols: int) -> int:
        """The matrix of an iteration, or the factors of the sketch."""
        return 4 * cols * cols if self.gram != SKETCHED else 12 * cols * direction_count(cols)


def _dtype_of_products(problem: Problem) -> torch.dtype:
    """bfloat16 if the result is rounded to 16 bits in any case, and the CPU has instructions for it. GPUs multiply in
    float32: bfloat16 was not tried there."""
    half = problem.units.dtype.itemsize == 2 and problem.dense.is_cpu
    return torch.bfloat16 if half and torch.bfloat16 not in slow_dtypes() else torch.float32


def _part_rows(rows: int, cols: int) -> int:
    """How many rows are solved at a time."""
    return -(-rows // max(1, -(-rows * cols // PART_ENTRIES)))


def iterate(problem: Problem, factor: AdmmFactor | SketchFactor, stage: Admm) -> Tensor:
    """The alternating direction method of multipliers. Returns the last ``Z [rows, cols]``.

    Columns are multiplied by ``norm``, and ``H`` is the normalised Gram matrix. ``Z`` is the masked ``W + U``; then
    ``U ← U + W - Z``, ``W ← (H W₀ + ρ (Z - U)) (H + ρ)⁻¹`` and, with the relaxation ``a``, ``W ← a W + (1 - a) Z``
    (Boyd et al. 2011, section 3.4.3). If no mask is given, its sparsity follows a cubic curve in the first half of the
    iterations.

    The function uses no more than four buffers of the weight's size.
    """
    weight = problem.dense * factor.norm  # W + U from now on: U is zero
    start, dual, kept = factor.start(weight), torch.empty_like(weight), torch.empty_like(weight)
    mask = problem.mask
    tightening = max(1, stage.iterations // 2)
    for step in range(stage.iterations):
        if mask is None and step + 1 == tightening:
            mask = _most_salient(weight, factor, problem, stage)
        if mask is not None:
            masked(weight, mask, out=kept)
        else:
            kept.copy_(weight)
            _keep_most_salient_(kept, (step + 1) / tightening, factor, problem, stage)
        torch.sub(weight, kept, out=dual)
        factor.step_(problem.dense, kept, dual, start, out=weight)
    assert mask is not None  # given, or chosen when the tightening ended
    masked(weight, mask, out=weight).add_(0.0).div_(factor.norm)  # -0.0 + 0.0 is +0.0
    restore_dead_(weight, problem.dense, mask, factor.dead)
    return weight


def _keep_most_salient_(
    weight: Tensor, progress: float, factor: AdmmFactor | SketchFactor, problem: Problem, stage: Admm
) -> None:
    """Zeroes the entries of ``weight [rows, cols]`` that ADMM's mask drops at ``progress`` (below 1) of the
    tightening."""
    formula, column = _saliency(factor, stage)
    if problem.pattern is not None:
        ops.prune_nm_(weight, formula, problem.pattern.keep_n, problem.pattern.group_m, column=column)
        return
    cols = weight.shape[1]
    pruned = cols - problem.keep
    ops.prune_topk_(weight, formula, cols - int(pruned * (1 - (1 - progress) ** 3)), column=column)


def _most_salient(weight: Tensor, factor: AdmmFactor | SketchFactor, problem: Problem, stage: Admm) -> Tensor:
    """The mask at the end of the tightening: ``[rows, cols]`` bool, True for exactly ``problem.keep`` weights of each
    group, also if fewer of them are not zero."""
    formula, column = _saliency(factor, stage)
    if problem.pattern is not None:
        return ops.nm_mask(weight, formula, problem.pattern.keep_n, problem.pattern.group_m, column=column)
    return ops.topk_mask(weight, formula, problem.keep, column=column)


def _saliency(factor: AdmmFactor | SketchFactor, stage: Admm) -> tuple[str, Tensor | None]:
    """The op's formula for the saliency, and its column factor.

    Saliency ``"obs"`` is ``|w_j| / sqrt((H⁻¹)_jj)``, the root of the error that remains after the best update of the
    other weights. ``"magnitude"`` is ``|w_j|``; on normalised columns this is the root of the error without an update.
    """
    if stage.saliency == "obs":
        return "scaled", factor.inverse_diagonal.rsqrt()
    return "magnitude", None


def _iterating_bytes(rows: int, cols: int) -> int:
    """Four buffers and a mask for one part; with several parts also the new weight, a byte for each entry of all, and
    vectors."""
    part = _part_rows(rows, cols) * cols
    return 18 * part if part == rows * cols else 5 * rows * cols + 18 * part + 64 * cols


STAGE = Admm
