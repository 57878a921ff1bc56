"""Cuts, stacks and unpacks packed matrices, as merged projections and tensor parallelism need them.

Every function here is written for each type of packed matrix; :mod:`ace_ext.serving.product` multiplies. Nothing else
in this package knows the types.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ace_ext.grids import GROUP_STEP
from ace_ext.packed.files import dense
from ace_ext.packed.matrix import PackedMatrix, lengths_to_starts, pack_bits, row_counts, unpack_bits
from ace_ext.packed.quantized_matrix import QuantizedMatrix, row_bytes, stored_codes

Matrix = PackedMatrix | QuantizedMatrix


def cut_rows(matrix: Matrix, start: int, stop: int) -> Matrix:
    """Rows ``start`` to before ``stop``; survivors and bits are views."""
    bitmap, row_start = matrix.bitmap[start:stop], matrix.row_start
    kept = slice(start, stop)
    if row_start is not None:
        row_start = row_start[start : stop + 1]
        kept = slice(int(row_start[0]), int(row_start[-1]))
        row_start = row_start - row_start[0]
    if isinstance(matrix, PackedMatrix):
        return replace(matrix, bitmap=bitmap, values=matrix.values[kept], row_start=row_start)
    scales = matrix.scales[start:stop]
    return replace(matrix, bitmap=bitmap, codes=matrix.codes[kept], scales=scales, row_start=row_start)


def cut_columns(matrix: Matrix, start: int, stop: int) -> Matrix:
    """Columns ``start`` to before ``stop``, of any ``start``; survivors and bits are copied.

    Rows of the result have the same number of survivors only by chance, or if the cut is between groups of an N:M
    pattern. Else the result has ``row_start``. Groups of columns that share a scale are divided if ``start`` is in one
    of them; where that would need groups of other than whole words, the result has values in place of codes.
    """
    if (start, stop) == (0, matrix.cols):
        return matrix
    if isinstance(matrix, QuantizedMatrix):
        group = math.gcd(start, matrix.group)
        if group % GROUP_STEP:
            return PackedMatrix.of(dense(matrix)[:, start:stop].contiguous())
        scales = matrix.scales.repeat_interleave(matrix.group // group, dim=1)
        scales = scales[:, start // group : math.ceil(stop / group)].contiguous()
        codes, kept = (one[:, start:stop] for one in (matrix.dense_codes(), unpack_bits(matrix.bitmap, matrix.cols)))
        flat = stored_codes(codes, kept, matrix.bits)
        return _of_codes(pack_bits(kept), flat, scales, matrix.bits, group, stop - start)
    kept = unpack_bits(matrix.bitmap, matrix.cols)
    inside = torch.zeros(matrix.cols, dtype=torch.bool)
    inside[start:stop] = True
    values = matrix.values.flatten()[inside.expand_as(kept)[kept]]
    return _of_counts(pack_bits(kept[:, start:stop]), values, stop - start)


def stack(matrices: Sequence[Matrix]) -> Matrix:
    """The rows of all matrices, which have the same columns and dtype, one after the other.

    The result has ``row_start`` unless each row of all matrices has the same number of survivors. Matrices on different
    grids, and codes and values, become values.
    """
    if len(matrices) == 1:
        return matrices[0]
    bitmap = torch.cat([one.bitmap for one in matrices])
    quantized = [one for one in matrices if isinstance(one, QuantizedMatrix)]
    if len(quantized) == len(matrices) and len({(one.bits, one.group) for one in quantized}) == 1:
        codes, scales = torch.cat([q.codes.flatten() for q in quantized]), torch.cat([q.scales for q in quantized])
        return _of_codes(bitmap, codes, scales, quantized[0].bits, quantized[0].group, quantized[0].cols)
    plain = [one if isinstance(one, PackedMatrix) else PackedMatrix.of(dense(one)) for one in matrices]
    bitmap = torch.cat([one.bitmap for one in plain])
    widths = {one.values.shape[1] if one.row_start is None else None for one in plain}
    if len(widths) == 1 and None not in widths:
        return PackedMatrix(bitmap, torch.cat([one.values for one in plain]), None, plain[0].cols)
    return _of_counts(bitmap, torch.cat([one.values.flatten() for one in plain]), plain[0].cols)


def packed(weight: Tensor) -> PackedMatrix:
    """A dense matrix ``[rows, cols]`` as a packed one, to be stacked with others."""
    return PackedMatrix.of(weight)


def empty(rows: int, like: Matrix) -> Matrix:
    """Rows of zeros, in the form of another matrix with as many columns."""
    bitmap, row_start = like.bitmap.new_zeros(rows, like.bitmap.shape[1]), torch.zeros(rows + 1, dtype=torch.int64)
    if isinstance(like, PackedMatrix):
        return replace(like, bitmap=bitmap, values=like.values.new_empty(0), row_start=row_start)
    scales = like.scales.new_zeros(rows, like.scales.shape[1])
    return replace(like, bitmap=bitmap, codes=like.codes.new_empty(0), scales=scales, row_start=row_start)


def _of_counts(bitmap: Tensor, values: Tensor, cols: int) -> PackedMatrix:
    """The matrix of a bitmap and its survivors ``[survivors]``."""
    counts = row_counts(bitmap.numpy())
    if len(counts) and bool(np.all(counts == counts[0])):
        return PackedMatrix(bitmap, values.view(len(counts), -1), None, cols)
    return PackedMatrix(bitmap, values, lengths_to_starts(torch.from_numpy(counts)), cols)


def _of_codes(bitmap: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int, cols: int) -> QuantizedMatrix:
    """The matrix of a bitmap and the bytes of its codes, row after row."""
    counts = row_counts(bitmap.numpy())
    if len(counts) and bool(np.all(counts == counts[0])):
        return QuantizedMatrix(bitmap, codes.view(len(counts), -1), scales, None, bits, group, cols)
    row_start = lengths_to_starts(torch.from_numpy(row_bytes(counts, bits)))
    return QuantizedMatrix(bitmap, codes, scales, row_start, bits, group, cols)
