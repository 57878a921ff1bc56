"""A Linear whose weight is stored without its zeros."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext import ops
from ace_ext.ops._packed import has_kernel, register_packed
from ace_ext.packed.matrix import BITS, PackedMatrix


class PackedLinear(nn.Module):
    """``x Wᵀ + bias`` of a packed ``W [out_features, in_features]``; on a CPU the weight is never dense in memory.

    Its ``state_dict`` is that of a Linear: ``weight``, dense, unpacked on request, and ``bias``. So ``save_pretrained``
    writes an ordinary checkpoint, and ``load_state_dict`` reads one. The packed weight is not trained, but gradients
    flow through it. On a GPU up to 16 tokens are multiplied from the packed weight; for more it is unpacked (compiled
    for CUDA; not run on a GPU). Other devices have no kernel: each call unpacks the weight, without any gain.

    Args:
        matrix: the weight, checked (:meth:`ace_ext.packed.matrix.PackedMatrix.check`).
        bias: ``[out_features]`` in the dtype of the weight, or None.
    """

    bitmap: Tensor
    values: Tensor
    row_start: Tensor | None

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        register_packed()
        self.out_features, self.in_features = matrix.shape
        self._take(matrix)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _take(self, matrix: PackedMatrix) -> None:
        self.register_buffer("bitmap", matrix.bitmap, persistent=False)
        self.register_buffer("values", matrix.values, persistent=False)
        self.register_buffer("row_start", matrix.row_start, persistent=False)

    @property
    def matrix(self) -> PackedMatrix:
        """The packed weight."""
        return PackedMatrix(self.bitmap, self.values, self.row_start, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[out_features, in_features]``, unpacked at each access."""
        if has_kernel(self.bitmap.device.type):
            return ops.unpack_bitmap(self.bitmap, self.values, self.row_start, self.in_features)
        return self.matrix.dense()

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]``, of any strides, to ``[..., out_features]``.

        Under ``torch.autocast`` input, stored values and bias are cast to its dtype, which is that of the result, as
        ``nn.Linear`` does.
        """
        if not has_kernel(x.device.type):
            return functional.linear(x, self.weight, self.bias)
        flat, values = x.reshape(-1, self.in_features), self.values
        bias: Tensor | None = self.bias
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            flat, values, bias = flat.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
        if flat.stride(1) != 1 or flat.stride(0) < self.in_features:  # of a transposed or expanded x
            flat = flat.contiguous()
        out = ops.packed_linear(flat, self.bitmap, values, self.row_start, bias)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """For ``print``: both sizes and the share of zeros."""
        sparsity = 1 - self.values.numel() / max(1, self.out_features * self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={sparsity:.3f}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}weight"
        _, strict, missing, unexpected, errors = rest
        weight = state_dict.get(name)
        if weight is None and strict:
            missing.append(name)
        elif weight is not None and tuple(weight.shape) != self.matrix.shape:
            errors.append(f"{name} must be [{self.out_features}, {self.in_features}] (got {list(weight.shape)})")
        elif weight is not None and weight.dtype not in BITS:
            errors.append(
                f"{name} must be float32, float16 or bfloat16 (got {str(weight.dtype).removeprefix('torch.')})"
            )
        elif weight is not None:
            packed = PackedMatrix.of(weight.detach().cpu().to(self.values.dtype).contiguous())
            device = self.bitmap.device
            start = None if packed.row_start is None else packed.row_start.to(device)
            self._take(PackedMatrix(packed.bitmap.to(device), packed.values.to(device), start, packed.cols))
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, rest[0], strict, missing, found, errors)
        unexpected.extend(key for key in found if key != name)
