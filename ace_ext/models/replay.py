"""Finds a model's blocks and prunable weights by structure, and replays block inputs without knowing the family.

A block is an element of the outermost ``nn.ModuleList`` that holds the most weight in Linears: the decoder layers. What
a block is called with (masks, rotary embeddings, whatever a family passes) is captured whole and handed back to it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.experts import through_linears


@dataclass
class BlockCall:
    """How one batch enters the blocks. ``others[i]`` are block i's arguments besides the hidden states."""

    hidden: Tensor | None  # [batch, seqlen, d_model], what enters the first block; None once taken
    others: list[tuple[tuple, dict]]
    token_mask: Tensor | None  # [batch * seqlen] bool, None where no token is padding
    tokens: int = 0  # in the batch, without padding


class _Captured(Exception):
    """Ends a forward pass once the last block was reached. Never leaves this module."""


class _Recorder:
    """Stands in for the forward of every block: notes the arguments, hands the hidden states through unchanged."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.hidden: Tensor | None = None
        self.others: list[tuple[tuple, dict]] = []
        self.wrap = None  # shapes a tensor like a block's output: as it is, or first of a tuple

    def forward_of(self, index: int, original):
        def forward(*args, **kwargs):
            hidden, rest = take_hidden(args, kwargs)
            if index == 0:
                self.hidden = hidden
            self.others.append(rest)
            if index == len(self.blocks) - 1:
                raise _Captured
            if self.wrap is None:  # what a block returns is only known once one has run
                with through_linears(self.blocks[index].experts):
                    output = original(*args, **kwargs)
                self.wrap = (lambda t: t) if isinstance(output, Tensor) else (lambda t, tail=output[1:]: (t, *tail))
            return self.wrap(hidden)

        return forward


def _restore_forward(module: nn.Module, own: Callable | None) -> None:
    """Undoes a replaced forward: the class's own comes back, or the one that stood on the instance before."""
    if own is None:
        del module.forward
    else:
        module.forward = own


def take_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple[tuple, dict]]:
    """Splits a block's arguments into its hidden states and the rest."""
    if args:
        return args[0], (args[1:], kwargs)
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
    raise InputError(f"a block must be called with its hidden states first (got {', '.join(kwargs) or 'no argument'})")


def run_block(block: Block, hidden: Tensor, others: tuple[tuple, dict]) -> Tensor:
    """One block's output hidden states, whether it returns a tensor or a tuple that starts with one."""
    with through_linears(block.experts):
        output = block.module(hidden, *others[0], **others[1])
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def capture_calls(model: nn.Module, blocks: list[Block], batches: Iterable[dict[str, Tensor]]) -> Iterator[BlockCall]:
    """Runs the model up to its blocks and yields, batch by batch, what each block would be called with, the real first
    hidden states included. The model's blocks are replaced until the last one was taken.

    The blocks themselves are stood in for, so this costs an embedding, not a forward pass.
    """
    recorder = _Recorder(blocks)
    with ExitStack() as restore:
        for index, block in enumerate(blocks):
            original = block.module.forward
            restore.callback(_restore_forward, block.module, block.module.__dict__.get("forward"))
            block.module.forward = recorder.forward_of(index, original)
        for batch in batches:
            recorder.others = []
            try:
                model(**batch, use_cache=False)
            except _Captured:
                if len(recorder.others) != len(blocks):
                    raise InputError(
                        f"the model called only {len(recorder.others)} of its {len(blocks)} blocks"
                    ) from None
                mask = batch.get("attention_mask")
                full = mask is None or bool(mask.all())
                token_mask = None if full else mask.flatten().bool()
                tokens = batch["input_ids"].numel() if full else int(token_mask.sum())
                yield BlockCall(recorder.hidden, recorder.others, token_mask, tokens)
            else:
                raise InputError(f"the model did not call its blocks, {blocks[0].name} and on, up to the last")
