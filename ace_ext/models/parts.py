"""The parts of a model with several lists of blocks: its blocks in the order in which a forward calls them, cut where
the hidden states of one do not come from the one before. Examples are an encoder and a decoder, the towers of text and
images, and stages of different widths.

A part is a range of blocks, ``[start, stop)``, that can be walked block by block.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import main_input, plain_call, predicts_tokens
from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.models.call_errors import explained
from ace_ext.models.handed_on import Equality, compare_arguments, differ, passed_on
from ace_ext.models.replay import (
    NOT_ENTERED,
    Arguments,
    BlockCall,
    capture_calls,
    first_of,
    replaced_forward,
    run_block,
    take_hidden,
    token_count,
)
from ace_ext.models.run_mode import evaluating, in_dtype_of
from ace_ext.models.samples import one_sample
from ace_ext.models.whole_forward import blocks_held

MOST = 32
"""A model of more parts is not walked: each costs a forward up to it."""


def list_of(block: Block) -> str:
    """The name of the list that holds a block."""
    return block.name.rpartition(".")[0]


def check_removable(model: nn.Module, blocks: list[Block]) -> None:
    """Raises :class:`InputError` for a model from which structures cannot be removed, because it has several lists of
    blocks or reads no text."""
    several = len(set(map(list_of, blocks))) > 1
    if not predicts_tokens(model) and (several or main_input(model) != "input_ids"):
        raise InputError(
            f"remove takes models of text with one list of blocks (got {type(model).__name__}); leave it out"
        )


@torch.no_grad()
def most_tokens(model: nn.Module, names: Iterable[str], batch: dict[str, Tensor]) -> int:
    """The most tokens of a sample that leave one of the blocks ``names``, by a call with the batch's first sample. With
    a skeleton shapes are followed and nothing is computed, up to the first operation that needs values: a decoder may
    look at its mask, but the encoder before it has the longer samples. 0: no block was reached.

    Raises:
        InputError: the model cannot be called with the batch.
    """
    follows = all(parameter.is_meta for parameter in model.parameters())
    if follows:
        model = copy.deepcopy(model).to("meta")
    device = next(model.parameters()).device
    found: list[int] = []
    with ExitStack() as hooks:
        for name in names:
            block = model.get_submodule(name)
            count = block.register_forward_hook(lambda m, _, output: found.append(token_count(m, first_of(output))))
            hooks.callback(count.remove)
        hooks.enter_context(evaluating(model))
        hooks.enter_context(explained(model, batch))
        hooks.enter_context(suppress(RuntimeError) if follows else nullcontext())
        first = {name: value.to(device) for name, value in one_sample(in_dtype_of(model, batch)).items()}
        model(**first, **plain_call(model))
    return max(found, default=0)


@torch.no_grad()
def entered(
    model: nn.Module, store: BlockSource, part: range, batches: Iterable[dict[str, Tensor]]
) -> Iterator[BlockCall]:
    """Yields for each batch the arguments with which it enters a part; blocks before it run with the weights that the
    store has now. Only the blocks that run have their weights in memory.

    Raises:
        InputError: as :func:`ace_ext.models.replay.capture_calls`.
    """
    with store.outside_held(model), blocks_held(store, part), store.loaded(part.start):
        yield from capture_calls(model, store.blocks, batches, part, given=True)


@dataclass(frozen=True)
class Called:
    """A call of a block in a forward of its model."""

    block: str
    given: Tensor | None  # the hidden states; None if it is not called with any
    others: Arguments
    output: Tensor


class Recording:
    """The calls of all blocks in one forward of a model.

    Args:
        model: in evaluation mode.
        store: its blocks.
        batch: arguments of the call.
    """

    def __init__(self, model: nn.Module, store: BlockSource, batch: dict[str, Tensor]) -> None:
        self.calls: list[Called] = []
        self.uses: dict[str, Counter[str]] = {}
        """How often each Linear was called, by block."""
        self.named: list[object] = []
        """The values of the blocks' arguments by name."""
        with ExitStack() as stack:
            for block in store.blocks:
                uses = self.uses.setdefault(block.name, Counter())
                for child, linear in block.linears.items():
                    handle = linear.register_forward_pre_hook(lambda *_, uses=uses, child=child: uses.update([child]))
                    stack.callback(handle.remove)
            for block in store.blocks:
                stack.enter_context(replaced_forward(block.module, self._noting(block)))
            called_whole(model, store, batch)

    def _noting(self, block: Block) -> Callable[..., Any]:
        original = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                given, others = take_hidden(args, kwargs)
            except InputError:
                given, others = None, NOT_ENTERED
            self.named += kwargs.values()
            output = original(*args, **kwargs)
            self.calls.append(Called(block.name, given, others, first_of(output)))
            return output

        return forward


