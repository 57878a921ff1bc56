"""Training of a matrix whose weights stay on a grid: float32 weights are rounded to it after each step.

Gradients of the rounded weights are applied to the float32 ones (straight-through estimator, arXiv 1308.3432).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext.grids import AT_ONCE, Grid

SPREAD = 0.9999
"""The share of the distance between two points of the grid over which float32 weights are spread when training begins.
Less than 1, so that none of them lies on the border to the next point."""

SLOWER = 0.08
"""The learning rate of a matrix is multiplied by this number times its root mean square weight in steps of the grid, if
that is less than 1. A weight that moves by a share of a step changes its code with this probability, by a whole step.
The variance of such changes, relative to the weights, is the weights' movement times the size of a step. With 4 bits
and half of the weights pruned the factor is 0.3, and with 8 bits 1. SmolLM2-135M's first four blocks, 50 % and 4 bits,
12,288 tokens in 48 steps: without this factor the held-out loss rose from 0.27 to 0.41 in six steps; with 0.3 in its
place it then fell to 0.21."""

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

    def slower(self, size: float) -> float:
        """The factor of the learning rate; ``size``: the root mean square of the kept weights. See :data:`SLOWER`."""
        found = self.scales[self.scales != 0]
        return min(1.0, SLOWER * size / float(found.float().abs().mean())) if len(found) else 1.0

    @torch.no_grad()
    def spread_(self, master: Tensor, mask: Tensor, seed: int) -> None:
        """Moves kept weights of ``master [rows, cols]`` float32 away from the points of the grid that they are on: each
        to a random place that still rounds to the same point.

        What rounded to a point came from around it. If all weights began at their points, none would change until some
        had moved by half the distance to the next point, and then many would at once.
        """
        draw = torch.Generator().manual_seed(seed)
        height = max(1, IN_CACHE // max(1, master.shape[1]))
        for start in range(0, len(master), height):
            rows = slice(start, start + height)
            places = torch.rand(master[rows].shape, generator=draw).sub_(0.5).mul_(SPREAD).to(master.device)
            places += self.grid.nearest(master[rows], self.scales[rows]).float()  # a point may be rounded in its dtype
            places *= self.grid.widened(self.scales[rows].float(), master.shape[1])
            master[rows] = places.masked_fill_(~mask[rows], 0.0)

    @torch.no_grad()
    def write_(self, weight: Tensor, master: Tensor, mask: Tensor) -> None:
        """Writes ``master [rows, cols]`` float32, rounded to the grid, into ``weight``.

        A kept weight whose nearest code is 0 gets code 1 or -1 by its sign: the zeros of the matrix are those of its
        mask.
        """
        for rows in _parts(weight):
            codes, scales = self.grid.nearest(master[rows], self.scales[rows]), self.scales[rows]
            away = 1 - 2 * (self.grid.widened(scales, weight.shape[1]) * master[rows] < 0).to(codes.dtype)
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
