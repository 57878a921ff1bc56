"""Rows of a packed matrix."""

from dataclasses import replace

import torch
from torch import Tensor

from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix


def take_rows(matrix: PackedMatrix | QuantizedMatrix, rows: Tensor) -> PackedMatrix | QuantizedMatrix:
    """The matrix of ``rows [n]`` int64, in this order and on the device of the matrix.

    Raises:
        IndexError: there is no such row; rows are not counted from the end.
    """
    bitmap, row_start, picked = matrix.bitmap.index_select(0, rows), matrix.row_start, rows
    if row_start is not None:
        first, last = row_start[:-1].index_select(0, rows), row_start[1:].index_select(0, rows)
        lengths = last - first
        row_start = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        shift = (first - row_start[:-1]).repeat_interleave(lengths)
        picked = torch.arange(len(shift), device=shift.device) + shift
    if isinstance(matrix, PackedMatrix):
        values = matrix.values.index_select(0, picked)
        return replace(matrix, bitmap=bitmap, values=values, row_start=row_start)
    codes, scales = matrix.codes.index_select(0, picked), matrix.scales.index_select(0, rows)
    return replace(matrix, bitmap=bitmap, codes=codes, scales=scales, row_start=row_start)
