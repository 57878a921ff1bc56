"""Cuts, stacks and unpacks packed matrices, as merged projections and tensor parallelism need them.

Every function here is written for one type of packed matrix; :mod:`ace_ext.serving.product` multiplies. Another type
needs its own functions here and there, and nothing else in this package.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ace_ext.ops import unpack_bitmap
from ace_ext.packed.matrix import PackedMatrix, pack_bits, row_counts


def cut_rows(matrix: PackedMatrix, start: int, stop: int) -> PackedMatrix:
    """Rows ``start`` to before ``stop``; survivors and bits are views."""
    bitmap = matrix.bitmap[start:stop]
    if matrix.row_start is None:
        return replace(matrix, bitmap=bitmap, values=matrix.values[start:stop])
    begins = matrix.row_start[start : stop + 1]
    values = matrix.values[int(begins[0]) : int(begins[-1])]
    return replace(matrix, bitmap=bitmap, values=values, row_start=begins - begins[0])


def cut_columns(matrix: PackedMatrix, start: int, stop: int) -> PackedMatrix:
    """Columns ``start`` to before ``stop``, of any ``start``; survivors and bits are copied.

    Rows of the result have the same number of survivors only by chance, or if the cut is between groups of an N:M
    pattern. Else the result has ``row_start``.
    """
    if (start, stop) == (0, matrix.cols):
        return matrix
    kept = torch.from_numpy(np.unpackbits(matrix.bitmap.numpy(), axis=1, count=matrix.cols, bitorder="little") != 0)
    inside = torch.zeros(matrix.cols, dtype=torch.bool)
    inside[start:stop] = True
    values = matrix.values.flatten()[inside.expand_as(kept)[kept]]
    return _of_counts(pack_bits(kept[:, start:stop]), values, stop - start)


def stack(matrices: Sequence[PackedMatrix]) -> PackedMatrix:
    """The rows of all matrices, which have the same columns and dtype, one after the other.

    The result has ``row_start`` unless each row of all matrices has the same number of survivors.
    """
    if len(matrices) == 1:
        return matrices[0]
    bitmap = torch.cat([one.bitmap for one in matrices])
    widths = {one.values.shape[1] if one.row_start is None else None for one in matrices}
    if len(widths) == 1 and None not in widths:
        return PackedMatrix(bitmap, torch.cat([one.values for one in matrices]), None, matrices[0].cols)
    return _of_counts(bitmap, torch.cat([one.values.flatten() for one in matrices]), matrices[0].cols)


def dense(matrix: PackedMatrix) -> Tensor:
    """The dense matrix ``[rows, cols]``, with the bits of the weights."""
    if matrix.values.dtype != torch.float16:
        return unpack_bitmap(matrix.bitmap, matrix.values, matrix.row_start, matrix.cols)
    as_stored = matrix.values.view(torch.bfloat16)  # the op converts float16, which changes some NaN
    return unpack_bitmap(matrix.bitmap, as_stored, matrix.row_start, matrix.cols).view(torch.float16)


def packed(weight: Tensor) -> PackedMatrix:
    """A dense matrix ``[rows, cols]`` as a packed one, to be stacked with others."""
    return PackedMatrix.of(weight)


def _of_counts(bitmap: Tensor, values: Tensor, cols: int) -> PackedMatrix:
    """The matrix of a bitmap and its survivors ``[survivors]``."""
    counts = torch.from_numpy(row_counts(bitmap.numpy()))
    if len(counts) and bool((counts == counts[0]).all()):
        return PackedMatrix(bitmap, values.view(len(counts), -1), None, cols)
    row_start = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=row_start[1:])
    return PackedMatrix(bitmap, values, row_start, cols)
