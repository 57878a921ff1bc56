"""Mixtures of experts in padded batches: experts compute the tokens that are not padding, so that their statistics are
of these. The other Linears of a block read all tokens in order, and a mask says which of them count; an expert reads
some of them, and not their places."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import BlockCall, replaced_forward, run_block
from ace_ext.models.token_masks import DECODER_MASK, MASK

_MASK: ContextVar[Tensor | None] = ContextVar("mask", default=None)
"""Of the forward that runs in this context, ``[tokens]`` bool; None: no token is padding. Each paused forward has its
own context."""


def set_padding_(mask: Tensor | None) -> None:
    """Changes the padding of the forward that runs within :func:`padding`."""
    _MASK.set(mask)


@contextmanager
def padding(mask: Tensor | None) -> Iterator[None]:
    """Within this context forwards have the padding of this mask, ``[tokens]`` bool; None: none."""
    before = _MASK.set(mask)
    try:
        yield
    finally:
        _MASK.reset(before)


def run_call(block: Block, hidden: Tensor, call: BlockCall, index: int) -> Tensor:
    """:func:`ace_ext.models.replay.run_block` with the arguments and the padding of a batch's call."""
    with padding(call.token_mask):
        return run_block(block, hidden, call.others[index])


@contextmanager
def without_padding(block: Block) -> Iterator[None]:
    """Within this context the experts of a block leave padding out in :func:`padding`: their output is 0 there."""
    with ExitStack() as stack:
        for owner in {id(fused.owner): fused.owner for fused in block.experts}.values():
            forward = partial(_of_real_tokens, block.name, owner.forward)
            stack.enter_context(replaced_forward(owner, forward))
        yield


def check_padding(blocks: Sequence[Block], batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Checks that no batch has padding if experts of a block cannot leave it out.

    Raises:
        InputError: they cannot, because they are modules in a list, each called with the rows that are its own.
    """
    listed = next((block.name for block in blocks if block.expert_lists), None)
    masks = (batch[name] for batch in batches for name in (MASK, DECODER_MASK) if name in batch)
    if listed is not None and not all(bool(mask.all()) for mask in masks):
        raise _refusal(listed)


def try_padding(store: BlockSource, calls: Sequence[BlockCall], hidden: HiddenStates) -> None:
    """Runs the first block with experts on the first batch with padding.

    Raises:
        InputError: its experts cannot leave padding out.
    """
    padded = next((i for i, call in enumerate(calls) if call.token_mask is not None), None)
    index = next((index for index, block in enumerate(store.blocks) if block.experts), None)
    if padded is None or index is None:
        return
    with store.loaded(index) as block, without_padding(block):
        run_call(block, hidden[padded], calls[padded], index)


def _refusal(block: str) -> InputError:
    return InputError(
        f"padding would count in the experts of {block}: its class does not say which tokens they read; give batches "
        "without padding, such as one sample each"
    )


def _of_real_tokens(block: str, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a block's experts, ``hidden [..., d]`` and what the router says of each token."""
    mask = _MASK.get()
    if mask is None:
        return forward(hidden, *args, **kwargs)
    mask, shape = mask.to(hidden.device), hidden.shape  # a block may be on another GPU than the first
    if len(mask) != shape[:-1].numel():
        raise _refusal(block)

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape[: len(shape) - 1] == shape[:-1]:
            chosen = value.reshape(len(mask), *value.shape[len(shape) - 1 :])[mask]
            return chosen.view(*[1] * (len(shape) - 2), *chosen.shape)
        return value[mask] if len(value) == len(mask) else value

    found = forward(real(hidden), *map(real, args), **{name: real(value) for name, value in kwargs.items()})
    if not isinstance(found, Tensor) or found.numel() != int(mask.sum()) * shape[-1]:
        raise _refusal(block)
    output = found.new_zeros(len(mask), shape[-1])
    output[mask] = found.reshape(-1, shape[-1])
    return output.view(shape)
