"""The format ``nm``: the kept values of each N:M group, and their places in the group."""

import math

import numpy as np
import torch
from torch import Tensor

from ace_ext.packed._codec import Codec, Kept, Packed
from ace_ext.packed.matrix import BITS, Bytes, PackedMatrix, pack_bits


def encode(tensor: Tensor, pattern: tuple[int, int] | None) -> dict[str, Tensor] | None:
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
    values = groups.gather(1, places).view(rows, -1)
    numbers = places.view(rows, -1, 1).to(torch.uint8)
    bits = (numbers >> torch.arange(index_bits(group_m), dtype=torch.uint8) & 1).flatten(1)
    indices = torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))
    return {"values": values, "indices": indices} if values.nbytes + indices.nbytes < tensor.nbytes else None


def index_bits(group_m: int) -> int:
    """Bits of an index into a group of ``group_m`` columns."""
    return max(1, (group_m - 1).bit_length())


def decode(packed: Packed) -> PackedMatrix:
    """The matrix, checked. Zeros that fill a group are stored in it like survivors."""
    if packed.pattern is None:
        raise ValueError("the file names no pattern")
    keep_n, group_m = packed.pattern
    rows, cols = packed.matrix_shape
    if cols % group_m:
        raise ValueError(f"{cols} columns are not whole groups of {group_m}")
    kept = cols // group_m * keep_n
    values = packed.part("values", packed.dtype, (rows, kept))
    width = index_bits(group_m)
    indices = packed.part("indices", torch.uint8, (rows, math.ceil(kept * width / 8)))
    places = _places(indices.numpy(), kept, width).reshape(rows, -1, keep_n)
    if (places >= group_m).any() or (np.diff(places.astype(np.int16), axis=2) <= 0).any():
        raise ValueError(f"indices of a group must be ascending and less than {group_m}")
    mask = np.zeros((rows, cols // group_m, group_m), np.bool_)
    np.put_along_axis(mask, places.astype(np.int64), True, axis=2)
    return PackedMatrix(pack_bits(torch.from_numpy(mask.reshape(rows, cols))), values, None, cols).check()


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
    return places + kept.survivors * kept.dtype.itemsize


CODEC = Codec(
    name="nm",
    summary="of a model pruned with --pattern N:M: the kept values of each group and their places",
    parts=frozenset({"values", "indices"}),
    encode=encode,
    decode=decode,
    size=size,
    needs_pattern=True,
)
