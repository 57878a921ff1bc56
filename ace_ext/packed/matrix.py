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
        row_start = lengths_to_starts(counts)
        most, total = int(counts.max()) if len(counts) else 0, int(row_start[-1])
        if (most * len(counts) - total) * weight.element_size() > row_start.nbytes:
            return cls(pack_bits(kept), weight[kept], row_start, weight.shape[1])
        fill_rows_(kept, counts, most)
        return cls(pack_bits(kept), weight[kept].view(len(counts), most), None, weight.shape[1])

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """Its tensors by their names."""
        return {"bitmap": self.bitmap, "values": self.values, "row_start": self.row_start}

    @property
    def stored(self) -> int:
        """The number of stored weights, zeros that fill rows included."""
        return self.values.numel()

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
        return self.values.dtype

    def to(self, dtype: torch.dtype) -> "PackedMatrix":
        """The matrix with survivors in another dtype; survivors that become 0 are still stored."""
        return self if self.values.dtype == dtype else replace(self, values=self.values.to(dtype))

    def check(self) -> "PackedMatrix":
        """Checks everything that the kernels rely on, and returns the matrix.

        Raises:
            ValueError: shapes do not fit, bits are set beyond the columns, or bits disagree with the survivors.
        """
        rows = len(self.bitmap)
        if self.values.dtype not in BITS or self.values.dim() != (2 if self.row_start is None else 1):
            raise ValueError(f"values have dtype {self.values.dtype} and {self.values.dim()} dimensions")
        counts = checked_counts(self.bitmap, self.cols)
        if self.row_start is None:
            if len(self.values) != rows or (counts != self.values.shape[1]).any():
                raise ValueError(f"bitmap does not have {self.values.shape[-1]} survivors in every row")
            return self
        check_row_start(self.row_start, counts, len(self.values), "values")
        return self

    def dense(self) -> Tensor:
        """The dense matrix ``[rows, cols]``, with the bits of every weight. Plain torch, so it works on any device."""
        weight = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        weight[unpack_bits(self.bitmap, self.cols)] = self.values.flatten()
        return weight


def lengths_to_starts(lengths: Tensor) -> Tensor:
    """``[rows + 1]`` int64: where each row begins, and the end of the last, from the lengths ``[rows]`` of rows."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=starts[1:])
    return starts


def fill_rows_(kept: Tensor, counts: Tensor, most: int) -> None:
    """Marks further columns of ``kept [rows, cols]``, the lowest first, until each row has ``most``; ``counts [rows]``
    is how many each row has."""
    short = (counts < most).nonzero()[:, 0]
    if len(short):
        zeros = ~kept[short]
        kept[short] |= zeros & (zeros.cumsum(dim=1) <= (most - counts[short])[:, None])


def checked_counts(bitmap: Tensor, cols: int) -> NDArray[np.int64]:
    """``[rows]``: the number of survivors in each row of a bitmap.

    Raises:
        ValueError: dtype or shape do not fit, or bits are set beyond the columns.
    """
    words = math.ceil(cols / WORD)
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != (len(bitmap), 8 * words):
        raise ValueError(f"bitmap must be uint8 [rows, {8 * words}] (got {list(bitmap.shape)})")
    bits = bitmap.numpy()
    if cols % WORD and len(bits):
        beyond = np.ones((1, 8 * words * 8), np.uint8)
        beyond[:, :cols] = 0
        if (bits & np.packbits(beyond, axis=1, bitorder="little")).any():
            raise ValueError("bitmap has bits beyond the last column")
    return row_counts(bits)


def check_row_start(row_start: Tensor, lengths: NDArray[np.int64], total: int, what: str) -> None:
    """Checks the starts of rows against their lengths ``[rows]``; ``what`` has ``total`` entries.

    Raises:
        ValueError: they disagree.
    """
    if row_start.dtype != torch.int64 or tuple(row_start.shape) != (len(lengths) + 1,):
        raise ValueError(f"row_start must be int64 [{len(lengths) + 1}] (got {list(row_start.shape)})")
    start = row_start.numpy()
    if start[0] != 0 or start[-1] != total or (np.diff(start) != lengths).any():
        raise ValueError(f"row_start does not agree with bitmap and {what}")


def unpack_bits(bitmap: Tensor, cols: int) -> Tensor:
    """The bool matrix ``[rows, cols]`` of a bitmap, on its device."""
    eight = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return (bitmap[:, :, None] >> eight & 1).flatten(1)[:, :cols].bool()


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
