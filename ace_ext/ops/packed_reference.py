"""The reference of the ops on packed matrices, from their contract (``csrc/ops/packed.h``): one row and one bit at a
time, sums in float64. Imports nothing of the fast path."""

import torch
from torch import Tensor


def unpack_bitmap(bitmap: Tensor, values: Tensor, row_start: Tensor | None, cols: int) -> Tensor:
    """``[rows, cols]`` in the dtype of ``values``; the arguments are those of the op."""
    weight = torch.zeros(len(bitmap), cols, dtype=values.dtype)
    stored = values.flatten()
    for row, bits in enumerate(bitmap.tolist()):
        place = row * values.shape[-1] if row_start is None else int(row_start[row])
        for column in range(cols):
            if bits[column // 8] >> (column % 8) & 1:
                weight[row, column] = stored[place]
                place += 1
    return weight


def packed_linear(
    x: Tensor, bitmap: Tensor, values: Tensor, row_start: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``[tokens, rows]`` float64, not rounded to the dtype of ``x``; the arguments are those of the op."""
    weight = unpack_bitmap(bitmap, values, row_start, x.shape[1]).double()
    out = x.double() @ weight.T
    return out if bias is None else out + bias.double()
