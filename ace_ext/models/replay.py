"""Records the arguments with which a model calls its blocks, and calls a block with them again.

All arguments (masks, rotary embeddings and others) are kept unchanged, so the model family need not be known.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import plain_call
from ace_ext.models.blocks import Block
from ace_ext.models.call_errors import explained
from ace_ext.models.token_masks import TokenMasks, first_tokens

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's positional and keyword arguments besides its hidden states."""

NOT_ENTERED: Arguments = ((), {})
"""In place of the arguments of a block in another part of the model."""


@dataclass
class BlockCall:
    """How one batch enters the blocks. ``others[i]`` are block i's arguments besides the hidden states; of blocks that
    do not belong to the part of the model that was entered, empty ones."""

    hidden: Tensor | None  # [batch, seqlen, d_model], the input of the first block; the user sets it to None once read
    others: list[Arguments]
    token_mask: Tensor | None  # [batch * seqlen] bool, None if no token is padding
    tokens: int = 0  # in the batch, without padding
    wrap: Callable[[Tensor], object] = lambda hidden: hidden  # gives hidden states the form of a block's output
    states: Sequence[tuple[Tensor, Tensor | None]] = ()  # an encoder's output, and its mask as token_mask
    sample_shapes: Sequence[Any] | None = None  # of others with one sample (models/samples.py); None: not known
    starts: Tensor | None = None  # [batch * seqlen] bool: a causal language model's first token of each sample
    samples: int | None = None  # in the batch; None: not known


class _Captured(Exception):
    """Ends a forward pass when it reaches the last block. Never leaves this file."""


class _Recorder:
    """Replaces the forward of every block of a part: records the arguments, returns the hidden states unchanged."""

    def __init__(self, blocks: list[Block], text: bool) -> None:
        self.blocks, self._text = blocks, text
        self.hidden: Tensor | None = None
        self.others: list[Arguments] = []
        # Gives a tensor the form of a block's output: the tensor itself, or a tuple that starts with it.
        self.wrap: Callable[[Tensor], object] | None = None

    def begin(self) -> None:
        """To be called before a batch. A form that holds tensors, such as a bias of attention, is that of one batch."""
        self.others = []
        if self.wrap is not None and _holds_tensors(self.wrap):
            self.wrap = None

    def forward_of(self, index: int, original: Callable[..., Any]) -> Callable[..., object]:
        """The forward that replaces ``original``, that of block ``index``."""

        def forward(*args: Any, **kwargs: Any) -> object:
            hidden, rest = take_hidden(args, kwargs)
            if index == 0:
                _check_hidden(self.blocks[0].name, hidden, self._text)
                self.hidden = hidden
            self.others.append(rest)
            if self.wrap is None:  # the form of a block's output is known only after one has run
                with self.blocks[index].products():
                    self.wrap = _wrapper_like(original(*args, **kwargs))
            if index == len(self.blocks) - 1:
                raise _Captured
            return self.wrap(hidden)

        return forward


def _check_hidden(block: str, hidden: Tensor, text: bool) -> None:
    """Checks the hidden states that enter a block; those of images may have more dimensions than those of ``text``."""
    if hidden.dim() < 3 or (text and hidden.dim() > 3):
        raise InputError(
            f"{block} is called with hidden states {list(hidden.shape)}, not [batch, seqlen, d_model]; such a model "
            "cannot be pruned"
        )


def _plain(hidden: Tensor) -> object:
    return hidden


def _with_tail(tail: tuple[Any, ...], hidden: Tensor) -> object:
    return (hidden, *tail)


def _wrapper_like(output: Any) -> Callable[[Tensor], object]:
    # not the whole output: it would keep its hidden states in memory
    return _plain if isinstance(output, Tensor) else partial(_with_tail, output[1:])


def _holds_tensors(wrap: Callable[[Tensor], object]) -> bool:
    return isinstance(wrap, partial) and any(isinstance(value, Tensor) for value in wrap.args[0])


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context calling the module calls ``forward``; its hooks run as before."""
    own = module.__dict__.get("forward")  # None: the class's
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def with_products(block: Block) -> Callable[..., Any]:
    """The block's forward, in which products with its matrices are calls of its Linears (:meth:`Block.products`)."""
    original = block.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with block.products():
            return original(*args, **kwargs)

    return forward


def take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """Splits a block's arguments into its hidden states ``[batch, seqlen, d_model]`` and the rest.

    Raises:
        InputError: the block is not called with hidden states, as the first argument or by name.
    """
    if args:
        return args[0], (args[1:], kwargs)
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
    raise InputError(f"a block must be called with its hidden states first (got {', '.join(kwargs) or 'no argument'})")


def run_block(block: Block, hidden: Tensor, others: Arguments) -> Tensor:
    """One block's output hidden states ``[batch, seqlen, d_model]``, also of a block that returns a tuple."""
    with block.products():
        output = block.module(hidden, *others[0], **others[1])
    return first_of(output)


