"""Quantization of kept weights with the mask fixed: GPTQ's update (arXiv 2210.17323), then coordinate descent.

GPTQ rounds columns to the grid from left to right, and later columns compensate for each rounding error. Coordinate
descent (QuantEase, arXiv 2309.01885) then moves each code to its best value given all others, and each scale to its
least-squares value given the codes. Zeros stay zeros. The Gram matrix ``G [cols, cols]`` of the inputs measures errors
(:mod:`ace_ext.pruning.gram`): the change ``e`` of a row costs ``e G eᵀ``. Everything is computed in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.grids import GROUP_STEP, WIDTHS, Grid
from ace_ext.pruning.gram import ObsFactor
from ace_ext.pruning.kinds import ROUNDING_GRAM
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import (
    AUTO,
    COSINE,
    GRAM_KINDS,
    PLAIN,
    SHARED,
    Problem,
    Round,
    Rounded,
    damping_option,
    gram_option,
    overflow,
)

BLOCK = 128
"""Columns that an update processes at a time, as in GPTQ."""

PART_ENTRIES = 2**24
"""A larger matrix is rounded in parts of about this many entries, in whole rows. This limits the peak memory of the
buffers."""

SHARES = tuple(1.0 - 0.04 * step for step in range(16))
"""The scales that are tried for a group: each represents this share of the group's largest magnitude. With 8 bits it is
the first alone. In the first three blocks of three models another one is better for 0 to 1 % of the groups. It would
lower the error by 0 to 5 %, which perplexity does not show."""

NEARLY_EXACT = 8
"""Bits of codes that cost next to nothing however they are chosen."""


@dataclass(frozen=True)
class Quantize(Round):
    """Rounds kept weights to a grid with a scale for each row and group of columns."""

    name = "quantize"
    summary = "rounds kept weights to a grid of few bits, a scale for each row and group of columns (arXiv 2210.17323)"
    groups = ("row", "matrix")

    bits: int = option(4, "bits of a code: 8, 4 or 3", Limits(choices=WIDTHS))
    group: int = option(
        128,
        "columns that share a scale in a row, a multiple of 64",
        Limits(at_least=GROUP_STEP, multiple_of=GROUP_STEP, below=2**31),
    )
    embeddings: int = option(
        0,
        "8: the token embedding and the LM head are rounded to the nearest point of a grid of 8 bits too; 0: they "
        "are left as they are",
        Limits(choices=(0, 8)),
    )
    damping: float = damping_option(0.2)
    sweeps: int | None = option(
        None,
        "sweeps of coordinate descent over codes and scales after GPTQ (default: 2; 0 with 8 bits, which gain nothing "
        "by them)",
        Limits(at_least=0),
    )
    gram: str = gram_option(AUTO, PLAIN, SHARED, COSINE, auto="shared with 8 bits, cosine with fewer")

    @property
    def gram_read(self) -> str:
        """For ``auto``: with 8 bits the one that masks are best with, with fewer the one that rounding is best with."""
        if self.gram != AUTO:
            return self.gram
        return SHARED if self.bits == NEARLY_EXACT else COSINE

    @property
    def needs(self) -> frozenset[str]:
        """If no other stage reads a Gram matrix, that of ``gram=cosine`` counts the first token of a sample more often.
        Masks do not gain by that."""
        return frozenset({ROUNDING_GRAM if self.gram_read == COSINE else GRAM_KINDS[self.gram_read]})

    @property
    def descents(self) -> int:
        """The sweeps of coordinate descent."""
        if self.sweeps is not None:
            return self.sweeps
        return 0 if self.bits == NEARLY_EXACT else 2

    def quantize(self, problem: Problem, weight: Tensor) -> Rounded:
        """Rounds ``weight [rows, cols]`` float32, the result of the stages before. Its zeros stay zeros.

        Raises:
            InputError: the update overflowed.
        """
        factor = problem.whole_gram.obs_factor(self.damping)
        rounded = torch.empty(weight.shape, dtype=problem.units.dtype, device=weight.device)
        height = _part_rows(weight.shape[1])
        for start in range(0, len(weight), height):
            part = slice(start, start + height)
            _Rows(problem, factor, weight[part], self).round_into(rounded[part])
        return Rounded(rounded, factor.damping, factor.attempts)

    def round_plainly(self, weight: Tensor) -> Tensor:
        """``weight [rows, cols]`` of any dtype with each entry rounded to the nearest point of a grid whose scales are
        searched: for a matrix without statistics."""
        problem = Problem.without_statistics(weight)
        scales = torch.empty(len(weight), self.grid.groups(weight.shape[1]), device=weight.device)
        for at, group in enumerate(_slices(0, weight.shape[1], self.group)):
            part = problem.dense[:, group]
            scales[:, at] = best_scales(part, torch.ones_like(part[0]), self.grid, problem)
        rounded = torch.empty_like(weight)
        _round_to_grid(problem.dense, scales, self.grid, problem, out=rounded)
        return rounded

    def working_bytes(self, rows: int, cols: int) -> int:
        """The larger of two phases. While the Gram matrix is factorised: two copies of it in float64. Then: the factor
        in float32, the final weight, the buffers of one part and, while a group is rounded, those of its columns."""
        height, group = min(rows, _part_rows(cols)), min(self.group, cols)
        part = max(13 * cols, 9 * cols + 32 * group) if self.descents else 5 * cols + 21 * group
        return max(17 * cols * cols, 4 * cols * cols + 4 * rows * cols + height * part)

    def shared_bytes(self, cols: int) -> int:
        """The factor."""
        return 4 * cols * cols


class _Rows:
    """Some rows of a matrix while they are rounded.

    Args:
        problem: the matrix.
        factor: of its Gram matrix.
        target: ``[rows, cols]`` float32: the weights to round.
        stage: the options.
    """

    def __init__(self, problem: Problem, factor: ObsFactor, target: Tensor, stage: Quantize) -> None:
        self.problem, self.factor, self.target, self.stage, self.grid = problem, factor, target, stage, stage.grid
        self.values, self.mask = target.clone(), target != 0
        self.scales = target.new_zeros(len(target), self.grid.groups(target.shape[1]))

    def round_into(self, out: Tensor) -> None:
        """Writes ``out [rows, cols]`` in the weight's dtype."""
        self._compensate_()
        if self.stage.descents:
            self._descend_()
        finite = torch.isfinite(self.values.sum())  # a code cannot be NaN, so the result would not show it
        finite &= _round_to_grid(self.values, self.scales, self.grid, self.problem, out)
        if not finite:
            raise overflow(self.stage.label, self.factor.damping, out.dtype)

    def _groups(self) -> Iterator[tuple[int, slice]]:
        return enumerate(_slices(0, self.target.shape[1], self.grid.group))

    def _compensate_(self) -> None:
        """GPTQ. The scales of a group are searched when its first column is reached."""
        upper = self.factor.upper
        importance = upper.diagonal().square().reciprocal()  # of a column's squared error, after the best compensation
        for at, group in self._groups():
            kept = self.values[:, group].masked_fill(~self.mask[:, group], 0.0)
            self.scales[:, at] = best_scales(kept, importance[group], self.grid, self.problem)
            for columns in _slices(group.start, group.stop, BLOCK):
                error = self._round_block_(at, columns, self.values[:, columns], upper[columns, columns])
                self.values[:, columns.stop :].addmm_(error, upper[columns, columns.stop :], alpha=-1)

    def _descend_(self) -> None:
        """Coordinate descent. Each sweep goes group by group: first the scales, then the codes. Meanwhile ``slope`` is
        that of the group alone; the other groups learn of all its changes at once."""
        descent = _Descent(self.problem, self.factor, self.values - self.target)
        for at, group in (each for _ in range(self.stage.descents) for each in self._groups()):
            before, slope = self.values[:, group].clone(), descent.slope[:, group].clone()
            self._fit_scales_(at, group, descent, slope)
            for columns in _slices(group.start, group.stop, BLOCK):
                current, factor = self.values[:, columns].clone(), descent.step_factor(columns)
                wanted = self.values[:, columns]
                wanted -= slope[:, _within(group, columns)] / descent.curvature[columns]
                change = self._round_block_(at, columns, wanted, factor, current)
                if columns.stop < group.stop:
                    descent.add_(slope, group, columns, change)
            descent.move_(group, self.values[:, group] - before)

    def _round_block_(
        self, at: int, columns: slice, block: Tensor, factor: Tensor, current: Tensor | None = None
    ) -> Tensor:
        """Rounds ``block [rows, width]`` of group ``at`` in place; returns the errors as ``ops.quantize_block_``."""
        error = torch.empty_like(block)
        scale = self.scales[:, at].to(self.problem.units.dtype).contiguous()
        sign = torch.where(scale < 0, -1.0, 1.0)[:, None]  # the op takes no negative scale: such a row is negated
        current = None if current is None else current.mul_(sign)
        block.mul_(sign)
        ops.quantize_block_(block, error, self.mask[:, columns], scale.abs(), factor, self.grid.bits, current)
        block.mul_(sign)
        return error.mul_(sign)

    def _fit_scales_(self, at: int, group: slice, descent: "_Descent", slope: Tensor) -> None:
        """Moves the scales of a group to their least-squares values given the codes, where this lowers the loss, and
        updates the group's ``slope``."""
        scale, values = self.scales[:, at, None], self.values[:, group]
        codes = nearest_codes(values, scale, self.grid)
        curve = descent.energy(group, codes)
        step = (slope * codes).sum(1, keepdim=True) / curve
        fitted = self.problem.units.rounded(torch.where(curve > 0, scale - step, scale))
        change = self.problem.units.rounded(codes * fitted) - values
        gain = 2 * (slope * change).sum(1, keepdim=True) + descent.energy(group, change)
        better = (gain < 0) & (fitted * scale > 0)
        self.scales[:, at] = torch.where(better, fitted, scale)[:, 0]
        change.masked_fill_(~better, 0.0)
        values.copy_(self.problem.units.rounded(codes * self.scales[:, at, None]))
        descent.add_(slope, group, group, change)


