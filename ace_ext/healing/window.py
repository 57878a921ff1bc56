"""A window of consecutive blocks that are trained together, and the forward and backward passes through it and the
blocks after it."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ace_ext.healing.batches import Batches
from ace_ext.healing.loss import divergence, divergence_and_gradient
from ace_ext.healing.pinned import PinnedBlocks
from ace_ext.healing.shared_states import SharedStates
from ace_ext.healing.trainer import BlockTrainer
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import BlockCall, run_block
from ace_ext.models.tail import Tail


class Window:
    """Blocks ``trainers`` are trained; the blocks after them only pass gradients on.

    A forward pass stores the input of each block. In the backward pass each block is run again, so that the activations
    of only one exist at a time (gradient checkpointing by block). Pinned blocks among the last ``graphs`` are
    exceptions: their activations are stored and not computed again. The weights of a block are updated as soon as its
    gradients are known.

    Args:
        store: the student's blocks; those of the window are pinned.
        trainers: by index of the block, consecutive.
        calls: for each batch the blocks' other arguments.
        tail: from the last block's output to logits.
        graphs: the number of last blocks whose activations are stored.
    """

    def __init__(
        self,
        store: PinnedBlocks,
        trainers: dict[int, BlockTrainer],
        calls: list[BlockCall],
        tail: Tail,
        graphs: int = 0,
    ) -> None:
        self._store, self.trainers, self._calls, self._tail = store, trainers, calls, tail
        self._indices = range(min(trainers), len(store.blocks))
        first_stored = len(store.blocks) - graphs
        self._stored = {i for i in self._indices if i >= first_stored and i in store.pinned}

    @torch.no_grad()
    def loss(self, batch: int, hidden: Tensor, teacher: Tensor) -> float:
        """The divergence of a batch, summed over its tokens.

        Args:
            batch: its index.
            hidden: ``[rows, seqlen, d_model]``, the input of the window's first block.
            teacher: the same shape, the dense model's last block's output.
        """
        for index in self._indices:
            with self._store.loaded(index) as block:
                hidden = run_block(block, hidden, self._calls[batch].others[index])
        return divergence(self._tail, hidden, teacher)

    def step_(self, batch: int, hidden: Tensor, teacher: Tensor, learning_rate: float) -> float:
        """One step of training; arguments as :meth:`loss`. Returns the divergence before the step."""
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        shared = SharedStates(self._calls[batch])
        for index in self._indices:
            inputs[index] = hidden.detach().requires_grad_(index != self._indices[0])
            with torch.set_grad_enabled(index in self._stored), self._store.loaded(index) as block:
                output = shared.run(block, index, inputs[index])
            if index in self._stored:
                outputs[index] = output
            hidden = output.detach()
        loss, gradient = divergence_and_gradient(self._tail, hidden, teacher)
        below: Tensor | None = gradient
        for index in reversed(self._indices):
            assert below is not None  # only the first block's input requires no gradient
            below = self._back(index, inputs.pop(index), outputs.pop(index, None), below, learning_rate, shared)
        shared.close()
        return loss

    def _back(
        self,
        index: int,
        x: Tensor,
        output: Tensor | None,
        gradient: Tensor,
        learning_rate: float,
        shared: SharedStates,
    ) -> Tensor | None:
        """Backpropagates through a block, and updates its weights if they are trained."""
        with self._store.loaded(index) as block:
            if output is None:
                with torch.enable_grad():
                    output = shared.run(block, index, x)
            if not output.requires_grad:  # the first block, if it has no weight to train
                return None
            trainer, gradients = self.trainers.get(index), partial(shared.gradients, index, output, gradient)
            if trainer is None:
                return gradients([x])[0]
            below = trainer.backward(x, gradients)
            trainer.step_(learning_rate)
            return below


@dataclass(frozen=True)
class Student:
    """The model that is trained, and the text with its hidden states."""

    store: PinnedBlocks
    tail: Tail
    calls: list[BlockCall]  # for each batch
    states: HiddenStates  # inputs of the window's first block
    teacher: HiddenStates  # outputs of the dense model's last block
    batches: Batches


class WindowStudent:
    """A student of which one window of blocks is trained: a :class:`ace_ext.healing.part.Trainee`.

    Args:
        student: the student.
        trainers: of the window's blocks, by the block's index.
        graphs: as for :class:`Window`.
    """

    def __init__(self, student: Student, trainers: dict[int, BlockTrainer], graphs: int) -> None:
        self._student = student
        self._window = Window(student.store, trainers, student.calls, student.tail, graphs)

    @property
    def batches(self) -> int:
        """The number of batches to train on."""
        return len(self._student.batches.trained)

    def measure(self) -> float:
        """The mean divergence of the held-out tokens."""
        student = self._student
        measured = student.batches.measured
        total = sum(self._window.loss(i, student.states[i], student.teacher[i]) for i in measured)
        return total / sum(student.batches.tokens[i].numel() for i in measured)

    def step_(self, batch: int, learning_rate: float) -> tuple[float, int]:
        """One step; the divergence before it, summed over its tokens, and their number."""
        student = self._student
        loss = self._window.step_(batch, student.states[batch], student.teacher[batch], learning_rate)
        return loss, student.batches.tokens[batch].numel()
