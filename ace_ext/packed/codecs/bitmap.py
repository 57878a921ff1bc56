"""The format ``bitmap``: a bit for each weight, and the survivors unchanged; kernels read it as it is mapped."""

import math

import torch
from torch import Tensor

from ace_ext.grids import Grid
from ace_ext.packed._codec import Codec, Kept, Packed
from ace_ext.packed.matrix import BITS, WORD, PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix, code_width, row_bytes


def encode(tensor: Tensor, pattern: tuple[int, int] | None, grid: Grid | None = None) -> dict[str, Tensor] | None:
    """The parts of a tensor of two or more dimensions, viewed as a matrix ``[rows, last]``; None if not smaller."""
    matrix = smaller(tensor, grid)
    if matrix is None:
        return None
    if isinstance(matrix, QuantizedMatrix):
        parts = {"bitmap": matrix.bitmap, "codes": matrix.codes, "scales": matrix.scales}
    else:
        parts = {"bitmap": matrix.bitmap, "values": matrix.values}
    return parts if matrix.row_start is None else parts | {"row_start": matrix.row_start}


def smaller(tensor: Tensor, grid: Grid | None = None) -> PackedMatrix | QuantizedMatrix | None:
    """The tensor as a packed matrix ``[rows, last dimension]``, of codes if it is on the grid and they are smaller;
    None if it has no weights or is not smaller so."""
    if tensor.dtype not in BITS or tensor.dim() < 2 or not tensor.numel():
        return None
    weight = tensor.reshape(-1, tensor.shape[-1])
    survivors = int(weight.view(BITS[weight.dtype]).count_nonzero())
    of_values = survivors * weight.element_size() + weight.numel() // 8  # at least
    quantized = None if grid is None else QuantizedMatrix.of(weight, grid)
    if quantized is not None and quantized.nbytes < min(of_values, weight.nbytes):
        return quantized
    matrix = PackedMatrix.of(weight) if of_values < weight.nbytes else None
    fitting = [found for found in (matrix, quantized) if found is not None and found.nbytes < weight.nbytes]
    return min(fitting, key=lambda found: found.nbytes, default=None)


def decode(packed: Packed) -> PackedMatrix | QuantizedMatrix:
    """The matrix, checked."""
    rows, cols = packed.matrix_shape
    bitmap = packed.part("bitmap", torch.uint8, (rows, 8 * math.ceil(cols / WORD)))
    values, row_start = packed.parts.get("values"), packed.parts.get("row_start")
    if packed.quantized:
        grid = packed.code_grid
        scales, codes = packed.part("scales", packed.dtype, (rows, grid.groups(cols))), packed.parts["codes"]
        return QuantizedMatrix(bitmap, codes, scales, row_start, code_width(grid), grid.group, cols).check()
    if values is None or values.dtype != packed.dtype:
        raise ValueError(f"part values must be {packed.dtype}")
    return PackedMatrix(bitmap, values, row_start, cols).check()


def size(kept: Kept) -> int:
    """A bit for each weight, and the survivors."""
    return kept.rows * 8 * math.ceil(kept.cols / WORD) + survivors_size(kept)


def survivors_size(kept: Kept) -> int:
    """The bytes of the survivors, or of their codes and scales. Of a matrix on a grid, kept weights that were rounded
    to zero are not stored, so it can become smaller."""
    if kept.grid is None:
        return kept.survivors * kept.dtype.itemsize
    in_row = math.ceil(kept.survivors / max(1, kept.rows))
    return kept.rows * (row_bytes(in_row, code_width(kept.grid)) + kept.grid.groups(kept.cols) * kept.dtype.itemsize)


CODEC = Codec(
    name="bitmap",
    summary="a bit for each weight, then the kept ones; to compute from",
    parts=frozenset({"bitmap", "values", "row_start"}),
    encode=encode,
    decode=decode,
    size=size,
)
