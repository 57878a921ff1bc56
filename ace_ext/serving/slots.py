"""Parameters of a layer that is not loaded yet: they remember what an engine's loaders copy into them.

A loader copies each checkpoint weight, or a rank's part of it, into a place of a layer's parameter: q, k and v below
each other, gate and up, the experts of a mixture. A :class:`Slot` has the parameter's shape but no storage. Afterwards
:meth:`Slot.matrices` builds each weight from its pieces, packed if that is smaller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.packed.files import dense
from ace_ext.serving.matrices import Matrix, empty, packed, stack
from ace_ext.serving.stored import StoredWeight, bounds

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """A matrix at its place in a weight."""

    expert: int
    row: int
    col: int
    shape: tuple[int, int]
    matrix: Matrix | Tensor | None
    """None: zeros."""


class Slot(torch.Tensor):
    """A weight ``[rows, columns]`` or ``[experts, rows, columns]`` that is not loaded yet, or a part of one.

    It can be cut like a tensor; what is copied into a part is kept for the whole. Only zero can be filled in.

    Args:
        shape: of the weight.
        dtype: of the loaded weight.
        device: where the loaded weight is to be; pieces stay where they are.
    """

    pieces: list[Piece]
    start: tuple[int, ...]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> "Slot":
        """A tensor without storage."""
        found: Slot = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device(device))
        found.pieces, found.start = [], (0,) * (3 - len(shape)) + (0,) * len(shape)
        return found

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Slot({list(self.shape)}, {self.dtype}, {len(self.pieces)} pieces)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Cuts, copies into the slot, zeros, and an empty tensor like it on the meta device."""
        step = _STEPS.get(func)
        if step is None or not isinstance(args[0], Slot):
            raise NotImplementedError(f"{func} of a packed weight before it is loaded; unpack the model to serve it")
        return step(*args, **(kwargs or {}))

    def part(self, start: Sequence[int], shape: Sequence[int]) -> "Slot":
        """A part of the same weight: its first expert, row and column in the whole, and its shape."""
        found = Slot(shape, self.dtype, self.device)
        found.pieces, found.start = self.pieces, tuple(start)
        return found

    def keep(self, matrix: Matrix | Tensor | None) -> None:
        """Keeps a matrix of this part's shape, or zeros. It replaces what was at this place before."""
        expert, row, col = self.start
        piece = Piece(expert, row, col, (self.shape[0], self.shape[1]), matrix)
        places = [(one.expert, one.row, one.col, one.shape) for one in self.pieces]
        here = (expert, row, col, piece.shape)
        if here in places:
            del self.pieces[places.index(here)]
        self.pieces.append(piece)

    def matrices(self, name: str) -> list[Matrix | Tensor]:
        """The loaded weights, one for each expert, or one, in the slot's dtype.

        Each is packed if one of its pieces is and the whole is smaller so. Pieces with different numbers of survivors
        give a matrix with ``row_start``. The pieces are forgotten.

        Args:
            name: the parameter, for errors.

        Raises:
            InputError: not every weight was loaded.
        """
        experts = self.shape[0] if self.dim() == 3 else 1
        found = [self._matrix(name, [one for one in self.pieces if one.expert == at]) for at in range(experts)]
        self.pieces.clear()  # an engine may keep the slot, or a copy that shares the list
        return found

    def _matrix(self, name: str, pieces: list[Piece]) -> Matrix | Tensor:
        rows, cols = self.shape[-2:]
        pieces = [one for one in pieces if one.shape[0] and one.shape[1]]
        in_order = sorted(pieces, key=lambda one: one.row)
        ends = [0, *(one.row + one.shape[0] for one in in_order)]
        whole = ends[-1] == rows and all(one.shape[1] == cols for one in in_order)
        if whole and all(one.row == end for one, end in zip(in_order, ends, strict=False)):
            return _joined(in_order, self.dtype)
        return self._painted(name, pieces)

    def _painted(self, name: str, pieces: list[Piece]) -> Matrix | Tensor:
        """Pieces that are not rows below each other: later ones cover earlier ones."""
        weight = torch.zeros(self.shape[-2:], dtype=self.dtype)
        loaded = torch.zeros(self.shape[-2:], dtype=torch.bool)
        for one in pieces:
            at = slice(one.row, one.row + one.shape[0]), slice(one.col, one.col + one.shape[1])
            loaded[at] = True
            filled = _filled(one, self.dtype)
            weight[at] = filled if isinstance(filled, Tensor) else dense(filled)
        if not bool(loaded.all()):
            raise InputError(
                f"{name} is {list(self.shape[-2:])} by the configuration, but the files hold only "
                f"{int(loaded.sum())} of its {loaded.numel()} weights; pack the model again"
            )
        if all(one.matrix is None or isinstance(one.matrix, Tensor) for one in pieces):
            return weight
        return _smaller(packed(weight), weight)


