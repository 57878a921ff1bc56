"""Linears whose weight is stored without its zeros."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext import ops
from ace_ext.ops._packed import has_kernel, register_packed, with_whole_rows
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix
from ace_ext.runtime.weight import PackedWeight


class PackedLinear(PackedWeight):
    """``x Wᵀ + bias`` of a packed ``W [out_features, in_features]``; on a CPU the weight is never dense in memory.

    Its ``state_dict`` is that of a Linear (:class:`PackedWeight`). The packed weight is not trained, but gradients
    flow through it. On a GPU up to 16 tokens are multiplied from the packed weight; for more it is unpacked (compiled
    for CUDA; not run on a GPU). Other devices have no kernel: each call unpacks the weight, without any gain.

    Args:
        matrix: the weight, checked (:meth:`ace_ext.packed.matrix.PackedMatrix.check`).
        bias: ``[out_features]`` in the dtype of the weight, or None.
    """

    _numbers = "values"
    """The buffer with the weight's dtype."""

    def __init__(self, matrix: PackedMatrix | QuantizedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        register_packed()
        self.out_features, self.in_features = matrix.shape
        self._take(matrix)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[out_features, in_features]``, unpacked at each access."""
        return self.unpacked()

    def _product(self, x: Tensor, numbers: Tensor, bias: Tensor | None) -> Tensor:
        """``x [tokens, in_features]`` times the weight, whose ``numbers`` have the dtype of ``x``."""
        held: Any = self._buffers
        return ops.packed_linear(x, held["bitmap"], numbers, held["row_start"], bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]``, of any strides, to ``[..., out_features]``.

        Under ``torch.autocast`` input, stored values and bias are cast to its dtype, which is that of the result, as
        ``nn.Linear`` does.
        """
        device = x.device.type
        if not has_kernel(device):
            return functional.linear(x, self.weight, self.bias)
        held: Any = self._buffers  # get_buffer takes a microsecond and a half, this a twentieth
        flat, numbers = x.reshape(-1, self.in_features), held[self._numbers]
        bias: Tensor | None = self.bias
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            flat, numbers, bias = flat.to(dtype), numbers.to(dtype), None if bias is None else bias.to(dtype)
        return self._product(with_whole_rows(flat), numbers, bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """For ``print``: both sizes and the share of zeros."""
        sparsity = 1 - self.matrix.stored / max(1, self.out_features * self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={sparsity:.3f}"
        )


class QuantizedLinear(PackedLinear):
    """A :class:`PackedLinear` whose weight is codes times scales.

    Products take codes and scales as they are. :attr:`weight` is their product rounded to the dtype of the scales: the
    weight of the dense checkpoint. A conversion to another dtype converts the scales, so the weight then is the codes
    times the converted scales.

    Args:
        matrix: the weight, checked (:meth:`ace_ext.packed.quantized_matrix.QuantizedMatrix.check`).
        bias: ``[out_features]`` in the dtype of the scales, or None.
    """

    codes: Tensor
    scales: Tensor
    _numbers = "scales"

    def _product(self, x: Tensor, numbers: Tensor, bias: Tensor | None) -> Tensor:
        held: Any = self._buffers  # read once: an attribute of a module takes as long as four of these
        tensors = held["bitmap"], held["codes"], numbers
        assert self.bits is not None  # it has codes
        return ops.quantized_linear(x, *tensors, self.bits, self.group, held["row_start"], bias)

    def extra_repr(self) -> str:
        """As of the base class, with the grid."""
        return f"{super().extra_repr()}, bits={self.bits}, group={self.group}"


def linear_of(matrix: PackedMatrix | QuantizedMatrix, bias: Tensor | None = None) -> PackedLinear:
    """The Linear of a packed matrix."""
    return QuantizedLinear(matrix, bias) if isinstance(matrix, QuantizedMatrix) else PackedLinear(matrix, bias)
