"""One parameter while it is trained: its float32 copy, and the mask and the grid that it keeps."""

import torch
from torch import Tensor

from ace_ext.grids import Grid
from ace_ext.pruning.on_grid import GridWeight


class TrainedWeight:
    """A weight, bias or norm in training. An optimizer changes ``master``; :meth:`write_` rounds that into ``weight``.

    Args:
        weight: the parameter.
        mask: of a matrix ``[rows, cols]`` bool, True where an entry is kept; the others must be 0. None: all are kept.
        grid: a matrix on this grid stays on it, with the same scales, and all its zeros stay zeros.
        seed: where its float32 entries begin on a grid (:meth:`~ace_ext.pruning.on_grid.GridWeight.spread_`).
    """

    def __init__(self, weight: Tensor, mask: Tensor | None = None, grid: Grid | None = None, seed: int = 0) -> None:
        self.weight, self._seed = weight, seed
        self.on_grid = GridWeight.of(grid, weight) if weight.dim() == 2 else None
        self.mask = mask if self.on_grid is None else weight != 0
        # contiguous, as gradients are: the fused Adam ignores strides, and a matrix may be stored transposed
        self.master = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(weight.detach())
        size = root_mean_square(self.master, self.mask)
        self.size = size if self.on_grid is None else size * self.on_grid.slower(size)
        """What the learning rate is a share of: :func:`root_mean_square`, less on a coarse grid
        (:data:`ace_ext.pruning.on_grid.SLOWER`)."""
        self._spread_()

    def take(self, gradient: Tensor | None) -> None:
        """Keeps a gradient, which this changes, for the optimizer. None: the loss does not depend on the weight."""
        self.master.grad = None if gradient is None else kept_gradient(gradient, self.mask)

    @torch.no_grad()
    def write_(self) -> None:
        """Writes the float32 copy into the weight, rounded to its dtype or to its grid."""
        if self.on_grid is None or self.mask is None:
            self.weight.copy_(self.master)
        else:
            self.on_grid.write_(self.weight, self.master, self.mask)

    @torch.no_grad()
    def restart_(self, values: Tensor) -> None:
        """Goes back to earlier values of the weight."""
        self.master.copy_(values)
        self._spread_()
        self.write_()

    def _spread_(self) -> None:
        if self.on_grid is not None and self.mask is not None:
            self.on_grid.spread_(self.master, self.mask, self._seed)


def root_mean_square(weight: Tensor, mask: Tensor | None = None) -> float:
    """The root mean square of the entries that the mask keeps, or of all. The other entries must be 0.

    Adam changes each weight by about the learning rate, whatever its gradient. To suit more than one model, a learning
    rate must be a share of this size: 0.19 in SmolLM2-135M, 0.04 in gemma-3-270m, 0.015 in Qwen2.5-Coder-0.5B.
    """
    kept = torch.tensor(weight.numel()) if mask is None else mask.count_nonzero()
    return float(torch.linalg.vector_norm(weight) / kept.clamp_min(1).float().sqrt())


def kept_gradient(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient in float32 and contiguous, +0 where the mask is False, also where it is not finite there. Changes
    ``gradient``.

    The bits are multiplied by 0 or 1 as integers, in place: ``masked_fill`` takes six times as long with 16 bits.
    """
    if mask is not None:
        gradient.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[gradient.itemsize]).mul_(mask)
    return gradient.float().contiguous()