def _filled(piece: Piece, dtype: torch.dtype) -> Matrix | Tensor:
    """A piece's matrix in this dtype."""
    return torch.zeros(piece.shape, dtype=dtype) if piece.matrix is None else piece.matrix.to(dtype)


def _joined(pieces: list[Piece], dtype: torch.dtype) -> Matrix | Tensor:
    """Matrices below each other, packed if one is and that is smaller."""
    parts = [_filled(one, dtype) for one in pieces]
    matrices = [one for one in parts if not isinstance(one, Tensor)]
    if not matrices:
        tensors = [one for one in parts if isinstance(one, Tensor)]
        return torch.cat(tensors) if len(parts) > 1 else tensors[0].contiguous()
    for at, one in enumerate(pieces):
        if one.matrix is None:  # the rows that fill up a vocabulary
            parts[at] = empty(one.shape[0], matrices[0])
    return _smaller(stack([packed(one) if isinstance(one, Tensor) else one for one in parts]), None)


def _smaller(matrix: Matrix, weight: Tensor | None) -> Matrix | Tensor:
    """The packed matrix if it takes less space than the dense one, else that."""
    rows, cols = matrix.shape
    if matrix.nbytes < rows * cols * matrix.dtype.itemsize:
        return matrix
    return dense(matrix) if weight is None else weight


def _slice(slot: Slot, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Slot:
    if step != 1:
        raise NotImplementedError(f"a packed weight is cut in steps of {step} while it is loaded")
    dim %= slot.dim()
    first, last = bounds(slot.shape[dim], start, end)
    shape, begin = [*slot.shape], [*slot.start]
    shape[dim] = last - first
    begin[dim + 3 - slot.dim()] += first
    return slot.part(begin, shape)


def _select(slot: Slot, dim: int, index: int) -> Slot:
    if slot.dim() != 3 or dim % 3:
        raise NotImplementedError("a row of a packed weight is selected while it is loaded")
    expert = slot.start[0] + index % slot.shape[0]
    return slot.part((expert, *slot.start[1:]), slot.shape[1:])


def _put(slot: Slot, matrix: Matrix | Tensor | None, shape: Sequence[int]) -> Slot:
    if tuple(shape) != tuple(slot.shape):
        raise InputError(
            f"a weight of the model must be {list(slot.shape)} by the configuration (got {list(shape)}); do the files "
            "belong to this configuration?"
        )
    slot.keep(matrix)
    return slot


def _copy(slot: Slot, source: Tensor, non_blocking: bool = False) -> Slot:
    if slot.dim() == 3 and source.dim() == 3 and len(slot) == len(source):
        for one, other in zip(slot.unbind(), source.unbind(), strict=True):
            one.copy_(other)
        return slot
    if isinstance(source, StoredWeight):
        return _put(slot, source.matrix, source.shape)
    return _put(slot, source.detach(), source.shape)


def _fill(slot: Slot, value: float = 0) -> Slot:
    if value != 0:
        raise NotImplementedError(f"a packed weight is filled with {value} before it is loaded")
    for at in range(len(slot)) if slot.dim() == 3 else ():
        _select(slot, 0, at).keep(None)
    if slot.dim() == 2:
        slot.keep(None)
    return slot


def _to_copy(slot: Slot, *, device: torch.device | None = None, **rest: Any) -> Tensor:
    if device is None or torch.device(device).type != "meta":
        raise NotImplementedError("a packed weight is copied before it is loaded")
    return torch.empty(slot.shape, dtype=slot.dtype, device="meta")


_STEPS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda slot: slot.part(slot.start, slot.shape),
    aten.alias.default: lambda slot: slot.part(slot.start, slot.shape),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unbind.int: lambda slot, dim=0: [_select(slot, dim, at) for at in range(slot.shape[dim])],
    aten.copy_.default: _copy,
    aten.fill_.Scalar: _fill,
    aten.zero_.default: _fill,
    aten._to_copy.default: _to_copy,
}
"""What a loader may do with a slot."""
