"""A packed weight in the form of its dense tensor, for programs that look for a weight without multiplying with it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ace_ext.ops._packed import has_kernel
from ace_ext.packed.files import dense
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix


class PackedTensor(torch.Tensor):
    """A packed weight in the shape of its dense tensor, ``[..., rows, columns]``, without storage. Shape, dtype and
    device are known; an operation unpacks the whole weight.

    Args:
        matrix: the weight; all dimensions but the last are its rows.
        shape: of the dense tensor; by default that of the matrix.
    """

    matrix: PackedMatrix | QuantizedMatrix

    @staticmethod
    def __new__(
        cls: type["PackedTensor"], matrix: PackedMatrix | QuantizedMatrix, shape: Sequence[int] | None = None
    ) -> Any:
        """A tensor without storage."""
        found: PackedTensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape or matrix.shape), dtype=matrix.dtype, device=matrix.bitmap.device
        )
        found.matrix = matrix
        return found

    def __init__(self, matrix: PackedMatrix | QuantizedMatrix, shape: Sequence[int] | None = None) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"

    def unpacked(self) -> Tensor:
        """The dense tensor."""
        return unpacked(self.matrix).view(self.shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every operation gets the dense tensor."""
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))


def unpacked(matrix: PackedMatrix | QuantizedMatrix) -> Tensor:
    """The dense matrix ``[rows, cols]``, on its device."""
    return dense(matrix) if has_kernel(matrix.bitmap.device.type) else matrix.dense()


def _dense(value: Any) -> Any:
    return value.unpacked() if isinstance(value, PackedTensor) else value
