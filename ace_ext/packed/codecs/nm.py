"""The format ``nm``: the kept values of each N:M group, and their places in the group."""

import math

import numpy as np
import torch
from torch import Tensor

from ace_ext.grids import Grid
from ace_ext.packed._codec import Codec, Kept, Packed
from ace_ext.packed.codecs.bitmap import survivors_size
from ace_ext.packed.matrix import BITS, Bytes, PackedMatrix, pack_bits
from ace_ext.packed.quantized_matrix import QuantizedMatrix, code_width, pack_codes, recover, row_bytes


def encode(tensor: Tensor, pattern: tuple[int, int] | None, grid: Grid | None = None) -> dict[str, Tensor] | None:
    """The parts of a tensor that has the pattern; None if it does not, or would not become smaller.

    A group with fewer than N survivors is filled with zeros, the lowest columns first.
    """
    assert pattern is not None  # `needs_pattern`
    keep_n, group_m = pattern
    if tensor.dtype not in BITS or tensor.dim() < 2 or not tensor.numel() or tensor.shape[-1] % group_m:
        return None
    groups = tensor.reshape(-1, group_m)
    removed = (groups.view(BITS[tensor.dtype]) == 0).to(torch.uint8)
    if int((group_m - removed.sum(dim=1)).max()) > keep_n or keep_n == group_m:
        return None
    places = removed.argsort(dim=1, stable=True)[:, :keep_n].sort(dim=1).values
    rows = math.prod(tensor.shape[:-1])
    stored = {"values": groups.gather(1, places).view(rows, -1)}
    recovered = None if grid is None else recover(tensor.reshape(rows, -1), grid)
    if recovered is not None and grid is not None:
        kept = recovered[0].reshape(-1, group_m).gather(1, places).view(rows, -1)
        coded = {"codes": pack_codes(kept, code_width(grid)), "scales": recovered[1]}
        stored = min(coded, stored, key=_nbytes)
    numbers = places.view(rows, -1, 1).to(torch.uint8)
    bits = (numbers >> torch.arange(index_bits(group_m), dtype=torch.uint8) & 1).flatten(1)
    indices = torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))
    parts = stored | {"indices": indices}
    return parts if _nbytes(parts) < tensor.nbytes else None


def _nbytes(parts: dict[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())


def index_bits(group_m: int) -> int:
    """Bits of an index into a group of ``group_m`` columns."""
    return max(1, (group_m - 1).bit_length())


def decode(packed: Packed) -> PackedMatrix | QuantizedMatrix:
    """The matrix, checked. Zeros that fill a group are stored in it like survivors."""
    if packed.pattern is None:
        raise ValueError("the file names no pattern")
    keep_n, group_m = packed.pattern
    rows, cols = packed.matrix_shape
    if cols % group_m:
        raise ValueError(f"{cols} columns are not whole groups of {group_m}")
    kept = cols // group_m * keep_n
    width = index_bits(group_m)
    indices = packed.part("indices", torch.uint8, (rows, math.ceil(kept * width / 8)))
    places = _places(indices.numpy(), kept, width).reshape(rows, -1, keep_n)
    if (places >= group_m).any() or (np.diff(places.astype(np.int16), axis=2) <= 0).any():
        raise ValueError(f"indices of a group must be ascending and less than {group_m}")
    mask = np.zeros((rows, cols // group_m, group_m), np.bool_)
    np.put_along_axis(mask, places.astype(np.int64), True, axis=2)
    bitmap = pack_bits(torch.from_numpy(mask.reshape(rows, cols)))
    if packed.quantized:
        bits = code_width(packed.code_grid)
        codes = packed.part("codes", torch.uint8, (rows, row_bytes(kept, bits)))
        scales = packed.part("scales", packed.dtype, (rows, packed.code_grid.groups(cols)))
        return QuantizedMatrix(bitmap, codes, scales, None, bits, packed.code_grid.group, cols).check()
    return PackedMatrix(bitmap, packed.part("values", packed.dtype, (rows, kept)), None, cols).check()


def _places(indices: Bytes, count: int, width: int) -> Bytes:
    """``[rows, count]``: the numbers of ``width`` bits in each row of bytes, the lowest bit first."""
    bits = np.unpackbits(indices, axis=1, bitorder="little")[:, : count * width].reshape(len(indices), count, width)
    numbers = np.zeros(bits.shape[:2], np.uint8)
    for bit in range(width):
        numbers |= bits[:, :, bit] << bit
    return numbers


def size(kept: Kept) -> int:
    """The survivors, and the bits of their indices."""
    assert kept.pattern is not None  # `needs_pattern`
    in_row = kept.survivors // max(1, kept.rows)
    places = kept.rows * math.ceil(in_row * index_bits(kept.pattern[1]) / 8)
    return places + survivors_size(kept)


CODEC = Codec(
    name="nm",
    summary="of a model pruned with --pattern N:M: the kept values of each group and their places",
    parts=frozenset({"values", "indices"}),
    encode=encode,
    decode=decode,
    size=size,
    needs_pattern=True,
)