class _Descent:
    """The loss ``e H eᵀ`` of changes ``e [rows, cols]``, and its slope. ``H`` is the damped Gram matrix."""

    def __init__(self, problem: Problem, factor: ObsFactor, change: Tensor) -> None:
        self.gram = problem.whole_gram.matrix
        diagonal = self.gram.diagonal()
        mean = diagonal.sum() / (~factor.dead).sum().clamp_min(1)
        # as ObsFactor: a dead column counts as a typical one
        self.added = torch.where(factor.dead, mean.where(mean > 0, 1.0), factor.damping * mean)  # [cols]
        self.curvature = diagonal + self.added  # [cols]: the diagonal of H
        self.slope = (change @ self.gram).addcmul_(change, self.added)  # [rows, cols]: e H

    def energy(self, columns: slice, change: Tensor) -> Tensor:
        """``[rows, 1]``: ``d H dᵀ`` of ``change d [rows, width]`` of these columns."""
        product = (change @ self.gram[columns, columns]).addcmul_(change, self.added[columns])
        return product.mul_(change).sum(1, keepdim=True)

    def step_factor(self, columns: slice) -> Tensor:
        """``[width, width]``: how far the change of a column (row) moves the best value of another."""
        factor = self.gram[columns, columns] / self.curvature[columns]
        factor.diagonal().fill_(1.0)
        return factor

    def add_(self, slope: Tensor, group: slice, columns: slice, change: Tensor) -> None:
        """Adds to a group's ``slope [rows, group]`` what ``change [rows, width]`` of these of its columns makes."""
        slope.addmm_(change, self.gram[columns, group])
        slope[:, _within(group, columns)].addcmul_(change, self.added[columns])

    def move_(self, columns: slice, change: Tensor) -> None:
        """Updates the slope for ``change [rows, width]`` of these columns."""
        self.slope.addmm_(change, self.gram[columns])
        self.slope[:, columns].addcmul_(change, self.added[columns])


