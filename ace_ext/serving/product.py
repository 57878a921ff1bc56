"""How to multiply with a weight that a server loaded: a module for each kind of weight.

The modules copy their tensors: a view of some rows would keep the whole weight in memory, and a mapped tensor the
whole file.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext.ops._packed import register_packed, with_whole_rows
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix
from ace_ext.runtime.rows import unpack_rows
from ace_ext.serving.matrices import Matrix


class PackedProduct(nn.Module):
    """``x Wᵀ + bias`` of a packed ``W``; ``torch.compile`` traces it without a graph break.

    Args:
        matrix: the weight, checked.
        device: where its tensors are to be.
    """

    bitmap: Tensor
    row_start: Tensor | None

    def __init__(self, matrix: Matrix, device: torch.device | str = "cpu") -> None:
        super().__init__()
        register_packed()
        self.rows, self.cols = matrix.shape
        for name, tensor in matrix.tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.to(device, copy=True), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., cols]``, of any strides, to ``[..., rows]``, in the dtype of the weight, which ``x`` must have."""
        return self._product(with_whole_rows(x.reshape(-1, self.cols)), bias).view(*x.shape[:-1], self.rows)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Rows ``[..., cols]`` of the weight for integers ``[...]``, as an embedding's."""
        return unpack_rows(self._matrix(), tokens)

    def _matrix(self) -> Matrix:
        return PackedMatrix(self.bitmap, self.get_buffer("values"), self.row_start, self.cols)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        values = self.get_buffer("values")
        out: Tensor = torch.ops.ace_ext.packed_linear(x, self.bitmap, values, self.row_start, bias)
        return out


class QuantizedProduct(PackedProduct):
    """The same for a weight of codes and scales."""

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: QuantizedMatrix, device: torch.device | str = "cpu") -> None:
        super().__init__(matrix, device)
        self.bits, self.group = matrix.bits, matrix.group

    def _matrix(self) -> Matrix:
        return QuantizedMatrix(self.bitmap, self.codes, self.scales, self.row_start, self.bits, self.group, self.cols)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        grid = self.bits, self.group
        tensors = self.bitmap, self.codes, self.scales
        out: Tensor = torch.ops.ace_ext.quantized_linear(x, *tensors, *grid, self.row_start, bias)
        return out


class DenseProduct(nn.Module):
    """The same for a dense weight ``[rows, cols]``."""

    weight: Tensor

    def __init__(self, weight: Tensor, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(device, copy=True), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As :meth:`PackedProduct.forward`."""
        return functional.linear(x, self.weight, bias)


def product_of(weight: Matrix | Tensor, device: torch.device | str = "cpu") -> nn.Module:
    """The module that multiplies with a weight."""
    if isinstance(weight, Tensor):
        return DenseProduct(weight, device)
    return QuantizedProduct(weight, device) if isinstance(weight, QuantizedMatrix) else PackedProduct(weight, device)
