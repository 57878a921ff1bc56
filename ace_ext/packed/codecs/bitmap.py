"""The format ``bitmap``: a bit for each weight, and the survivors unchanged; kernels read it as it is mapped."""

import math

import torch
from torch import Tensor

from ace_ext.packed._codec import Codec, Kept, Packed
from ace_ext.packed.matrix import BITS, WORD, PackedMatrix


def encode(tensor: Tensor, pattern: tuple[int, int] | None) -> dict[str, Tensor] | None:
    """The parts of a tensor of two or more dimensions, viewed as a matrix ``[rows, last]``; None if not smaller."""
    matrix = smaller(tensor)
    if matrix is None:
        return None
    parts = {"bitmap": matrix.bitmap, "values": matrix.values}
    return parts if matrix.row_start is None else parts | {"row_start": matrix.row_start}


def smaller(tensor: Tensor) -> PackedMatrix | None:
    """The tensor as a packed matrix ``[rows, last dimension]``; None if it has no weights or is not smaller so."""
    if tensor.dtype not in BITS or tensor.dim() < 2 or not tensor.numel():
        return None
    weight = tensor.reshape(-1, tensor.shape[-1])
    survivors = int(weight.view(BITS[weight.dtype]).count_nonzero())
    if survivors * weight.element_size() + weight.numel() // 8 >= weight.nbytes:
        return None
    matrix = PackedMatrix.of(weight)
    return matrix if matrix.nbytes < weight.nbytes else None


def decode(packed: Packed) -> PackedMatrix:
    """The matrix, checked."""
    rows, cols = packed.matrix_shape
    bitmap = packed.part("bitmap", torch.uint8, (rows, 8 * math.ceil(cols / WORD)))
    values, row_start = packed.parts.get("values"), packed.parts.get("row_start")
    if values is None or values.dtype != packed.dtype:
        raise ValueError(f"part values must be {packed.dtype}")
    return PackedMatrix(bitmap, values, row_start, cols).check()


def size(kept: Kept) -> int:
    """A bit for each weight, and the survivors."""
    return kept.rows * 8 * math.ceil(kept.cols / WORD) + kept.survivors * kept.dtype.itemsize


CODEC = Codec(
    name="bitmap",
    summary="a bit for each weight, then the kept ones; to compute from",
    parts=frozenset({"bitmap", "values", "row_start"}),
    encode=encode,
    decode=decode,
    size=size,
)
