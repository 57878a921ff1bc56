"""Training of each pruned block on the calibration tokens with fixed masks (:mod:`ace_ext.pruning.block_training`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ace_ext.grids import Grid
from ace_ext.models.blocks import Block
from ace_ext.pruning.block_training import Others, Training, train_block_
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import BlockSizes, TrainBlock
from ace_ext.records import Tuning


@dataclass(frozen=True)
class Train(TrainBlock):
    """Trains each pruned block towards the dense one's output."""

    name = "train"
    summary = "trains each pruned block towards the dense one's output; masks stay fixed"

    epochs: int = option(3, "passes over the calibration tokens", Limits(at_least=1))
    learning_rate: float = option(
        1e-2,
        "initial learning rate, a share of each parameter's root mean square; it falls linearly to zero",
        Limits(above=0, words="more than 0"),
    )
    step_tokens: int = option(
        512, "tokens of a gradient step, rounded down to whole samples; at least one", Limits(at_least=1)
    )
    held_out: float = option(
        0.0625,
        "share of the samples that are only measured: the weights with the lowest loss on them are kept; 0: measures "
        "those that it trains on",
        Limits(at_least=0, below=1, words="a share of at least 0 and less than 1"),
    )

    def train_(
        self,
        block: Block,
        inputs: Sequence[tuple[Tensor, Others]],
        targets: Sequence[Tensor],
        masks: dict[str, Tensor],
        token_masks: Sequence[Tensor | None],
        grid: Grid | None = None,
        sample_shapes: Any = None,
    ) -> Tuning:
        """:func:`ace_ext.pruning.block_training.train_block_` with these options."""
        given = block, inputs, targets, masks, token_masks
        return train_block_(*given, training=self._training, grid=grid, sample_shapes=sample_shapes)

    def step_samples(self, seqlen: int) -> int:
        """:meth:`ace_ext.pruning.block_training.Training.step_samples` with these options."""
        return self._training.step_samples(seqlen)

    @property
    def _training(self) -> Training:
        return Training(self.epochs, self.learning_rate, self.step_tokens, self.held_out)

    def working_bytes(self, sizes: BlockSizes) -> int:
        """For each trained entry: the weight and Adam's two moments in float32, a copy in the model's dtype, and the
        mask. For the largest matrix: the temporaries of Adam or the backward pass.

        The larger of two is added: gradients in the model's dtype and the activations of a step, or gradients in
        float32.
        """
        state = sizes.trained * (13 + sizes.itemsize) + 12 * sizes.largest
        return state + max(sizes.trained * sizes.itemsize + sizes.activations, 4 * sizes.trained)


STAGE = Train
