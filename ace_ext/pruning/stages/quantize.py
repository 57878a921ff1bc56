"""Quantization of kept weights by GPTQ's update (arXiv 2210.17323) with the mask fixed.

Columns are rounded to the grid from left to right, and later columns compensate for each rounding error. Zeros stay
zeros. The Gram matrix ``G [cols, cols]`` of the inputs measures errors (:mod:`ace_ext.pruning.gram`): the change ``e``
of a row costs ``e G eᵀ``. Everything is computed in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.errors import InputError
from ace_ext.grids import GROUP_STEP, WIDTHS, Grid
from ace_ext.pruning.gram import ObsFactor
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import COSINE, PLAIN, MatrixStage, Problem, damping_option, gram_option

BLOCK = 128
"""Columns that the update processes at a time, as in GPTQ."""

PART_ENTRIES = 2**24
"""A larger matrix is rounded in parts of about this many entries, in whole rows. This limits the peak memory of the
buffers."""

DAMP = 0.01
REFIT = True
SHARES = torch.linspace(1.0, 0.4, 31)
"""The largest weights of a group that the tried scales represent, as shares of the group's largest magnitude."""


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid, and how the Gram matrix was factorised."""

    codes: Tensor  # [rows, cols] int8
    scales: Tensor  # [rows, groups] float32, in the units of Problem.dense; the weight's dtype holds them exactly
    damping: float
    attempts: int


@dataclass(frozen=True)
class Quantize(MatrixStage):
    """Rounds kept weights to a grid with a scale for each row and group of columns."""

    name = "quantize"
    summary = "rounds kept weights to codes of a few bits with a scale for each row and group of columns; other kept "
    summary += "weights compensate (GPTQ, arXiv 2210.17323)"
    groups = ("row", "matrix")

    bits: int = option(4, "bits of a code", Limits(choices=WIDTHS))
    group: int = option(
        128, "columns that share a scale in a row", Limits(at_least=GROUP_STEP, multiple_of=GROUP_STEP, below=2**31)
    )
    damping: float = damping_option(0.01)
    gram: str = gram_option(PLAIN, COSINE)
    sweeps: int = option(2, "sweeps of coordinate descent on codes and scales after GPTQ", Limits(at_least=0))

    @property
    def grid(self) -> Grid:
        """The grid of every matrix."""
        return Grid(self.bits, self.group)

    def quantize(self, problem: Problem, weight: Tensor) -> Rounded:
        """Codes and scales of ``weight [rows, cols]`` float32, the result of the stages before. Zeros keep code 0."""
        factor = problem.whole_gram.obs_factor(self.damping)
        rows, cols = weight.shape
        codes = torch.empty(rows, cols, dtype=torch.int8, device=weight.device)
        scales = torch.empty(rows, self.grid.groups(cols), dtype=torch.float32, device=weight.device)
        height = max(1, PART_ENTRIES // max(1, cols))
        for start in range(0, rows, height):
            part = slice(start, start + height)
            _round_rows(problem, factor, weight[part], self, codes[part], scales[part])
        return Rounded(codes, scales, factor.damping, factor.attempts)

    def round_plainly(self, weight: Tensor) -> Tensor:
        """``weight [rows, cols]`` of any dtype with each entry rounded to the nearest point of the grid: for a matrix
        without statistics."""
        problem = Problem.without_statistics(weight)
        grid, cols = self.grid, weight.shape[1]
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(len(weight), grid.groups(cols), dtype=torch.float32, device=weight.device)
        for at, start in enumerate(range(0, cols, grid.group)):
            part = problem.dense[:, start : start + grid.group]
            scales[:, at] = best_scales(part, torch.ones_like(part[0]), grid, problem)
            codes[:, start : start + grid.group] = nearest_codes(part, scales[:, at, None], grid)
        return grid.dequantize(codes, problem.in_dtype(scales))

    def working_bytes(self, rows: int, cols: int) -> int:
        """The larger of two phases. While the Gram matrix is factorised: two copies of it in float64. Then: the factor
        in float32. In both the weight of the stage before; then also codes and scales, the buffers of one part, and the
        final weight."""
        part = min(rows, max(1, PART_ENTRIES // max(1, cols))) * cols
        made = 4 * rows * cols + 5 * rows * cols // 4 + 4 * rows
        return max(17 * cols * cols + 4 * rows * cols, 4 * cols * cols + made + max(14 * part, 10 * rows * cols))

    def held_bytes(self, cols: int) -> int:
        """The factor."""
        return 4 * cols * cols


def _round_rows(
    problem: Problem, factor: ObsFactor, weight: Tensor, stage: Quantize, codes: Tensor, scales: Tensor
) -> None:
    """Writes ``codes [rows, cols]`` and ``scales [rows, groups]`` of some rows: GPTQ, then sweeps of coordinate
    descent."""
    grid, mask, values = stage.grid, weight != 0, weight.clone()
    importance = factor.upper.diagonal().square().reciprocal()
    for at, group in enumerate(_slices(0, weight.shape[1], grid.group)):
        kept = values[:, group].masked_fill(~mask[:, group], 0.0)
        scales[:, at] = best_scales(kept, importance[group], grid, problem)
        for inner in _slices(group.start, group.stop, BLOCK):
            block, error = values[:, inner], torch.empty_like(values[:, inner])
            ops.quantize_block_(
                block, error, mask[:, inner], scales[:, at].to(problem.dtype), factor.upper[inner, inner], grid.bits
            )
            values[:, inner.stop :].addmm_(error, factor.upper[inner, inner.stop :], alpha=-1)
    if stage.sweeps:
        descent = _Descent(problem, weight, values, mask, scales, stage)
        for _ in range(stage.sweeps):
            descent.sweep_()
    if not torch.isfinite(values).all():
        raise InputError(f"quantize overflowed with damping {factor.damping:g}; raise damping")
    for at, group in enumerate(_slices(0, weight.shape[1], grid.group)):
        codes[:, group] = nearest_codes(values[:, group], scales[:, at, None], grid)


class _Descent:
    """Coordinate descent on codes and scales (QuantEase, arXiv 2309.01885): each kept code moves to its best value
    given all others, and each scale to its least-squares value given the codes. No step raises
    ``(values - target) H (values - target)ᵀ``, where ``H`` is the damped Gram matrix.
    """

    def __init__(
        self, problem: Problem, target: Tensor, values: Tensor, mask: Tensor, scales: Tensor, stage: Quantize
    ) -> None:
        self.problem, self.values, self.mask, self.scales, self.grid = problem, values, mask, scales, stage.grid
        gram = problem.whole_gram.matrix
        diagonal = gram.diagonal()
        dead = diagonal == 0
        self.added = torch.where(dead, 1.0, DAMP * diagonal.mean())
        self.gram, self.diagonal = gram, diagonal + self.added
        change = values - target
        self.slope = torch.addcmul(change @ gram, change, self.added)  # half of the gradient

    def sweep_(self) -> None:
        for at, group in enumerate(_slices(0, self.values.shape[1], self.grid.group)):
            if REFIT:
                self._fit_scales_(at, group)
            scale = self.scales[:, at].to(self.problem.dtype)
            for inner in _slices(group.start, group.stop, BLOCK):
                current = self.values[:, inner].clone()
                diagonal = self.diagonal[inner]
                wanted = current - self.slope[:, inner] / diagonal
                factor = self.gram[inner, inner] / diagonal
                factor.diagonal().fill_(1.0)
                change = torch.empty_like(current)
                ops.quantize_block_(wanted, change, self.mask[:, inner], scale, factor, self.grid.bits, current)
                self._move_(inner, wanted, change)

    def _move_(self, columns: slice, values: Tensor, change: Tensor) -> None:
        self.values[:, columns] = values
        self.slope.addmm_(change, self.gram[columns])
        self.slope[:, columns].addcmul_(change, self.added[columns])

    def _fit_scales_(self, at: int, group: slice) -> None:
        scale = self.scales[:, at, None]
        codes = nearest_codes(self.values[:, group], scale, self.grid)
        slope = self.slope[:, group]
        inner = self.gram[group, group]
        curve = ((codes @ inner).mul_(codes) + codes.square() * self.added[group]).sum(1, keepdim=True)
        moved = scale - (slope * codes).sum(1, keepdim=True) / curve.clamp_min(1e-30)
        moved = self.problem.rounded(moved)
        values = self.problem.rounded(codes * moved)
        change = values - self.values[:, group]
        gain = (2 * slope * change + (change @ inner) * change + change.square() * self.added[group]).sum(1, keepdim=True)
        better = (gain < 0) & (moved > 0)
        change = change.masked_fill_(~better, 0.0)
        self.scales[:, at] = torch.where(better, moved, scale)[:, 0]
        self._move_(group, torch.where(better, values, self.values[:, group]), change)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """``[start, stop)`` in slices of ``step``; the last may be narrower."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def best_scales(weight: Tensor, importance: Tensor, grid: Grid, problem: Problem) -> Tensor:
    """``[rows]`` float32: the scale of each row, among those of :data:`SHARES`, for which rounding to the nearest code
    costs least.

    Args:
        weight: ``[rows, width]`` float32, the columns of one group; 0 where a weight is pruned.
        importance: ``[width]`` float32; the squared error of a column is multiplied by it.
        grid: the grid.
        problem: its dtype rounds scales and values.

    Returns:
        0 for a row of zeros.
    """
    most = weight.abs().amax(dim=1)
    smallest = torch.finfo(problem.dtype).smallest_normal * torch.finfo(problem.dtype).eps * 2.0**-problem.power
    best, least = torch.zeros_like(most), torch.full_like(most, torch.inf)
    for share in SHARES.tolist():
        scale = problem.rounded((most * (share / grid.highest)).clamp_min_(smallest))[:, None]
        values = problem.rounded(nearest_codes(weight, scale, grid) * scale)
        loss = values.sub_(weight).square_() @ importance
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, scale[:, 0], best)
    return best


def nearest_codes(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The codes, as float32, of the grid's points nearest to a weight; 0 where ``scale`` is 0."""
    codes = torch.where(scale > 0, weight / scale, 0.0)
    return codes.round_().clamp_(grid.lowest, grid.highest)


STAGE = Quantize