def called_whole(model: nn.Module, store: BlockSource, batch: dict[str, Tensor]) -> None:
    """Calls a model, whose weights may be on the disk."""
    with blocks_held(store), store.outside_held(model):
        model(**batch, **plain_call(model))


def parts_of(recording: Recording, store: BlockSource) -> tuple[list[range], str | None]:
    """The parts of a model, and why it cannot be walked, in words. Brings the blocks of ``store`` into the order of the
    calls.

    Raises:
        InputError: the calls reach none of a list's blocks.
    """
    counts = Counter(call.block for call in recording.calls)
    missed = [block for block in store.blocks if not counts[block.name]]
    for block in missed:
        others = [other for other in store.blocks if list_of(other) == list_of(block)]
        if all(not counts[other.name] for other in others):
            raise InputError(
                f"these inputs do not reach the blocks of {list_of(block)}; give inputs that do, or leave it dense: "
                f"skip={list_of(block)!r}"
            )
    if missed:
        return [], f"it does not call {missed[0].name}"
    again = next((name for name, count in counts.items() if count > 1), None)
    if again is not None:
        return [], f"it calls {again} {counts[again]} times"
    by_name = {block.name: block for block in store.blocks}
    store.blocks[:] = [by_name[call.block] for call in recording.calls]
    parts, start = [], 0
    for index in range(1, len(store.blocks) + 1):
        if index == len(store.blocks) or not _follows(recording.calls, store.blocks, index):
            parts.append(range(start, index))
            start = index
    if len(parts) > MOST:
        return [], f"its lists of blocks take turns, in {len(parts)} parts"
    return parts, None


def _follows(calls: list[Called], blocks: list[Block], index: int) -> bool:
    """Whether block ``index`` continues the part of the one before: in the same list, and its hidden states have the
    shape of that one's output."""
    before, given = calls[index - 1].output, calls[index].given
    same = list_of(blocks[index]) == list_of(blocks[index - 1])
    return same and given is not None and before.shape == given.shape


def tried_parts(
    model: nn.Module,
    store: BlockSource,
    batch: dict[str, Tensor],
    recording: Recording,
    parts: list[range],
) -> str | None:
    """Walks each part, and compares the result with a forward's. Returns why it cannot be walked, in words."""
    for part in parts:
        name = store.blocks[part.start].name
        more = f"its blocks from {name} on read more than the output of the one before"
        try:
            (call,) = entered(model, store, part, [batch])
            hidden = call.hidden
            assert hidden is not None  # just captured
            for index in part:
                if compare_arguments(call.others[index], recording.calls[index].others) is not Equality.YES:
                    return more
                with store.loaded(index) as block:
                    if index == part.start and passed_on(block, call, hidden, index) is not Equality.YES:
                        return more
                    hidden = run_block(block, hidden, call.others[index])
        except Exception as error:  # a block that lacks an input can raise anything
            return f"its blocks from {name} on need more than the output of the one before ({type(error).__name__})"
        if differ(hidden, recording.calls[part.stop - 1].output):
            return more
    return None
