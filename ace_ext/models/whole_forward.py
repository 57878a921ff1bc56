"""A forward pass of a whole model whose blocks may be on the disk, with one part of it in memory at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError, one_line
from ace_ext.models.block_store import BlockSource
from ace_ext.models.products import float32_products
from ace_ext.models.replay import replaced_forward


@torch.no_grad()
def whole_logits(model: nn.Module, blocks: BlockSource, tokens: Tensor, device: torch.device) -> Tensor:
    """The logits ``[batch, seqlen, vocabulary]`` of ``tokens [batch, seqlen]``, int64.

    A model in memory and the same model on the disk run the same code on the same shapes, so they give the same bits.

    Raises:
        InputError: the model does not take tokens alone.
    """
    with blocks_held(blocks), blocks.outside_loaded(model), float32_products(model), takes_tokens(model):
        logits: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits


@contextmanager
def takes_tokens(model: nn.Module) -> Iterator[None]:
    """Within this context the errors that classes raise for a call with tokens alone are an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{type(model).__name__} does not take tokens alone ({one_line(error)}); a draft model that reads another "
            "model's states is not pruned: give the other model"
        ) from error


@contextmanager
def blocks_held(blocks: BlockSource, left_out: range = range(0)) -> Iterator[None]:
    """Within this context the blocks have their weights in memory while they run, except those of ``left_out``."""
    with ExitStack() as stack:
        for index, block in enumerate(blocks.blocks):
            if index not in left_out:
                stack.enter_context(replaced_forward(block.module, _holding(blocks, index)))
        yield


def _holding(blocks: BlockSource, index: int) -> Callable[..., Any]:
    """The forward of a block, with its weights in memory while it runs."""
    original = blocks.blocks[index].module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with blocks.loaded(index) as block, block.products():
            return original(*args, **kwargs)

    return forward
