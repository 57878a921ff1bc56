"""The format ``archive``: the smallest file, to keep or to send. Bytes of the same kind are compressed with zstd.

A float is rotated left by one bit, so that the exponent fills its highest byte and the sign moves to the lowest bit.
Exponents of weights are similar and compress well; the other bytes hardly compress.
"""

import math

import numpy as np
import torch
import zstandard
from torch import Tensor

from ace_ext.grids import Grid
from ace_ext.packed._codec import Codec, Kept, Packed
from ace_ext.packed.codecs.bitmap import smaller
from ace_ext.packed.matrix import BITS, WORD, Bytes, PackedMatrix, lengths_to_starts, row_counts
from ace_ext.packed.quantized_matrix import QuantizedMatrix, code_width, row_bytes

MIN_MATCH = 7
"""zstd's minimum match length, at its maximum. Weights have no real repetitions: the short ones that the default levels
find by chance cost more than entropy coding (measured on random normal weights: 3.2 bits for an exponent at level 3,
2.6 with this setting; the entropy is 2.54)."""

MOST_EXPANSION = 2**16
"""An upper bound of zstd's expansion: a block of 4 bytes expands to at most 128 KiB."""

EXPONENT_BITS = 2
"""The approximate bits of a survivor's compressed exponent (SmolLM2-135M: 1.9 to 2.0 at 50 %)."""

PLANES = 8
"""The most bytes of a number."""

SAVED_CODE_BITS = 0.5
"""How many bits fewer than a code has are needed to compress it."""


def encode(tensor: Tensor, pattern: tuple[int, int] | None, grid: Grid | None = None) -> dict[str, Tensor] | None:
    """The parts of any tensor; None if they are not smaller than the tensor."""
    matrix = smaller(tensor, grid)
    if isinstance(matrix, QuantizedMatrix):
        parts = _compress_planes("scales", matrix.scales) | {"codes": _compress(matrix.codes.numpy())}
    else:
        parts = _compress_planes("plane", tensor if matrix is None else matrix.values)
    if matrix is not None:
        parts["bitmap"] = _compress(matrix.bitmap.numpy())
    return parts if sum(part.nbytes for part in parts.values()) < tensor.nbytes else None


def decode(packed: Packed) -> PackedMatrix | QuantizedMatrix | Tensor:
    """The matrix or the tensor, checked."""
    if "bitmap" not in packed.parts and not packed.quantized:
        return _numbers(packed, "plane", math.prod(packed.shape)).view(packed.shape)
    rows, cols = packed.matrix_shape
    bitmap = torch.from_numpy(_expand(packed, "bitmap", rows * 8 * math.ceil(cols / WORD)).reshape(rows, -1))
    counts = torch.from_numpy(row_counts(bitmap.numpy()))
    equal = bool((counts == counts[0]).all())
    if packed.quantized:
        grid = packed.code_grid
        bits, groups = code_width(grid), grid.groups(cols)
        starts = lengths_to_starts(row_bytes(counts, bits))
        codes = torch.from_numpy(_expand(packed, "codes", int(starts[-1])))
        codes, row_start = (codes.view(rows, -1), None) if equal else (codes, starts)
        scales = _numbers(packed, "scales", rows * groups).view(rows, groups)
        return QuantizedMatrix(bitmap, codes, scales, row_start, bits, grid.group, cols).check()
    starts = lengths_to_starts(counts)
    values = _numbers(packed, "plane", int(starts[-1]))
    values, row_start = (values.view(rows, -1), None) if equal else (values, starts)
    return PackedMatrix(bitmap, values, row_start, cols).check()


def _compress_planes(name: str, numbers: Tensor) -> dict[str, Tensor]:
    """The planes of a tensor's numbers as parts ``name0``, ``name1`` …"""
    return {f"{name}{i}": _compress(plane) for i, plane in enumerate(_planes(numbers.flatten()))}


def _planes(numbers: Tensor) -> list[Bytes]:
    """The numbers' bytes by their place in the number, the lowest first; floats are rotated."""
    size = numbers.element_size()
    raw = numbers.view(BITS[numbers.dtype]).numpy() if numbers.dtype in BITS else numbers.view(torch.uint8).numpy()
    if numbers.dtype in BITS:
        unsigned = raw.view(f"<u{size}")
        raw = (unsigned << 1 | unsigned >> (8 * size - 1)).view(np.uint8)
    return [np.ascontiguousarray(plane) for plane in raw.reshape(-1, size).T]


def _numbers(packed: Packed, name: str, count: int) -> Tensor:
    """The ``count`` numbers of the planes ``name0``, ``name1`` …"""
    size = packed.dtype.itemsize
    raw = np.stack([_expand(packed, f"{name}{i}", count) for i in range(size)], axis=1)
    if packed.dtype in BITS:
        turned = raw.reshape(-1).view(f"<u{size}")
        raw = (turned >> 1 | turned << (8 * size - 1)).view(np.uint8)
    return torch.from_numpy(raw.reshape(-1)).view(packed.dtype)


def _compress(data: Bytes) -> Tensor:
    settings = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, min_match=MIN_MATCH, write_checksum=True
    )
    compressed = zstandard.ZstdCompressor(compression_params=settings).compress(data.tobytes())
    return torch.from_numpy(np.frombuffer(compressed, np.uint8).copy())


def _expand(packed: Packed, name: str, size: int) -> Bytes:
    """The ``size`` bytes of a compressed part. The frame's claimed size is checked before memory is allocated."""
    if name not in packed.parts:
        raise ValueError(f"part {name} is missing")
    data = packed.parts[name].flatten().numpy().tobytes()
    try:
        claimed = zstandard.frame_content_size(data)
        if claimed != size or size > len(data) * MOST_EXPANSION:
            raise ValueError(f"part {name} must hold {size} bytes (got {claimed})")
        expanded = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"part {name} is damaged: {error}") from error
    return np.frombuffer(expanded, np.uint8).copy()


def size(kept: Kept) -> int:
    """An estimate: the entropy of the bitmap, and for each survivor its sign, mantissa and :data:`EXPONENT_BITS`.
    Of a matrix on a grid: for each survivor its code without :data:`SAVED_CODE_BITS`, and the scales."""
    total = kept.rows * kept.cols
    share = kept.survivors / max(1, total)
    bitmap = -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0) * total
    number = 1 - math.log2(torch.finfo(kept.dtype).eps) + EXPONENT_BITS
    if kept.grid is None:
        return math.ceil((bitmap + kept.survivors * number) / 8)
    scales = kept.rows * kept.grid.groups(kept.cols) * number
    return math.ceil((bitmap + kept.survivors * (kept.grid.bits - SAVED_CODE_BITS) + scales) / 8)


CODEC = Codec(
    name="archive",
    summary="the smallest file, compressed by zstd; to keep or to send",
    parts=frozenset({"bitmap", *(f"plane{i}" for i in range(PLANES))}),
    encode=encode,
    decode=decode,
    size=size,
)
