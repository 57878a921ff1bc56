"""Training of one block's remaining weights: float32 copies, Adam, and the mask."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.healing.settings import BETAS
from ace_ext.models.blocks import Block
from ace_ext.pruning.trained_weight import TrainedWeight

STATE_BYTES = 13
"""Bytes of a trained block for each weight, in addition to the weight itself: a float32 copy, Adam's two moments, and
the mask. In addition, the best weights found so far are stored in the model's dtype, and scales of a grid
(:func:`ace_ext.pruning.on_grid.scale_bytes`)."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


class BlockTrainer:
    """The pruned matrices of one block while they are trained.

    Weights are trained in float32 and rounded to the model's dtype after each step, or to the grid that they are on.
    Where the mask is False, gradients are set to zero, so that weight and moments stay zero there.

    Each matrix has a learning rate of its own, in proportion to the root mean square of its kept weights when training
    begins; a lower one on a coarse grid (:attr:`ace_ext.pruning.trained_weight.TrainedWeight.size`).

    Args:
        block: its weights are in memory, and stay in the same tensors until training ends.
        masks: for each of ``block.linears`` ``[rows, cols]`` bool, True where a weight is kept; None: a weight is kept
            if it is not zero.
        grid: matrices that are on this grid stay on it, with the same scales, and their zeros stay zeros, also those
            that ``masks`` keeps; None: there is none.
    """

    def __init__(self, block: Block, masks: Mapping[str, Tensor] | None = None, grid: Grid | None = None) -> None:
        self.weights = {child: linear.weight for child, linear in block.linears.items()}
        if masks is None:
            masks = {child: weight != 0 for child, weight in self.weights.items()}
        for child, weight in self.weights.items():
            if masks[child].shape != weight.shape or bool(weight[~masks[child]].any()):
                raise InputError(
                    f"masks must leave out only zeros (the one of {block.full_name(child)} does not fit its weight)"
                )
        self.trained = {
            child: TrainedWeight(weight, masks[child], grid, zlib.crc32(f"{block.name}.{child}".encode()))
            for child, weight in self.weights.items()
        }
        self.masks = {child: found for child, each in self.trained.items() if (found := each.mask) is not None}
        groups = [{"params": [each.master]} for each in self.trained.values()]
        self._adam = torch.optim.Adam(groups, betas=BETAS, fused=True) if groups else None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next((weight.device for weight in self.weights.values()), torch.device("cpu"))

    @property
    def pruned(self) -> int:
        """How many weights the masks leave out."""
        return sum(int(mask.numel() - mask.count_nonzero()) for mask in self.masks.values())

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Within this context the weights require gradients."""
        for weight in self.weights.values():
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in self.weights.values():
                weight.requires_grad_(False)

    def backward(self, x: Tensor, gradients: Callable[[Sequence[Tensor]], list[Tensor | None]]) -> Tensor | None:
        """Backpropagates through the block and keeps its weights' gradients for :meth:`step_`.

        Args:
            x: the block's input, a leaf.
            gradients: gives the gradients of the loss with respect to tensors that the block's output depends on.

        Returns:
            The gradient with respect to ``x``; None if ``x`` does not require one.
        """
        found = gradients([*self.weights.values(), *([x] if x.requires_grad else [])])
        below = found.pop() if x.requires_grad else None
        for each in self.trained.values():
            each.take(found.pop(0))  # freed one by one: they and their float32 copies never exist together
        return below

    def take(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Keeps the weights' gradients for :meth:`step_`; None: a weight that the loss does not depend on."""
        for child, own in gradients.items():
            self.trained[child].take(own)

    @torch.no_grad()
    def step_(self, learning_rate: float) -> None:
        """One step of Adam with the gradients of :meth:`backward`; it frees them. The rate is that of
        the settings, see the class."""
        if self._adam is None:
            return
        for group, each in zip(self._adam.param_groups, self.trained.values(), strict=True):
            group["lr"] = learning_rate * each.size
        self._adam.step()
        self._adam.zero_grad()
        for each in self.trained.values():
            each.write_()

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        """The weights as they are now, in the model's dtype. Zeros are stored too: to pick the kept ones by a mask
        takes a CPU 40 times as long as to copy all."""
        return {child: weight.detach().clone() for child, weight in self.weights.items()}

    @torch.no_grad()
    def put_(self, best: Mapping[str, Tensor]) -> None:
        """Writes matrices of :meth:`snapshot` into the weights. A kept weight that was rounded to zero gets the
        smallest normal number of its dtype instead, with its sign, so that the zeros of the matrix are those of its
        mask. These become +0."""
        for child, weight in self.weights.items():
            values, least = best[child], torch.finfo(weight.dtype).tiny
            values = torch.where(values == 0, torch.copysign(torch.full_like(values, least), values), values)
            weight.copy_(torch.where(self.masks[child], values, 0.0))

    @torch.no_grad()
    def restart_(self, best: Mapping[str, Tensor]) -> None:
        """Continues from matrices of :meth:`snapshot`, with the optimizer's state cleared."""
        for child, each in self.trained.items():
            each.restart_(best[child])
            if self._adam is not None:
                self._adam.state.pop(each.master, None)

    def check(self, block: Block) -> None:
        """Checks that the zeros of each matrix are exactly those of its mask, and that it is on its grid.

        Raises:
            RuntimeError: it is not so, which is an error in this program.
        """
        for child, weight in self.weights.items():
            on_grid = self.trained[child].on_grid
            if not torch.equal(weight != 0, self.masks[child]):
                raise RuntimeError(f"{block.full_name(child)}: training changed which weights are zero")
            if on_grid is not None and not on_grid.holds(weight):
                raise RuntimeError(f"{block.full_name(child)}: training moved weights off their grid")

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on: vectors with the kept weights' entries, and the number of steps."""
        found = {}
        for child, each in self.trained.items():
            mask, moments = self.masks[child], self._adam.state.get(each.master, {}) if self._adam else {}
            found[f"{child}/weight"] = each.master[mask]
            found |= {f"{child}/{name}": moments[name][mask] for name in _MOMENTS if name in moments}
            found |= {f"{child}/step": moments["step"]} if "step" in moments else {}
        return found

    @torch.no_grad()
    def restore_(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to a :meth:`state`."""
        for child, each in self.trained.items():

            def spread(name: str, child: str = child, like: Tensor = each.master) -> Tensor:
                return torch.zeros_like(like).masked_scatter_(self.masks[child], state[f"{child}/{name}"])

            each.master.copy_(spread("weight"))
            each.write_()
            if self._adam is not None and f"{child}/step" in state:
                moments = {name: spread(name) for name in _MOMENTS}
                self._adam.state[each.master] = {"step": state[f"{child}/step"], **moments}
