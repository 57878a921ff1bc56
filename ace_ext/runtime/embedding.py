"""Embeddings whose table is stored packed. Only the rows of the given tokens are unpacked."""

from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix
from ace_ext.runtime.rows import unpack_rows
from ace_ext.runtime.weight import PackedWeight, Table


class PackedEmbedding(PackedWeight, nn.Embedding):
    """``nn.Embedding`` with a packed table ``[num_embeddings, embedding_dim]``. :func:`pack_embedding_` makes one. Not
    run on a GPU."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in nn.Embedding
        """The table, which any operation on it unpacks as a whole. Shape, dtype and device are known without that.
        A compiler gets it dense, and removes it where nothing but these is used."""
        if torch.compiler.is_compiling():
            return unpack_rows(self.matrix, torch.arange(self.num_embeddings, device=self.bitmap.device))
        return Table(self.matrix)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` integer ``[...]`` to ``[..., embedding_dim]``.

        Raises:
            IndexError: a token is outside the table.
        """
        return unpack_rows(self.matrix, input)

    def __reduce__(self) -> Any:
        """Classes that :func:`pack_embedding_` makes cannot be found by name."""
        return _empty, (type(self).__mro__[1] if type(self) is not PackedEmbedding else nn.Embedding,), self.__dict__


def can_pack(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether a module is an embedding with a dense table that lookups do not change."""
    return isinstance(module, nn.Embedding) and module.max_norm is None and not isinstance(module, PackedEmbedding)


def pack_embedding_(module: nn.Embedding, matrix: PackedMatrix | QuantizedMatrix) -> None:
    """Replaces the table of an embedding by a packed one. The module keeps what its own class computes around the
    lookup, such as a factor."""
    del module._parameters["weight"]
    kind: Any = type(module)
    module.__class__ = _packed_class(kind)
    assert isinstance(module, PackedEmbedding)
    module._take(matrix)


@cache
def _packed_class(kind: Any) -> Any:
    """A class whose ``super().forward`` is that of :class:`PackedEmbedding`."""
    return PackedEmbedding if kind is nn.Embedding else type(f"Packed{kind.__name__}", (kind, PackedEmbedding), {})


def _empty(kind: Any) -> Any:
    """An object without attributes, which pickle fills."""
    found = _packed_class(kind)
    return found.__new__(found)
