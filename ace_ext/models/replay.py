"""Records the arguments with which a model calls its blocks, and calls a block with them again.

All arguments (masks, rotary embeddings and others) are kept unchanged, so the model family need not be known.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.blocks import Block

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's positional and keyword arguments besides its hidden states."""


@dataclass
class BlockCall:
    """How one batch enters the blocks. ``others[i]`` are block i's arguments besides the hidden states."""

    hidden: Tensor | None  # [batch, seqlen, d_model], the input of the first block; the user sets it to None once read
    others: list[Arguments]
    token_mask: Tensor | None  # [batch * seqlen] bool, None if no token is padding
    tokens: int = 0  # in the batch, without padding
    wrap: Callable[[Tensor], object] = lambda hidden: hidden  # gives hidden states the form of a block's output


class _Captured(Exception):
    """Ends a forward pass when it reaches the last block. Never leaves this file."""


class _Recorder:
    """Replaces the forward of every block: records the arguments, returns the hidden states unchanged."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.hidden: Tensor | None = None
        self.others: list[Arguments] = []
        # Gives a tensor the form of a block's output: the tensor itself, or a tuple that starts with it.
        self.wrap: Callable[[Tensor], object] | None = None

    def forward_of(self, index: int, original: Callable[..., Any]) -> Callable[..., object]:
        """The forward that replaces ``original``, that of block ``index``."""

        def forward(*args: Any, **kwargs: Any) -> object:
            hidden, rest = take_hidden(args, kwargs)
            if index == 0:
                _check_hidden(self.blocks[0].name, hidden)
                self.hidden = hidden
            self.others.append(rest)
            if self.wrap is None:  # the form of a block's output is known only after one has run
                with self.blocks[index].products():
                    self.wrap = _wrapper_like(original(*args, **kwargs))
            if index == len(self.blocks) - 1:
                raise _Captured
            return self.wrap(hidden)

        return forward


def _check_hidden(block: str, hidden: Tensor) -> None:
    if hidden.dim() != 3:
        raise InputError(
            f"{block} is called with hidden states {list(hidden.shape)}, not [batch, seqlen, d_model]; such a model "
            "cannot be pruned"
        )


def _wrapper_like(output: Any) -> Callable[[Tensor], object]:
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    tail = output[1:]  # not the whole output: it would keep its hidden states in memory
    return lambda hidden: (hidden, *tail)


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
def capture_calls(model: nn.Module, blocks: list[Block], batches: Iterable[dict[str, Tensor]]) -> Iterator[BlockCall]:
    """Yields for each batch the arguments of each block's call, and the hidden states that enter the first block.

    The blocks' forwards are replaced until the generator ends, so a batch costs one embedding instead of a forward
    pass. One block runs with the first batch, to find the form of its output.

    Raises:
        InputError: the model does not call each of its blocks once, in order, or calls them with hidden states of
            another form than ``[batch, seqlen, d_model]``.
    """
    recorder = _Recorder(blocks)
    with ExitStack() as restore:
        for index, block in enumerate(blocks):
            restore.enter_context(replaced_forward(block.module, recorder.forward_of(index, block.module.forward)))
        for batch in batches:
            recorder.others = []
            try:
                model(**batch, use_cache=False)
            except _Captured:
                if len(recorder.others) != len(blocks):
                    raise InputError(
                        f"the model called only {len(recorder.others)} of its {len(blocks)} blocks"
                    ) from None
                assert recorder.hidden is not None  # both set by the first block
                assert recorder.wrap is not None
                token_mask = _token_mask(batch.get("attention_mask"), recorder.hidden)
                tokens = recorder.hidden.shape[:2].numel() if token_mask is None else int(token_mask.sum())
                yield BlockCall(recorder.hidden, recorder.others, token_mask, tokens, recorder.wrap)
            else:
                raise InputError(f"the model did not call all its blocks from {blocks[0].name} to the last")


def _token_mask(attention_mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """``[batch, seqlen]`` to ``[batch * seqlen]`` bool; None if no token is padding. ``hidden [batch, seqlen,
    d_model]`` enters the first block.

    Raises:
        InputError: the mask has another number of tokens, for example because the model adds those of an image itself.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.shape != hidden.shape[:2]:
        raise InputError(
            f"attention_mask must have an entry for each token that the blocks see, {list(hidden.shape[:2])} "
            f"(got {list(attention_mask.shape)}); give batches without padding"
        )
    return attention_mask.flatten().bool()
