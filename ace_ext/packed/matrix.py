"""A matrix whose zeros are not stored: the layout that the op ``packed_linear`` reads (``csrc/ops/packed.h``)."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORD = 64
"""Columns of one word of a bitmap."""

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
"""The dtypes of weights, each with an integer dtype of the same size, to view its bits."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class PackedMatrix:
    """A bit for each weight, and the survivors: the weights whose bits are not all 0 (-0.0 is a survivor)."""

    bitmap: Tensor
    """``[rows, 8 ceil(cols / 64)]`` uint8: bit ``j % 8`` of byte ``j // 8`` is set where column j is stored."""
    values: Tensor
    """``[rows, k]`` if each row has k survivors, else ``[survivors]``; float32, float16 or bfloat16."""
    row_start: Tensor | None
    """``[rows + 1]`` int64, or None if each row has k survivors: where each row begins in ``values``."""
    cols: int

    @classmethod
    def of(cls, weight: Tensor) -> "PackedMatrix":
        """Packs ``weight [rows, cols]``.

        If rows have nearly the same number of survivors, shorter rows are filled with zeros, the lowest columns first,
        to the number of the longest row, provided that these take less space than ``row_start``.
        """
        kept = weight.view(BITS[weight.dtype]) != 0
        counts = kept.sum(dim=1)
        most, total = int(counts.max()) if len(counts) else 0, int(counts.sum())
        missing = most * len(counts) - total
        if missing * weight.element_size() > 8 * (len(counts) + 1):
            row_start = torch.zeros(len(counts) + 1, dtype=torch.int64)
            torch.cumsum(counts, 0, out=row_start[1:])
            return cls(pack_bits(kept), weight[kept], row_start, weight.shape[1])
        if missing:
            short = (counts < most).nonzero()[:, 0]
            zeros = ~kept[short]
            kept[short] |= zeros & (zeros.cumsum(dim=1) <= (most - counts[short])[:, None])
        return cls(pack_bits(kept), weight[kept].view(len(counts), most), None, weight.shape[1])

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        return sum(t.nbytes for t in (self.bitmap, self.values, self.row_start) if t is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the dense matrix."""
        return len(self.bitmap), self.cols

    def to(self, dtype: torch.dtype) -> "PackedMatrix":
        """The matrix with survivors in another dtype; survivors that become 0 are still stored."""
        return self if self.values.dtype == dtype else replace(self, values=self.values.to(dtype))

    def check(self) -> "PackedMatrix":
        """Checks everything that the kernels rely on, and returns the matrix.

        Raises:
            ValueError: shapes do not fit, bits are set beyond the columns, or bits disagree with the survivors.
        """
        rows, words = len(self.bitmap), math.ceil(self.cols / WORD)
        if self.bitmap.dtype != torch.uint8 or tuple(self.bitmap.shape) != (rows, 8 * words):
            raise ValueError(f"bitmap must be uint8 [rows, {8 * words}] (got {list(self.bitmap.shape)})")
        if self.values.dtype not in BITS or self.values.dim() != (2 if self.row_start is None else 1):
            raise ValueError(f"values have dtype {self.values.dtype} and {self.values.dim()} dimensions")
        bits = self.bitmap.numpy()
        if self.cols % WORD and rows:
            beyond = np.ones((1, 8 * words * 8), np.uint8)
            beyond[:, : self.cols] = 0
            if (bits & np.packbits(beyond, axis=1, bitorder="little")).any():
                raise ValueError("bitmap has bits beyond the last column")
        counts = row_counts(bits)
        if self.row_start is None:
            if len(self.values) != rows or (counts != self.values.shape[1]).any():
                raise ValueError(f"bitmap does not have {self.values.shape[-1]} survivors in every row")
            return self
        if self.row_start.dtype != torch.int64 or tuple(self.row_start.shape) != (rows + 1,):
            raise ValueError(f"row_start must be int64 [{rows + 1}] (got {list(self.row_start.shape)})")
        start = self.row_start.numpy()
        if start[0] != 0 or start[-1] != len(self.values) or (np.diff(start) != counts).any():
            raise ValueError("row_start does not agree with bitmap and values")
        return self

    def dense(self) -> Tensor:
        """The dense matrix ``[rows, cols]``, with the bits of every weight. Plain torch, so it works on any device."""
        eight = torch.arange(8, dtype=torch.uint8, device=self.bitmap.device)
        kept = (self.bitmap[:, :, None] >> eight & 1).flatten(1)[:, : self.cols].bool()
        weight = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        weight[kept] = self.values.flatten()
        return weight


def pack_bits(kept: Tensor) -> Tensor:
    """The bitmap of a bool matrix ``[rows, cols]``, in whole words."""
    rows, cols = kept.shape
    bitmap = np.zeros((rows, 8 * math.ceil(cols / WORD)), np.uint8)
    bitmap[:, : math.ceil(cols / 8)] = np.packbits(kept.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bitmap)


def row_counts(bitmap: Bytes) -> NDArray[np.int64]:
    """``[rows]``: the number of set bits in each row of ``bitmap [rows, bytes]``."""
    if hasattr(np, "bitwise_count") and bitmap.shape[1] % 8 == 0:  # from numpy 2 on
        counts: NDArray[np.int64] = np.bitwise_count(bitmap.view(np.uint64)).sum(axis=1, dtype=np.int64)
    else:
        counts = _SET_BITS[bitmap].sum(axis=1, dtype=np.int64)
    return counts


_SET_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
