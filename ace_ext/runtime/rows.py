"""Dense rows of packed matrices: the lookups of packed embeddings.

The two ops are for compilers, which cannot trace rows of different lengths. They are written in Python and check
nothing, so they are not in the namespace of the compiled module's ops.
"""

from typing import Any

import torch
from torch import Tensor

from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix
from ace_ext.packed.rows import take_rows
from ace_ext.runtime.packed_tensor import unpacked


def unpack_rows(matrix: PackedMatrix | QuantizedMatrix, rows: Tensor) -> Tensor:
    """The dense ``rows`` of a matrix: ``[..., cols]`` for integers ``[...]``. A compiled model has one op for it.

    Raises:
        IndexError: there is no such row; rows are not counted from the end.
    """
    flat = rows.flatten().long()
    if not torch.compiler.is_compiling():
        found = unpacked(take_rows(matrix, flat))
    elif isinstance(matrix, QuantizedMatrix):
        tensors = matrix.bitmap, matrix.codes, matrix.scales
        found = quantized_rows(flat, *tensors, matrix.bits, matrix.group, matrix.row_start, matrix.cols)
    else:
        found = packed_rows(flat, matrix.bitmap, matrix.values, matrix.row_start, matrix.cols)
    return found.view(*rows.shape, matrix.cols)


@torch.library.custom_op("ace_ext_runtime::packed_rows", mutates_args=())
def packed_rows(rows: Tensor, bitmap: Tensor, values: Tensor, row_start: Tensor | None, cols: int) -> Tensor:
    """Rows ``[n, cols]`` of a :class:`PackedMatrix` as an op of torch."""
    return unpacked(take_rows(PackedMatrix(bitmap, values, row_start, cols), rows))


@torch.library.custom_op("ace_ext_runtime::quantized_rows", mutates_args=())
def quantized_rows(
    rows: Tensor,
    bitmap: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group: int,
    row_start: Tensor | None,
    cols: int,
) -> Tensor:
    """Rows ``[n, cols]`` of a :class:`QuantizedMatrix` as an op of torch."""
    return unpacked(take_rows(QuantizedMatrix(bitmap, codes, scales, row_start, bits, group, cols), rows))


@packed_rows.register_fake
def _packed_shape(rows: Tensor, bitmap: Tensor, values: Tensor, row_start: Tensor | None, cols: int) -> Tensor:
    return values.new_empty(rows.shape[0], cols)


@quantized_rows.register_fake
def _quantized_shape(rows: Tensor, bitmap: Tensor, codes: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return scales.new_empty(rows.shape[0], rest[-1])
