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
from ace_ext.pruning.gram import AdmmFactor, masked, restore_dead_
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.sketch import direction_count
from ace_ext.pruning.stages._stage import (
    AUTO,
    COSINE,
    PLAIN,
    SHARED,
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
    gram: str = gram_option(AUTO, PLAIN, SHARED, COSINE, SKETCHED)

    def solve(self, problem: Problem) -> Solved:
        """The pruned weight after ``iterations``, on columns normalised by ``sqrt(G_jj + floor)``."""
        factor = problem.gram.admm_factor(
            self.damping, self.floor, self.relaxation, _dtype_of_products(problem), self._reads_diagonal(problem)
        )
        rows, height = len(problem.dense), _part_rows(*problem.dense.shape)
        if height == rows:
            return Solved(iterate(problem, factor, self), factor.damping, factor.attempts)
        weight = torch.empty_like(problem.dense)
        for start in range(0, rows, height):
            part = slice(start, start + height)
            weight[part] = iterate(problem.of_rows(part), factor, self)
        return Solved(weight, factor.damping, factor.attempts)

    def _reads_diagonal(self, problem: Problem) -> bool:
        return problem.mask is None and self.saliency == "obs"

    def working_bytes(self, rows: int, cols: int) -> int:
        """The larger of two phases. With a Gram matrix: two copies of it while it is inverted; then one, and what the
        iterations use. With a sketch: five copies of it in float64; then three factors in float32, what the iterations
        use, and a product with the directions."""
        weights = max(_iterating_bytes(rows, cols), ROUNDED_BYTES * rows * cols)
        if self.gram != SKETCHED:
            return max(8 * cols * cols + 64 * cols, self.shared_bytes(cols) + weights)
        directions = direction_count(cols)
        product = 4 * _part_rows(rows, cols) * directions
        return max(40 * cols * directions, 12 * cols * directions + weights + product)

    def shared_bytes(self, cols: int) -> int:
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


def iterate(problem: Problem, factor: AdmmFactor, stage: Admm) -> Tensor:
    """The alternating direction method of multipliers. Returns the last ``Z [rows, cols]``.

    Columns are multiplied by ``norm``, and ``H`` is the normalised Gram matrix. ``Z`` is the masked ``W + U``; then
    ``U ← U + W - Z``, ``W ← (H W₀ + ρ (Z - U)) (H + ρ)⁻¹`` and, with the relaxation ``a``, ``W ← a W + (1 - a) Z``
    (Boyd et al. 2011, section 3.4.3). If no mask is given, its sparsity follows a cubic curve in the first half of the
    iterations.

    The function uses no more than three buffers of the weight's size, and a mask.
    """
    dense, norm = problem.dense, factor.norm
    weight = dense * norm  # W + U from now on: U is zero
    change = torch.empty_like(weight, dtype=factor.dtype)
    change_, update_ = (ops.admm_change_, ops.admm_update_) if weight.is_cpu else (torch_change_, torch_update_)
    tightening = max(1, stage.iterations // 2) if problem.mask is None else 0
    mask = _most_salient(weight, 1 / tightening, factor, problem, stage) if problem.mask is None else problem.mask
    for step in range(stage.iterations):
        if 0 < step < tightening:
            mask = _most_salient(weight, (step + 1) / tightening, factor, problem, stage)
        change_(change, weight, mask, dense, norm)
        update_(weight, factor.times(change), mask, dense, norm, 2 - stage.relaxation)
    masked(weight, mask, out=weight).add_(0.0).div_(norm)  # -0.0 + 0.0 is +0.0
    restore_dead_(weight, dense, mask, factor.dead)
    return weight


def torch_change_(change: Tensor, weight: Tensor, mask: Tensor, dense: Tensor, norm: Tensor) -> None:
    """As :func:`ace_ext.ops.admm_change_`, on any device: ``Z - U - W₀`` on normalised columns."""
    found = weight.masked_fill(mask, 0.0).mul_(-2).add_(weight)  # exactly -w where it is dropped
    change.copy_(found.addcmul_(dense, norm, value=-1))


def torch_update_(
    weight: Tensor, product: Tensor, mask: Tensor, dense: Tensor, norm: Tensor, dual_scale: float
) -> None:
    """As :func:`ace_ext.ops.admm_update_`, on any device: the next ``W + U``."""
    weight.masked_fill_(mask, 0.0).mul_(dual_scale).addcmul_(dense, norm).add_(product)


def _most_salient(weight: Tensor, progress: float, factor: AdmmFactor, problem: Problem, stage: Admm) -> Tensor:
    """ADMM's mask at ``progress`` (1 at its end) of the tightening: ``[rows, cols]`` bool, True where ``weight`` is
    kept. At the end it keeps exactly ``problem.keep`` weights of each group, also if fewer of them are not zero."""
    formula, column = _saliency(factor, stage)
    if problem.pattern is not None:
        return ops.nm_mask(weight, formula, problem.pattern.keep_n, problem.pattern.group_m, column=column)
    cols = weight.shape[1]
    pruned = int((cols - problem.keep) * (1 - (1 - progress) ** 3))
    return ops.topk_mask(weight, formula, cols - pruned, column=column)


def _saliency(factor: AdmmFactor, stage: Admm) -> tuple[str, Tensor | None]:
    """The op's formula for the saliency, and its column factor.

    Saliency ``"obs"`` is ``|w_j| / sqrt((H⁻¹)_jj)``, the root of the error that remains after the best update of the
    other weights. ``"magnitude"`` is ``|w_j|``; on normalised columns this is the root of the error without an update.
    """
    if stage.saliency == "magnitude":
        return "magnitude", None
    assert factor.inverse_diagonal is not None
    return "scaled", factor.inverse_diagonal.rsqrt()


def _iterating_bytes(rows: int, cols: int) -> int:
    """Three float32 buffers and a mask for one part; with several parts also the new weight, a byte for each entry of
    all, and vectors."""
    part = _part_rows(rows, cols) * cols
    return 13 * part if part == rows * cols else 5 * rows * cols + 13 * part + 64 * cols


STAGE = Admm
