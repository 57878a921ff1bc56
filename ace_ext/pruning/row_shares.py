"""How several processes share the rows of a matrix, so that each prunes a part."""

from typing import Protocol

from torch import Tensor


class RowShares(Protocol):
    """The processes that share the rows of each matrix."""

    def rows(self, count: int) -> slice:
        """This process's rows of a matrix of ``count`` rows."""
        ...

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """``[count, cols]``, the same in every process, from the ``part [own rows, cols]`` of each."""
        ...

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of the ``part`` of every process, with the same bits in each."""
        ...


class AllRows:
    """:class:`RowShares` of a single process: it has all rows."""

    def rows(self, count: int) -> slice:
        """All rows."""
        return slice(0, count)

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """The part is the whole."""
        return part

    def add_up(self, part: Tensor) -> Tensor:
        """The part is the whole."""
        return part