def first_of(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


class _Seen(Exception):
    """Ends a forward once all needed calls were seen. Never leaves this file."""


def run_until_called(block: Block, hidden: Tensor, others: Arguments, children: Iterable[str]) -> None:
    """Runs one block until each of the named Linears was called, with its hooks, and then stops. If one of them is not
    called, such as an expert's, the block runs to its end."""
    waiting = set(children)

    def called(child: str) -> None:
        waiting.discard(child)
        if not waiting:
            raise _Seen

    with ExitStack() as hooks:
        for child in tuple(waiting):
            handle = block.linears[child].register_forward_hook(lambda *_, child=child: called(child))
            hooks.callback(handle.remove)
        with suppress(_Seen):
            run_block(block, hidden, others)


@torch.no_grad()
def capture_calls(
    model: nn.Module,
    blocks: list[Block],
    batches: Iterable[dict[str, Tensor]],
    part: range | None = None,
    *,
    given: bool = False,
) -> Iterator[BlockCall]:
    """Yields for each batch the arguments of each block's call, and the hidden states that enter the first block.

    The blocks' forwards are replaced until the generator ends, so a batch costs one embedding instead of a forward
    pass. One block runs with the first batch, to find the form of its output; with every batch if that form holds
    tensors.

    Args:
        model: the model.
        blocks: its blocks.
        batches: arguments of its calls.
        part: only these blocks are entered; earlier ones of other parts run as they are. None: all blocks.
        given: the batches are a caller's; what the model raises for one is then an error about it.

    Raises:
        InputError: the model does not call each of the blocks once, in order, or calls them with hidden states of
            fewer dimensions than ``[batch, seqlen, d_model]``; or a given batch does not suit it.
    """
    masks = TokenMasks(model, None if part is None else False)
    part = part or range(len(blocks))
    recorder, options = _Recorder(blocks[part.start : part.stop], masks.plain), plain_call(model)
    with ExitStack() as restore:
        for index, block in enumerate(recorder.blocks):
            restore.enter_context(replaced_forward(block.module, recorder.forward_of(index, block.module.forward)))
        for batch in batches:
            recorder.begin()
            try:
                with explained(model, batch) if given else nullcontext():
                    model(**batch, **options)
            except _Captured:
                if len(recorder.others) != len(part):
                    raise InputError(
                        f"the model called only {len(recorder.others)} of its {len(part)} blocks"
                    ) from None
                yield _call_of(recorder, masks, batch, part)
            else:
                raise InputError(f"the model did not call all its blocks from {recorder.blocks[0].name} to the last")


def first_states(captured: Iterable[BlockCall], calls: list[BlockCall]) -> Iterator[Tensor]:
    """The hidden states with which the batches enter, one after the other. ``calls`` gets the calls, without them."""
    for call in captured:
        hidden, call.hidden = call.hidden, None
        assert hidden is not None  # just captured
        calls.append(call)
        yield hidden


def _call_of(recorder: _Recorder, masks: TokenMasks, batch: dict[str, Tensor], part: range) -> BlockCall:
    """The call of a batch that reached the last block of the part."""
    first, hidden = recorder.blocks[0], recorder.hidden
    assert hidden is not None  # both set by the first block
    assert recorder.wrap is not None
    mask = masks.of(first.name, batch, hidden)
    tokens = token_count(first.module, hidden) if mask is None else int(mask.sum())
    states = masks.of_states(first.name, batch, recorder.others)
    others = [*([NOT_ENTERED] * part.start), *recorder.others]
    starts = first_tokens(hidden.shape[:2], mask, hidden.device) if masks.plain and hidden.dim() == 3 else None
    return BlockCall(hidden, others, mask, tokens, recorder.wrap, states, starts=starts, samples=hidden.shape[0])


def token_count(block: nn.Module, hidden: Tensor) -> int:
    """The number of tokens in hidden states."""
    return hidden.numel() // hidden.shape[channel_dim(block, hidden)]


def channel_dim(block: nn.Module, hidden: Tensor) -> int:
    """Which dimension of hidden states has their channels: the last, or that with the size of a block's first vector of
    weights, as in ``[batch, channels, height, width]``."""
    width = next((len(p) for p in block.parameters() if p.dim() == 1), hidden.shape[-1])
    if hidden.dim() == 3 or hidden.shape[-1] == width or width not in hidden.shape[1:]:
        return hidden.dim() - 1
    return list(hidden.shape).index(width, 1)


def token_rows(block: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states as ``[batch, tokens, channels]``; those of fewer dimensions as they are."""
    return hidden if hidden.dim() <= 3 else hidden.movedim(channel_dim(block, hidden), -1).flatten(1, -2)
