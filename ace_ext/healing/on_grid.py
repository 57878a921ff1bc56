"""Training of a matrix whose weights stay on a grid: float32 weights are rounded to it after each step.

Gradients of the rounded weights are applied to the float32 ones (straight-through estimator, arXiv 1308.3432).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext.grids import AT_ONCE, Grid

STEP_SHARE = 32.0
"""A matrix on a grid is trained with a learning rate that is a share of its root mean square weight or of this number
times the mean distance of two points of the grid, whichever is larger. With 8 bits both are about the same. With fewer
bits a share of the weights alone would not reach the next point within a run."""

IN_CACHE = 2**18
"""Entries that are rounded together on a CPU. With more, temporaries leave the cache: rounding takes up to six times as
long."""

WORKING_BYTES = 24
"""Bytes for each entry of the rows whose scales are recovered together. Rounding takes less."""


def scale_bytes(grid: Grid | None, itemsize: int) -> float:
    """Bytes of the scales for each weight, in a dtype of ``itemsize`` bytes; 0 without a grid."""
    return 0.0 if grid is None else itemsize / grid.group


def working_bytes(grid: Grid | None, largest: int) -> int:
    """Bytes of temporaries, with matrices of at most ``largest`` entries; 0 without a grid."""
    return 0 if grid is None else WORKING_BYTES * min(largest, 2 * AT_ONCE)


@dataclass(frozen=True)
class GridWeight:
    """The grid of one matrix. Its scales do not change."""

    grid: Grid
    scales: Tensor  # [rows, groups] in the model's dtype

    @classmethod
    def of(cls, grid: Grid | None, weight: Tensor) -> "GridWeight | None":
        """The grid of ``weight [rows, cols]``, with its scales recovered; None if it is on no such grid."""
        found = None if grid is None else grid.recover(weight)
        return None if grid is None or found is None else cls(grid, found.scales)

    @property
    def step(self) -> float:
        """The mean distance of neighbouring points, over the groups that are not zeros."""
        found = self.scales[self.scales != 0]
        return float(found.float().mean()) if len(found) else 0.0

    @torch.no_grad()
    def write_(self, weight: Tensor, master: Tensor, mask: Tensor) -> None:
        """Writes ``master [rows, cols]`` float32, rounded to the grid, into ``weight``.

        A kept weight whose nearest code is 0 gets code 1 or -1 by its sign: the zeros of the matrix are those of its
        mask.
        """
        for rows in _parts(weight):
            codes, scales = self.grid.nearest(master[rows], self.scales[rows]), self.scales[rows]
            away = 1 - 2 * (master[rows] < 0).to(codes.dtype)
            codes = torch.where((codes == 0).logical_and_(mask[rows]), away, codes)
            weight[rows] = self.grid.dequantize(codes, scales)

    def holds(self, weight: Tensor) -> bool:
        """Whether every entry of ``weight [rows, cols]`` is a point of the grid."""
        return all(torch.equal(self._rounded(weight[rows], self.scales[rows]), weight[rows]) for rows in _parts(weight))

    def _rounded(self, weight: Tensor, scales: Tensor) -> Tensor:
        return self.grid.dequantize(self.grid.nearest(weight, scales), scales)


def _parts(weight: Tensor) -> Iterator[slice]:
    """The rows of a matrix in parts."""
    height = max(1, (IN_CACHE if weight.device.type == "cpu" else AT_ONCE) // max(1, weight.shape[1]))
    for start in range(0, len(weight), height):
        yield slice(start, start + height)
