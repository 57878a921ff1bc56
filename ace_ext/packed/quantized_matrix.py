"""A matrix of codes on a grid, without its zeros: the layout that the op ``quantized_linear`` reads
(``csrc/ops/quantized.h``)."""

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ace_ext.grids import AT_ONCE, STORED_WIDTHS, Grid
from ace_ext.packed.matrix import (
    BITS,
    check_row_start,
    checked_counts,
    fill_rows_,
    lengths_to_starts,
    pack_bits,
    unpack_bits,
)


def code_width(grid: Grid) -> int:
    """The number of bits in which the codes of a grid are stored."""
    return 8 if grid.bits > 4 else 4


@dataclass(frozen=True)
class QuantizedMatrix:
    """A bit for each weight, the codes of the survivors, and a scale for each row and group of columns."""

    bitmap: Tensor
    """``[rows, 8 ceil(cols / 64)]`` uint8: bit ``j % 8`` of byte ``j // 8`` is set where column j is stored."""
    codes: Tensor
    """uint8, two's complement: a byte a code, or half of one, the lower half first. Each row begins with a byte; an
    unused upper half is 0. ``[rows, bytes]`` if each row has as many survivors, else ``[bytes]``."""
    scales: Tensor
    """``[rows, ceil(cols / group)]`` float32, float16 or bfloat16."""
    row_start: Tensor | None
    """``[rows + 1]`` int64, or None if each row has as many survivors: where each row begins in ``codes``, in bytes."""
    bits: int
    """The width of a code: 8 or 4."""
    group: int
    """Columns that share a scale, a multiple of 64."""
    cols: int

    @classmethod
    def of(cls, weight: Tensor, grid: Grid) -> "QuantizedMatrix | None":
        """Packs ``weight [rows, cols]``, not empty, whose values are on a grid. Short rows are filled with zeros as in
        :meth:`ace_ext.packed.matrix.PackedMatrix.of`.

        Returns:
            None if a value is on no grid of this width, is -0.0 or is not finite.
        """
        recovered = recover(weight, grid)
        if recovered is None:
            return None
        codes, scales = recovered
        bits, parts = code_width(grid), row_parts(weight)
        counts = torch.cat([(codes[part] != 0).sum(dim=1) for part in parts])
        row_start = lengths_to_starts(row_bytes(counts, bits))
        most = int(counts.max())
        width = row_bytes(most, bits)
        fills = width * len(counts) - int(row_start[-1]) <= row_start.nbytes
        bitmaps, stored = [], []
        for part in parts:
            kept = codes[part] != 0
            if fills:
                fill_rows_(kept, counts[part], most)
            bitmaps.append(pack_bits(kept))
            stored.append(stored_codes(codes[part], kept, bits))
        flat = torch.cat(stored)
        flat, starts = (flat.view(len(counts), width), None) if fills else (flat, row_start)
        return cls(torch.cat(bitmaps), flat, scales, starts, bits, grid.group, weight.shape[1])

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """Its tensors by their names."""
        return {"bitmap": self.bitmap, "codes": self.codes, "scales": self.scales, "row_start": self.row_start}

    @property
    def stored(self) -> int:
        """The number of stored weights, zeros that fill rows included; rounded up to whole bytes in each row."""
        return self.codes.numel() * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        return sum(t.nbytes for t in self.tensors.values() if t is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the dense matrix."""
        return len(self.bitmap), self.cols

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense matrix."""
        return self.scales.dtype

    def to(self, dtype: torch.dtype) -> "QuantizedMatrix":
        """The matrix with scales in another dtype. Its weights are the codes times these scales, rounded once."""
        return self if self.scales.dtype == dtype else replace(self, scales=self.scales.to(dtype))

    def check(self) -> "QuantizedMatrix":
        """Checks everything that the kernels rely on, and returns the matrix.

        Raises:
            ValueError: shapes do not fit, bits are set beyond the columns, bits disagree with the codes, an unused half
                of a byte is not 0, or a scale is not finite.
        """
        rows = len(self.bitmap)
        if self.bits not in STORED_WIDTHS:
            raise ValueError(f"codes must have 8 or 4 bits (got {self.bits})")
        grid = Grid(self.bits, self.group)
        if self.scales.dtype not in BITS or tuple(self.scales.shape) != (rows, grid.groups(self.cols)):
            raise ValueError(
                f"scales must be [{rows}, {grid.groups(self.cols)}] (got {self.scales.dtype} {list(self.scales.shape)})"
            )
        if not torch.isfinite(self.scales).all():
            raise ValueError("scales are not all finite")
        if self.codes.dtype != torch.uint8 or self.codes.dim() != (2 if self.row_start is None else 1):
            raise ValueError(f"codes have dtype {self.codes.dtype} and {self.codes.dim()} dimensions")
        counts = checked_counts(self.bitmap, self.cols)
        lengths = row_bytes(counts, self.bits)
        if self.row_start is not None:
            check_row_start(self.row_start, lengths, len(self.codes), "codes")
            ends = self.row_start.numpy()[1:]
        else:
            if len(self.codes) != rows or (counts != counts[:1]).any() or (lengths != self.codes.shape[1]).any():
                raise ValueError(f"bitmap does not have codes of {self.codes.shape[-1]} bytes in every row")
            ends = np.arange(1, rows + 1) * self.codes.shape[1]
        if self.bits == 4 and (self.codes.flatten().numpy()[ends[counts % 2 == 1] - 1] >> 4).any():
            raise ValueError("codes have an unused half that is not 0")
        return self

    def dense_codes(self) -> Tensor:
        """``[rows, cols]`` int8: the code of each weight, on the device of the matrix."""
        kept = unpack_bits(self.bitmap, self.cols)
        flat = self.codes.flatten()
        if self.bits == 8:
            codes = kept.to(torch.int8)
            codes[kept] = flat.view(torch.int8)
            return codes
        padded = _with_padding(kept)
        codes = padded.to(torch.int8)
        halves = torch.stack((flat & 15, flat >> 4), dim=1).flatten()
        codes[padded] = (halves ^ 8).view(torch.int8) - 8
        return codes[:, : self.cols]

    def dense(self) -> Tensor:
        """The dense matrix ``[rows, cols]``. Plain torch, so it works on any device."""
        return Grid(self.bits, self.group).dequantize(self.dense_codes(), self.scales)


def recover(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """Codes ``[rows, cols]`` int8 and scales of a matrix on a grid, as :meth:`ace_ext.grids.Grid.recover` finds them;
    None also if the matrix holds -0.0, of which codes do not keep the sign."""
    raw = weight.view(BITS[weight.dtype])
    if any(((raw[part] != 0) & (weight[part] == 0)).any() for part in row_parts(weight)):
        return None
    return grid.recover(weight)


def row_parts(matrix: Tensor) -> list[slice]:
    """Slices of the rows of a matrix that bound the memory of intermediate results."""
    step = max(1, AT_ONCE // max(1, matrix.shape[1]))
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


Counts = TypeVar("Counts", int, Tensor, NDArray[np.int64])


def row_bytes(counts: Counts, bits: int) -> Counts:
    """The bytes of rows with so many codes."""
    return (counts * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """``codes [rows, k]`` int8 as bytes ``[rows, ceil(k bits / 8)]`` uint8."""
    return stored_codes(codes, torch.ones_like(codes, dtype=torch.bool), bits).view(
        len(codes), math.ceil(codes.shape[1] * bits / 8)
    )


def stored_codes(codes: Tensor, kept: Tensor, bits: int) -> Tensor:
    """The bytes of the kept codes of ``[rows, cols]`` int8, row after row."""
    if bits == 8:
        return codes[kept].view(torch.uint8)
    halves = functional.pad(codes, (0, 1))[_with_padding(kept)].view(torch.uint8) & 15
    return halves[0::2] | halves[1::2] << 4


def _with_padding(kept: Tensor) -> Tensor:
    """``[rows, cols + 1]``: with a further column that is kept where the number of kept ones is odd, so that each row
    fills whole bytes."""
    return torch.cat((kept, kept.sum(dim=1, keepdim=True) % 2 == 1), dim=1)
