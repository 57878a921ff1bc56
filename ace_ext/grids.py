"""Grids of quantized weights: integer codes with one scale for each row and group of columns.

A quantized matrix is stored as its values, in an ordinary checkpoint. Codes and scales are recovered from the values
when a packed format or training needs them.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ace_ext.errors import InputError

WIDTHS = (8, 4, 3)
"""The numbers of bits that a code may have."""

STORED_WIDTHS = (8, 4)
"""The numbers of bits in which the packed formats store a code. A grid of 3 bits has codes of 4."""

GROUP_STEP = 64
"""The number of columns in a group is a multiple of this, a word of the bitmap that kernels read."""

AT_ONCE = 2**22
"""Entries of a matrix that :meth:`Grid.recover` works on at a time, to bound its memory."""

SAMPLE = 4
"""Rows that :meth:`Grid.recover` tries first, because to find that a matrix is on no grid takes long."""


class Quantized(NamedTuple):
    """A matrix on a grid."""

    codes: Tensor
    """``[rows, cols]`` int8."""
    scales: Tensor
    """``[rows, groups]`` in the weight's dtype; 0 for a group of zeros."""


@dataclass(frozen=True)
class Grid:
    """A grid around 0: the codes ``-2^(bits-1) .. 2^(bits-1) - 1`` times the scale of a row's group of columns. A
    negative scale puts the lowest code, which has no counterpart, on the positive side.

    Raises:
        InputError: ``bits`` or ``group`` is not supported.
    """

    bits: int
    group: int
    """Columns that share a scale; the last group of a row may be narrower."""

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise InputError(f"bits must be one of {', '.join(map(str, WIDTHS))} (got {self.bits})")
        if self.group < GROUP_STEP or self.group % GROUP_STEP:
            raise InputError(f"group must be a multiple of {GROUP_STEP} columns (got {self.group})")

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group}"

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, cols: int) -> int:
        """The number of groups in a row of ``cols`` columns."""
        return math.ceil(cols / self.group)

    def widened(self, scales: Tensor, cols: int) -> Tensor:
        """``[rows, cols]``: the scale of each entry."""
        return scales.repeat_interleave(min(self.group, max(1, cols)), dim=1)[:, :cols]

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """``[rows, cols]``: codes times scales, multiplied in float32 and rounded once to the dtype of ``scales``."""
        return product(self.widened(scales, codes.shape[1]), codes)

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The code of the grid's point that is nearest to each weight; of two that are as near, the even one.

        Args:
            weight: ``[rows, cols]``, finite.
            scales: ``[rows, groups]``.

        Returns:
            ``[rows, cols]`` int8; 0 in groups whose scale is 0.
        """
        steps = scales.float().masked_fill(scales == 0, math.inf)
        codes = weight.float() / self.widened(steps, weight.shape[1])
        return codes.round_().clamp_(self.lowest, self.highest).to(torch.int8)

    def recover(self, weight: Tensor) -> Quantized | None:
        """Codes and scales of a matrix whose values are on a grid.

        The pair need not be the one that made the values, but it gives the same bits. A largest magnitude ``m`` of a
        group fixes the scale up to rounding once its code is known, so each code is tried, the largest first. The scale
        is negative only if ``m`` is a positive weight and has the lowest code.

        Args:
            weight: ``[rows, cols]`` float32, float16 or bfloat16; -0.0 counts as 0.

        Returns:
            None if a group is on no grid of this width, or a value is not finite.
        """
        rows, cols = weight.shape
        codes = torch.zeros(rows, cols, dtype=torch.int8, device=weight.device)
        scales = torch.zeros(rows, self.groups(cols), dtype=weight.dtype, device=weight.device)
        step = max(1, AT_ONCE // max(1, cols))
        sample = min(SAMPLE, step)
        for start, stop in pairwise([0, *range(sample, rows, step), rows]) if rows and cols else ():
            found = self._recover_rows(weight[start:stop].detach())
            if found is None:
                return None
            codes[start:stop], scales[start:stop] = found
        return Quantized(codes, scales)

    def _recover_rows(self, weight: Tensor) -> Quantized | None:
        rows, cols = weight.shape
        groups, width = self.groups(cols), min(self.group, cols)
        padded = torch.nn.functional.pad(weight, (0, groups * width - cols)).reshape(-1, width)
        codes = torch.zeros(padded.shape, dtype=torch.int8, device=weight.device)
        scales = torch.zeros(len(padded), dtype=weight.dtype, device=weight.device)
        most = padded.abs().amax(dim=1)
        if not torch.isfinite(most).all():
            return None
        left = most.nonzero()[:, 0]
        for code in range(-self.lowest, 0, -1):
            if not len(left):
                break
            left = self._try(code, left, padded, most, codes, scales)
        if len(left):
            return None
        return Quantized(codes.view(rows, -1)[:, :cols], scales.view(rows, groups))

    def _try(self, code: int, left: Tensor, padded: Tensor, most: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """Writes the groups of ``left`` whose largest magnitude has this code; returns the other groups."""
        for candidates in _scales(most[left], code):
            open_groups = scales[left] == 0
            fits = open_groups & (candidates > 0) & (product(candidates, code) == most[left])
            tried, found = left[fits], candidates[fits]
            values = padded[tried]
            if code == -self.lowest:
                found = torch.where((values == most[tried, None]).any(dim=1), -found, found)
            scale = found.float()[:, None]
            rounded = (values.float() / scale).round_().clamp_(self.lowest, self.highest)
            same = (product(rounded, scale).to(values.dtype) == values).all(dim=1)
            codes[tried[same]] = rounded[same].to(torch.int8)
            scales[tried[same]] = found[same]
        return left[scales[left] == 0]


def _scales(most: Tensor, code: int) -> list[Tensor]:
    """Every scale, in the dtype of ``most``, whose product with ``code`` may round to ``most``."""
    near = (most.float() / code).to(most.dtype)
    bits = near.view(torch.int32 if near.element_size() == 4 else torch.int16)  # neighbours of positive floats
    return [near, (bits + 1).view(near.dtype), (bits - 1).view(near.dtype)]


def product(scales: Tensor, codes: Tensor | int) -> Tensor:
    """Multiplied in float32 and rounded once to the dtype of ``scales``; +0 for code 0, also with a negative scale."""
    factors = codes.float() if isinstance(codes, Tensor) else codes  # a product of two dtypes is 100 times slower
    return (scales.float() * factors).add_(0.0).to(scales.dtype)
