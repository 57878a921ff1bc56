"""A packed weight that acts as its dense tensor, so that an engine's own loaders can handle it.

A loader renames weights, takes a part of the rows or columns for its rank, and copies the part into a parameter.
:class:`StoredWeight` stays packed through these steps, and becomes dense for any other operation. So every loader
works, and one that only renames and cuts never makes a dense weight.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ace_ext.packed.files import PackedShards
from ace_ext.runtime.packed_tensor import PackedTensor
from ace_ext.serving.matrices import cut_columns, cut_rows, stack

aten = torch.ops.aten


class StoredWeight(PackedTensor):
    """A packed weight that a loader cuts and views; other operations unpack it."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Cuts and views of a weight stay packed; other operations get the dense tensor."""
        if not all(issubclass(kind, StoredWeight) for kind in types):
            return NotImplemented  # the other type knows this one
        step = _STEPS.get(func)
        if step is not None and isinstance(args[0], StoredWeight):
            found = step(*args, **(kwargs or {}))
            if found is not None:
                return found
        return super().__torch_dispatch__(func, types, args, kwargs)


def weights_of(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a packed folder by name, of any format; the packed ones as :class:`StoredWeight`.

    Raises:
        InputError: the folder is not packed, or damaged; sizes, counts and bitmaps are checked.
    """
    shards = PackedShards(folder)
    for name, entry in shards.entries.items():
        found = shards.load(name)
        yield name, found if isinstance(found, Tensor) else StoredWeight(found, entry.shape)


def check(folder: str | Path) -> None:
    """Checks a packed folder before a server starts: headers, sizes, counts and bitmaps; the survivors are not read.

    Of compressed files, which are read as a whole when they are loaded, only the headers are checked.

    Raises:
        InputError: the folder is not packed, or damaged.
    """
    for file in PackedShards(folder).packed:
        for name in () if file.codec.compresses else file.dense.entries:
            file.load(name)


def bounds(size: int, start: int | None, stop: int | None) -> tuple[int, int]:
    """The first and the last index + 1 of a slice of ``size`` elements, as Python takes them."""
    first, last, _ = slice(start, stop).indices(size)
    return first, max(first, last)


def _slice(
    weight: StoredWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> StoredWeight | None:
    dim %= weight.dim()
    first, last = bounds(weight.shape[dim], start, end)
    if step != 1 or weight.dim() > 3:
        return None
    shape = [*weight.shape]
    shape[dim] = last - first
    if dim == weight.dim() - 1:
        return StoredWeight(cut_columns(weight.matrix, first, last), shape)
    inner = math.prod(weight.shape[dim + 1 : -1])
    outer = math.prod(weight.shape[:dim])
    step = weight.shape[dim] * inner
    parts = [cut_rows(weight.matrix, at * step + first * inner, at * step + last * inner) for at in range(outer)]
    return StoredWeight(stack(parts), shape) if parts else None


def _select(weight: StoredWeight, dim: int, index: int) -> StoredWeight | None:
    if weight.dim() != 3 or dim % 3:
        return None
    found = _slice(weight, 0, index, index + 1 or None)
    return None if found is None else StoredWeight(found.matrix, weight.shape[1:])


def _split(weight: StoredWeight, size: int, dim: int = 0) -> list[StoredWeight | None]:
    return [_slice(weight, dim, at, at + size) for at in range(0, weight.shape[dim], size)]


def _unbind(weight: StoredWeight, dim: int = 0) -> list[StoredWeight | None] | None:
    return None if weight.dim() != 3 or dim % 3 else [_select(weight, 0, at) for at in range(len(weight))]


def _view(weight: StoredWeight, shape: Sequence[int]) -> StoredWeight | None:
    wanted = [*shape]
    if -1 in wanted:
        wanted[wanted.index(-1)] = weight.numel() // max(1, -math.prod(wanted))
    return StoredWeight(weight.matrix, wanted) if len(wanted) > 1 and wanted[-1] == weight.shape[-1] else None


def _unsqueeze(weight: StoredWeight, dim: int) -> StoredWeight | None:
    return StoredWeight(weight.matrix, (1, *weight.shape)) if dim == 0 else None


def _to_copy(weight: StoredWeight, *, dtype: torch.dtype | None = None, **rest: Any) -> StoredWeight | None:
    if dtype is None or any(value is not None and value is not False for value in rest.values()):
        return None
    return StoredWeight(weight.matrix.to(dtype), weight.shape)


_STEPS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda weight: StoredWeight(weight.matrix, weight.shape),
    aten.alias.default: lambda weight: StoredWeight(weight.matrix, weight.shape),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.unbind.int: _unbind,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.unsqueeze.default: _unsqueeze,
    aten._to_copy.default: _to_copy,
}
"""What keeps a weight packed; a step returns None where it cannot."""
