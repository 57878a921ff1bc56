"""The reference of the ops on packed matrices, from their contracts (``csrc/ops/packed.h``, ``csrc/ops/quantized.h``):
one row and one bit at a time, sums in float64. Imports nothing of the fast path."""

import torch
from torch import Tensor


def unpack_bitmap(bitmap: Tensor, values: Tensor, row_start: Tensor | None, cols: int) -> Tensor:
    """``[rows, cols]`` in the dtype of ``values``; the arguments are those of the op."""
    weight = torch.zeros(len(bitmap), cols, dtype=values.dtype)
    stored = values.flatten()
    for row, bits in enumerate(bitmap.tolist()):
        start = row * values.shape[-1] if row_start is None else int(row_start[row])
        kept = [column for column in range(cols) if bits[column // 8] >> (column % 8) & 1]
        weight[row, kept] = stored[start : start + len(kept)]
    return weight


def packed_linear(
    x: Tensor, bitmap: Tensor, values: Tensor, row_start: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``[tokens, rows]`` float64, not rounded to the dtype of ``x``; the arguments are those of the op."""
    weight = unpack_bitmap(bitmap, values, row_start, x.shape[1]).double()
    out = x.double() @ weight.T
    return out if bias is None else out + bias.double()


def unpack_quantized(
    bitmap: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int, row_start: Tensor | None, cols: int
) -> Tensor:
    """``[rows, cols]`` in the dtype of ``scales``; the arguments are those of the op."""
    code = _dense_codes(bitmap, codes, bits, row_start, cols)
    product = code.float() * _scale_of_each(scales.float(), group, cols)
    return (product + 0.0).to(scales.dtype)  # which makes -0 of a code 0 and a negative scale +0


def quantized_linear(
    x: Tensor,
    bitmap: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group: int,
    row_start: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``[tokens, rows]`` float64, not rounded to the dtype of ``x``; the arguments are those of the op."""
    weight = exact_weight(bitmap, codes, scales, bits, group, row_start, x.shape[1])
    out = x.double() @ weight.T
    return out if bias is None else out + bias.double()


def exact_weight(
    bitmap: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int, row_start: Tensor | None, cols: int
) -> Tensor:
    """``W [rows, cols]`` float64 of :func:`quantized_linear`: codes times scales, not rounded."""
    return _dense_codes(bitmap, codes, bits, row_start, cols).double() * _scale_of_each(scales.double(), group, cols)


def _dense_codes(bitmap: Tensor, codes: Tensor, bits: int, row_start: Tensor | None, cols: int) -> Tensor:
    """The codes ``[rows, cols]`` int64, 0 where none is stored."""
    dense = [[0] * cols for _ in range(len(bitmap))]
    stored = codes.flatten().tolist()
    for row, mask in enumerate(bitmap.tolist()):
        start = row * codes.shape[-1] if row_start is None else int(row_start[row])
        place = 0  # in the row, in codes
        for column in range(cols):
            if mask[column // 8] >> (column % 8) & 1:
                code = stored[start + place * bits // 8] >> place * bits % 8 & (1 << bits) - 1
                dense[row][column] = code - (1 << bits) if code >> (bits - 1) else code
                place += 1
    return torch.tensor(dense, dtype=torch.int64).view(len(bitmap), cols)


def _scale_of_each(scales: Tensor, group: int, cols: int) -> Tensor:
    """``[rows, cols]``: the scale of each column's group."""
    return scales.repeat_interleave(group, dim=1)[:, :cols] if cols else scales
