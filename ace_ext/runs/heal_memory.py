"""The memory that a distillation will need, from shapes alone, and how it is divided to stay within a limit."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ace_ext.engine.model_shape import ModelShape
from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.healing.context import windows_of
from ace_ext.healing.loss import LOGIT_BYTES, tokens_at_once
from ace_ext.healing.trainer import STATE_BYTES
from ace_ext.models.blocks import Block
from ace_ext.pruning.on_grid import scale_bytes, working_bytes
from ace_ext.runs.memory_model import Estimate


@dataclass(frozen=True)
class Division:
    """What is in memory together. Fields are as in :class:`ace_ext.healing.context.HealContext`. In addition,
    ``states`` says whether hidden states are in memory."""

    parts: int = 1
    resident: bool = True
    states: bool = True
    graphs: int = 0


@dataclass(frozen=True)
class Trained:
    """The pruned matrices of a model."""

    weights: Sequence[int]  # for each block
    grid: Grid | None = None  # that they are on
    largest: int = 0  # weights of the largest matrix


@dataclass(frozen=True)
class HealDemand:
    """The memory that a distillation needs, by phase and division."""

    shape: ModelShape
    trained: Trained
    tokens: int  # of all windows of text
    seqlen: int
    step: int  # tokens of a step
    dense: int = 0  # bytes of loading the dense model whole; 0: one block at a time is read

    @classmethod
    def of(
        cls,
        model: nn.Module,
        blocks: list[Block],
        tokens: list[Tensor],
        dense: int = 0,
        grid: Grid | None = None,
    ) -> "HealDemand":
        """The demand of a pruned model, or of its skeleton.

        Args:
            model: the model.
            blocks: its blocks.
            tokens: the batches of text, each ``[windows, seqlen]``; the first is as large as a step.
            dense: bytes of loading the dense model, if it must be loaded whole.
            grid: the grid that the pruned matrices are on; None: there is none.
        """
        sizes = [[linear.weight.numel() for linear in block.linears.values()] for block in blocks]
        return cls(
            ModelShape.of(model, blocks),
            Trained([sum(size) for size in sizes], grid, max((max(size, default=0) for size in sizes), default=0)),
            tokens=sum(batch.numel() for batch in tokens),
            seqlen=tokens[0].shape[1],
            step=tokens[0].numel(),
            dense=dense,
        )

    def divide(self, budget: int, process: int, parts: int | None = None) -> tuple[Division, Estimate]:
        """The division that trains the most blocks together within ``budget`` bytes, and what it needs at its peak.

        Args:
            budget: bytes of the whole process.
            process: bytes that the process uses besides the run.
            parts: the number of windows of the run that is resumed; None: any.

        Raises:
            InputError: not even one block at a time fits.
        """
        for division in self._divisions(parts):
            if self.peak(division, process).total <= budget:
                more = next(
                    graphs
                    for graphs in range(len(self.trained.weights) if division.resident else 0, -1, -1)
                    if self.peak(replace(division, graphs=graphs), process).total <= budget
                )
                division = replace(division, graphs=more)
                return division, self.peak(division, process)
        least = self.peak(division, process)  # the last is the smallest
        raise InputError(
            f"max-memory must be at least {math.ceil(least.total / 1e6)}MB here (got {budget / 1e6:.0f}MB): "
            f"{least.describe()}; lower --step-tokens"
        )

    def _divisions(self, parts: int | None) -> Iterator[Division]:
        """All divisions, starting with the one that needs most memory."""
        blocks = len(self.trained.weights)
        for count in range(1, blocks + 1) if parts is None else [parts]:
            for resident in (True, False):
                for states in (True, False):
                    yield Division(count, resident, states)

    def peak(self, division: Division, process: int) -> Estimate:
        """The estimate of the largest phase."""
        phases = [self._entering(division), self._running(division), self._training(division)]
        return max((replace(phase, process=process) for phase in phases), key=lambda phase: phase.total)

    @property
    def _states(self) -> int:
        return self.tokens * self.shape.hidden * self.shape.itemsize

    def _entering(self, division: Division) -> Estimate:
        """Text enters the blocks of the dense model, or of the pruned one if the dense model's states are known."""
        forward = self.shape.forward_bytes(self.step, self.seqlen, frozenset())
        hidden = 2 * self._states if division.states else 0
        model = max(self.shape.blocks) + self.shape.embedding
        return Estimate(model=model, hidden=hidden, forward=forward, phase="enter")

    def _running(self, division: Division) -> Estimate:
        forward = self.shape.forward_bytes(self.step, self.seqlen, frozenset())
        hidden = self._states if division.states else 0
        model = self.dense or max(self.shape.blocks)
        return Estimate(model=model, hidden=hidden, forward=forward, phase="dense model")

    def _training(self, division: Division) -> Estimate:
        """A step of training.

        Outside the blocks only the weights of the head are needed. The head may be the embedding.
        """
        shape, itemsize = self.shape, self.shape.itemsize
        largest = max(
            windows_of(len(self.trained.weights), division.parts),
            key=lambda window: sum(self.trained.weights[i] for i in window),
        )
        weights = sum(self.trained.weights[i] for i in largest)
        block = max(self.trained.weights)
        model = sum(shape.blocks) if division.resident else sum(shape.blocks[i] for i in largest) + max(shape.blocks)
        activations = shape.training_bytes(self.step, self.seqlen)
        inputs = len(self.trained.weights) * self.step * shape.hidden * itemsize
        together = min(self.step, tokens_at_once(shape.vocabulary))
        logits = LOGIT_BYTES * shape.vocabulary * together + shape.converted_head_bytes(together)
        # Adam's gradients of one block in float32, and in the model's dtype; or while saving, a block's packed state.
        gradients = block * (4 + 2 * itemsize) + working_bytes(self.trained.grid, self.trained.largest)
        state = STATE_BYTES + scale_bytes(self.trained.grid, itemsize) + itemsize
        return Estimate(
            model=model + (shape.head or shape.embedding),
            hidden=2 * self._states if division.states else 2 * self.step * shape.hidden * itemsize,
            forward=inputs + activations * max(1, division.graphs) + logits,
            training=int(weights * state) + gradients,
            phase="train",
        )
