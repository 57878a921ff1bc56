"""The type of a packed format: how a tensor is encoded as parts in a file, and decoded to a matrix or a tensor."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ace_ext.grids import Grid
from ace_ext.packed.matrix import BITS, PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix

CODES = "codes"
"""The part with the codes of a matrix on a grid. Every format names it so."""

SCALES = "scales"
"""The part with its scales; of a compressing format, the prefix of their planes."""

SCALE_PLANES = 4
"""The most bytes of a scale."""

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
    grid: Grid | None = None
    """The grid of the file's codes."""

    @property
    def quantized(self) -> bool:
        """Whether the parts hold codes in place of values."""
        return CODES in self.parts

    @property
    def code_grid(self) -> Grid:
        """The grid of the codes.

        Raises:
            ValueError: the file names none.
        """
        if self.grid is None:
            raise ValueError("the file names no grid for codes")
        return self.grid

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
    grid: Grid | None = None
    """The grid of the survivors, if they are stored as codes."""


class Encode(Protocol):
    """The type of :attr:`Codec.encode`."""

    def __call__(
        self, tensor: Tensor, pattern: tuple[int, int] | None, grid: Grid | None = None
    ) -> Mapping[str, Tensor] | None:
        """The tensor's parts; None if it is stored unchanged. A matrix whose values are all on ``grid`` is stored as
        codes and scales if this is smaller."""
        ...


@dataclass(frozen=True)
class Codec:
    """One format of ``ace-prune pack --format``."""

    name: str
    summary: str
    """One line for help texts."""
    parts: frozenset[str]
    """The names of all parts that it writes of tensors that are not quantized."""
    encode: Encode
    """``encode(tensor, pattern, grid)``: see :class:`Encode`."""
    decode: Callable[[Packed], PackedMatrix | QuantizedMatrix | Tensor]
    """Decodes parts to the matrix or the tensor; checks sizes and counts, and raises ValueError."""
    size: Callable[["Kept"], int]
    """The bytes of the parts of such a matrix; an estimate for a compressing format."""
    needs_pattern: bool = False
    """Whether it stores only models that were pruned to an N:M pattern."""

    @property
    def compresses(self) -> bool:
        """Whether numbers are compressed, so that tensors without zeros become smaller too."""
        return "values" not in self.parts

    @property
    def quantized_parts(self) -> frozenset[str]:
        """The names of all parts that it writes of a matrix on a grid: codes and scales in place of values."""
        kept = [part for part in self.parts if not part.startswith(("values", "plane"))]
        scales = [f"{SCALES}{i}" for i in range(SCALE_PLANES)] if self.compresses else [SCALES]
        return frozenset([*kept, CODES, *scales])

    def most_parts(self, codes: bool) -> int:
        """The most parts of one tensor in a file with or without codes."""
        return max(len(self.parts), len(self.quantized_parts)) if codes else len(self.parts)

    def removes_zeros(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether these parts represent a matrix without its zeros."""
        return not {"bitmap", "indices"}.isdisjoint(parts)
