"""The state of a walk: the hidden states of every calibration batch, and the arguments with which each enters the
blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ace_ext.engine.finite import NOT_FINITE, is_finite, read_at_once, refusal
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.padded_experts import run_call, without_padding
from ace_ext.models.replay import BlockCall


class BatchStates:
    """Runs the batches through blocks.

    Args:
        calls: the arguments with which each batch enters the blocks; none with statistics from a file.
        hidden: the batches' hidden states before the current block; None with statistics from a file.
        device: where blocks are run.
    """

    def __init__(self, calls: Sequence[BlockCall], hidden: HiddenStates | None, device: torch.device) -> None:
        self.calls, self.device = calls, device
        self._hidden = hidden
        self.settle: Callable[[], None] = lambda: None
        """Waits until states that are replaced have reached the disk."""
        self._finite: list[Tensor] = []

    def take(self, calls: Sequence[BlockCall], hidden: HiddenStates) -> None:
        """Goes on with other calls and hidden states: those of another part of the model."""
        self.calls, self._hidden = calls, hidden

    @property
    def hidden(self) -> HiddenStates:
        """The batches' hidden states before the current block."""
        assert self._hidden is not None  # a walk with statistics from a file never reads them
        return self._hidden

    @property
    def layout(self) -> dict[str, object] | None:
        """The layout of the hidden states, as plain values; None without any."""
        return None if self._hidden is None else vars(self._hidden.layout)

    @property
    def tokens(self) -> int:
        """Calibration tokens of this process, without padding."""
        return sum(call.tokens for call in self.calls)

    def advance(self, block: Block, index: int) -> None:
        """Runs every batch through the block with its present weights; the outputs become the next block's inputs."""
        with without_padding(block):
            for i, call in enumerate(self.calls):
                with self.naming(block, index, i):
                    output = run_call(block, self.hidden[i], call, index)
                self.put(block, index, i, output)
        self.check_outputs(block)

    def put(
        self,
        block: Block,
        index: int,
        i: int,
        output: Tensor,
        *,
        hidden: HiddenStates | None = None,
        given: Tensor | None = None,
    ) -> None:
        """Makes a block's output for batch ``i`` the next block's input. Once all are put, :meth:`check_outputs` is to
        be called.

        Args:
            block: the block.
            index: its place among the blocks.
            i: the batch.
            output: ``[batch, seqlen, d_model]``.
            hidden: other hidden states than the walk's.
            given: the block's input; default: that of ``hidden``.

        Raises:
            InputError: as :meth:`check_outputs`, on the CPU, where the flag can be read without waiting. The message
                then also names the module whose output is not finite.
        """
        self.settle()  # the states that are replaced may be on their way to the disk
        hidden, call = hidden or self.hidden, self.calls[i]
        finite = is_finite(output, call.token_mask)
        if read_at_once(finite) and not bool(finite):
            raise refusal(block, NOT_FINITE, (hidden[i] if given is None else given, call.others[index]))
        self._finite.append(finite)
        hidden.put(i, output)

    def check_outputs(self, block: Block) -> None:
        """Checks the outputs that were put: one read of a GPU for all batches.

        Raises:
            InputError: one of them holds NaN or infinity in a token that is not padding.
        """
        finite, self._finite = self._finite, []
        if finite and not bool(torch.stack(finite).all()):
            raise refusal(block, NOT_FINITE)

    @contextmanager
    def naming(self, block: Block, index: int, i: int, hidden: HiddenStates | None = None) -> Iterator[None]:
        """Within this context an op that refuses what a Linear of the block gets from batch ``i`` raises
        :class:`InputError`, which names the module whose output is not finite."""
        try:
            yield
        except InputError:
            raise
        except ValueError as error:
            raise refusal(block, f"{error}", ((hidden or self.hidden)[i], self.calls[i].others[index])) from error
