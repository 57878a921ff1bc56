"""The type of a packed format: how a tensor is encoded as parts in a file, and decoded to a matrix or a tensor."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext.packed.matrix import BITS, PackedMatrix

Parts = dict[str, Tensor]
"""The tensors that represent one tensor of the model in a file, by the last part of their names."""


@dataclass(frozen=True)
class Packed:
    """A tensor of the model as it is stored in a file."""

    parts: Parts
    dtype: torch.dtype
    shape: tuple[int, ...]
    pattern: tuple[int, int] | None
    """N and M of the file's N:M pattern."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the tensor, viewed as a matrix whose columns are its last dimension.

        Raises:
            ValueError: it is not a matrix of weights, or empty; such a tensor is stored unchanged.
        """
        if self.dtype not in BITS or len(self.shape) < 2 or 0 in self.shape:
            raise ValueError(f"{self.dtype} {list(self.shape)} is not a matrix of weights")
        return math.prod(self.shape[:-1]), self.shape[-1]

    def part(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The part of this name, which must have this dtype and shape.

        Raises:
            ValueError: it is missing, or its dtype or shape differs.
        """
        if name not in self.parts:
            raise ValueError(f"part {name} is missing")
        found = self.parts[name]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ValueError(f"part {name} must be {dtype} {list(shape)} (got {found.dtype} {list(found.shape)})")
        return found


@dataclass(frozen=True)
class Kept:
    """How much of a matrix is stored, for :attr:`Codec.size`."""

    rows: int
    cols: int
    survivors: int
    dtype: torch.dtype
    pattern: tuple[int, int] | None


@dataclass(frozen=True)
class Codec:
    """One format of ``ace-prune pack --format``."""

    name: str
    summary: str
    """One line for help texts."""
    parts: frozenset[str]
    """The names of all parts that it writes."""
    encode: Callable[[Tensor, tuple[int, int] | None], Mapping[str, Tensor] | None]
    """``encode(tensor, pattern)``: the tensor's parts; None if it is stored unchanged."""
    decode: Callable[[Packed], PackedMatrix | Tensor]
    """Decodes parts to the matrix or the tensor; checks sizes and counts, and raises ValueError."""
    size: Callable[["Kept"], int]
    """The bytes of the parts of such a matrix; an estimate for a compressing format."""
    needs_pattern: bool = False
    """Whether it stores only models that were pruned to an N:M pattern."""

    @property
    def compresses(self) -> bool:
        """Whether numbers are compressed, so that tensors without zeros become smaller too."""
        return "values" not in self.parts

    def removes_zeros(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether these parts represent a matrix without its zeros."""
        return not {"bitmap", "indices"}.isdisjoint(parts)
