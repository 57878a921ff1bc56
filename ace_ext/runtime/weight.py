"""A module's weight that is stored without its zeros: what :class:`ace_ext.runtime.PackedLinear` and
:class:`ace_ext.runtime.PackedEmbedding` have in common."""

from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.packed.matrix import BITS, PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix
from ace_ext.runtime.packed_tensor import PackedTensor, unpacked

_ORIGINS: Any = WeakIdKeyDictionary()
"""The bitmap of each dense weight in a state dict, as long as that exists."""


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
        """As of the base class, for a weight that stays packed: a model ties this module to an embedding."""
        if name != "weight" or not isinstance(param, Table):
            super().register_parameter(name, param)
        elif type(param.matrix) is not type(self.matrix):
            raise InputError(f"{self!r} cannot share the weight of a module of another form; unpack the model")
        else:
            self._take(param.matrix)

    def unpacked(self) -> Tensor:
        """The dense weight ``[rows, cols]``, made at each call."""
        return unpacked(self.matrix)

    def _packed(self, weight: Tensor) -> PackedMatrix | QuantizedMatrix | None:
        """A dense weight in this layout; None if it cannot be."""
        return PackedMatrix.of(weight) if self.bits is None else QuantizedMatrix.of(weight, Grid(self.bits, self.group))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = (value for value in destination.values() if isinstance(value, Tensor))
        shared = next((value for value in held if _ORIGINS.get(value) is self.bitmap), None)
        weight = destination[f"{prefix}weight"] = self.unpacked() if shared is None else shared
        _ORIGINS[weight] = self.bitmap  # so ``save_pretrained`` writes a weight that modules share once

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


class Table(PackedTensor):
    """A packed weight that counts as a parameter. A model finds it where it looks for the weight of its embedding: for
    its shape and dtype, or to tie a head to it."""

    _is_param = True
    """``isinstance(…, nn.Parameter)`` asks for it."""