def best_scales(weight: Tensor, importance: Tensor, grid: Grid, problem: Problem) -> Tensor:
    """``[rows]`` float32: the scale of each row, among those of :data:`SHARES`, for which rounding to the nearest code
    costs least.

    Args:
        weight: ``[rows, width]`` float32, the columns of one group; 0 where a weight is pruned.
        importance: ``[width]`` float32; the squared error of a column is multiplied by it.
        grid: the grid.
        problem: its dtype rounds scales and values.

    Returns:
        0 for a row of zeros. Else its sign is the opposite of that of the largest weight, which so gets a negative
        code: there is one more of these.
    """
    most, at = weight.abs().max(dim=1)
    sign = torch.where(weight.gather(1, at[:, None])[:, 0] > 0, -1.0, 1.0)
    smallest = (
        torch.finfo(problem.units.dtype).smallest_normal
        * torch.finfo(problem.units.dtype).eps
        * 2.0**-problem.units.power
    )
    best, least = torch.zeros_like(most), torch.full_like(most, torch.inf)
    for share in SHARES[:1] if grid.bits == NEARLY_EXACT else SHARES:
        scale = problem.units.rounded((most * (share / grid.highest)).clamp_min_(smallest)).mul_(sign)
        values = problem.units.rounded(nearest_codes(weight, scale[:, None], grid).mul_(scale[:, None]))
        loss = values.sub_(weight).square_() @ importance
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, scale, best)
    return best.masked_fill_(most == 0, 0.0)


def nearest_codes(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The codes, as float32, of the grid's points nearest to a weight; 0 where ``scale`` is 0."""
    codes = torch.where(scale != 0, weight / scale, 0.0)
    return codes.round_().clamp_(grid.lowest, grid.highest)


def _round_to_grid(values: Tensor, scales: Tensor, grid: Grid, problem: Problem, out: Tensor) -> Tensor:
    """Writes ``values [rows, cols]``, rounded to the grid of ``scales [rows, groups]``, in the weight's dtype and
    units. Returns whether all are finite: ``[]`` bool."""
    finite = torch.ones((), dtype=torch.bool, device=values.device)
    for at, group in enumerate(_slices(0, values.shape[1], grid.group)):
        codes = nearest_codes(values[:, group], scales[:, at, None], grid).to(torch.int8)
        out[:, group] = grid.dequantize(codes, problem.units.in_dtype(scales[:, at, None]))
        finite &= torch.isfinite(out[:, group]).all()
    return finite


def _part_rows(cols: int) -> int:
    """How many rows are rounded at a time."""
    return max(1, PART_ENTRIES // max(1, cols))


def _within(group: slice, columns: slice) -> slice:
    """Columns of a group, counted from its first one."""
    return slice(columns.start - group.start, columns.stop - group.start)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """``[start, stop)`` in slices of ``step``; the last may be narrower."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


STAGE = Quantize
