"""Computes logits from the last block's output as the model itself does: final norm, LM head, and any factor or cap on
the logits."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.models._transformers import embedding_weight, input_embedding
from ace_ext.models.blocks import Block
from ace_ext.models.products import float32_products
from ace_ext.models.replay import replaced_forward, take_hidden


class Tail:
    """What a model does after its last block.

    The model's own forward is run on one token, with an embedding that returns zeros and blocks that return their
    input; the last one returns the given hidden states instead. So the model's family need not be known, and neither
    the embedding nor the blocks need their weights.

    Args:
        model: a causal language model; the modules after its blocks have their weights.
        blocks: its blocks.
        wrap: gives hidden states the form of a block's output; :attr:`ace_ext.models.replay.BlockCall.wrap`.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], wrap: Callable[[Tensor], object]) -> None:
        self._model, self._blocks, self._wrap = model, blocks, wrap
        self.vocabulary, self._width = embedding_weight(model).shape

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[tokens, vocabulary]`` of the last block's outputs ``[tokens, d_model]``. Differentiable."""

        def embed(ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden.new_zeros(*ids.shape, self._width)

        def skip(*args: Any, **kwargs: Any) -> object:
            return self._wrap(take_hidden(args, kwargs)[0])

        def end(*_: Any, **__: Any) -> object:
            return self._wrap(hidden[None])

        with ExitStack() as replaced:
            replaced.enter_context(replaced_forward(input_embedding(self._model), embed))
            for block in self._blocks[:-1]:
                replaced.enter_context(replaced_forward(block.module, skip))
            replaced.enter_context(replaced_forward(self._blocks[-1].module, end))
            ids = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
            replaced.enter_context(float32_products(hidden))
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits[0]
