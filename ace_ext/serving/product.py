"""How to multiply with a weight that a server loaded: a module for each kind of weight.

The modules copy their tensors: a view of some rows would keep the whole weight in memory, and a mapped tensor the
whole file.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext.ops._packed import register_packed
from ace_ext.packed.matrix import PackedMatrix


class PackedProduct(nn.Module):
    """``x Wᵀ + bias`` of a packed ``W``; ``torch.compile`` traces it without a graph break.

    Args:
        matrix: the weight, checked.
        device: where its tensors are to be.
    """

    bitmap: Tensor
    values: Tensor
    row_start: Tensor | None

    def __init__(self, matrix: PackedMatrix, device: torch.device | str = "cpu") -> None:
        super().__init__()
        register_packed()
        self.rows, self.cols = matrix.shape
        self.register_buffer("bitmap", matrix.bitmap.to(device, copy=True), persistent=False)
        self.register_buffer("values", matrix.values.to(device, copy=True), persistent=False)
        start = None if matrix.row_start is None else matrix.row_start.to(device, copy=True)
        self.register_buffer("row_start", start, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., cols]``, of any strides, to ``[..., rows]``, in the dtype of the weight, which ``x`` must have."""
        flat = x.reshape(-1, self.cols)
        if flat.stride(1) != 1 or flat.stride(0) < self.cols:  # of a transposed or expanded x
            flat = flat.contiguous()
        out: Tensor = torch.ops.ace_ext.packed_linear(flat, self.bitmap, self.values, self.row_start, bias)
        return out.view(*x.shape[:-1], self.rows)


class DenseProduct(nn.Module):
    """The same for a dense weight ``[rows, cols]``."""

    weight: Tensor

    def __init__(self, weight: Tensor, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(device, copy=True), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As :meth:`PackedProduct.forward`."""
        return functional.linear(x, self.weight, bias)


def product_of(weight: PackedMatrix | Tensor, device: torch.device | str = "cpu") -> nn.Module:
    """The module that multiplies with a weight."""
    return DenseProduct(weight, device) if isinstance(weight, Tensor) else PackedProduct(weight, device)
