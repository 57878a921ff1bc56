"""A module's weight that is stored without its zeros: what :class:`ace_ext.runtime.PackedLinear` and
:class:`ace_ext.runtime.PackedEmbedding` have in common."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ace_ext.grids import Grid
from ace_ext.ops._packed import has_kernel
from ace_ext.packed.files import dense
from ace_ext.packed.matrix import BITS, PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix

_UNPACKED = "_ace_ext_unpacked"
"""The attribute of a state dict with the names of unpacked weights, by the addresses of their bitmaps. With it, modules
that share a packed weight share the dense one too, and ``save_pretrained`` writes it once."""


class PackedWeight(nn.Module):
    """A module with a packed weight in place of the parameter ``weight``.

    Its ``state_dict`` has ``weight``, dense, unpacked on request. So ``save_pretrained`` writes an ordinary checkpoint,
    and ``load_state_dict`` reads one; codes are read from weights that are on the same grid.
    """

    bitmap: Tensor
    row_start: Tensor | None
    bits: int | None
    """The width of a code; None if values are stored."""
    group: int
    cols: int

    def _take(self, matrix: PackedMatrix | QuantizedMatrix) -> None:
        for name, tensor in matrix.tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.cols = matrix.cols
        self.bits, self.group = (matrix.bits, matrix.group) if isinstance(matrix, QuantizedMatrix) else (None, 0)

    @property
    def matrix(self) -> PackedMatrix | QuantizedMatrix:
        """The packed weight."""
        held: Any = self._buffers
        if self.bits is None:
            return PackedMatrix(held["bitmap"], held["values"], held["row_start"], self.cols)
        tensors = held["bitmap"], held["codes"], held["scales"], held["row_start"]
        return QuantizedMatrix(*tensors, self.bits, self.group, self.cols)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of the base class. A model that ties its weights again gives this module the weight that it has: that is
        ignored."""
        if name != "weight" or not isinstance(param, Table):
            super().register_parameter(name, param)

    def unpacked(self) -> Tensor:
        """The dense weight ``[rows, cols]``, made at each call."""
        return unpacked(self.matrix)

    def _packed(self, weight: Tensor) -> PackedMatrix | QuantizedMatrix | None:
        """A dense weight in this layout; None if it cannot be."""
        return PackedMatrix.of(weight) if self.bits is None else QuantizedMatrix.of(weight, Grid(self.bits, self.group))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name, place = f"{prefix}weight", self.bitmap.data_ptr()
        known: dict[int, str] = getattr(destination, "__dict__", {}).setdefault(_UNPACKED, {})
        destination[name] = destination[known[place]] if place in known else self.unpacked()
        if place:
            known[place] = name

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}weight"
        _, strict, missing, unexpected, errors = rest
        weight, device, matrix = state_dict.get(name), self.bitmap.device, self.matrix
        if weight is None and strict:
            missing.append(name)
        elif weight is not None and tuple(weight.shape) != matrix.shape:
            errors.append(f"{name} must be {list(matrix.shape)} (got {list(weight.shape)})")
        elif weight is not None and weight.dtype not in BITS:
            errors.append(
                f"{name} must be float32, float16 or bfloat16 (got {str(weight.dtype).removeprefix('torch.')})"
            )
        elif weight is not None:
            packed = self._packed(weight.detach().cpu().to(matrix.dtype).contiguous())
            if packed is None:
                errors.append(f"{name} must be on the grid of {self!r}; load it into a dense model")
            else:
                self._take(packed)
                self.to(device)
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, rest[0], strict, missing, found, errors)
        unexpected.extend(key for key in found if key != name)


class Table(torch.Tensor):
    """A packed weight in the form of a dense parameter without storage. A model finds it where it looks for the weight
    of its embedding: for its shape and dtype, or to tie a head to it. Any other operation unpacks the whole weight."""

    owner: PackedWeight
    _is_param: bool
    """``isinstance(…, nn.Parameter)`` asks for it."""

    @staticmethod
    def __new__(cls, owner: PackedWeight) -> "Table":
        """A tensor without storage."""
        matrix = owner.matrix
        found: Table = torch.Tensor._make_wrapper_subclass(
            cls, matrix.shape, dtype=matrix.dtype, device=matrix.bitmap.device
        )
        found.owner, found._is_param = owner, True
        return found

    def __init__(self, owner: PackedWeight) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Table({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every operation gets the dense table."""

        def dense(value: Any) -> Any:
            return value.owner.unpacked() if isinstance(value, Table) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def unpacked(matrix: PackedMatrix | QuantizedMatrix) -> Tensor:
    """The dense matrix ``[rows, cols]``, on its device."""
    return dense(matrix) if has_kernel(matrix.bitmap.device.type) else matrix.dense()
