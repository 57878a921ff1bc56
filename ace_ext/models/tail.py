"""Computes logits from the last block's output as the model itself does: final norm, LM head, and any factor or cap on
the logits."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import embedding_weight, input_embedding
from ace_ext.models.blocks import Block
from ace_ext.models.products import float32_products
from ace_ext.models.replay import replaced_forward, take_hidden

CLOSE = 0.01
"""Logits are taken as equal up to this share of the largest: products of other shapes may round otherwise."""


class Tail:
    """What a model does after its last block.

    The model's own forward is run on sequences of one token, one for each hidden state, with an embedding that returns
    zeros and blocks that return their input; the last one returns the given hidden states instead. So the model's
    family need not be known, and neither the embedding nor the blocks need their weights. Some classes (GPT-2) give
    what follows the blocks the shape of their input: one sequence for all hidden states would lose all but one.

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
        return self._logits(hidden[:, None])[:, 0]

    @torch.no_grad()
    def check(self, hidden: Tensor) -> None:
        """Checks with any hidden states ``[tokens, d_model]`` that logits of a token depend on its own state alone.

        Raises:
            InputError: they depend on other tokens, on the embedding or on other blocks' outputs; or there are none, or
                they are not finite.
        """
        try:
            alone = self.logits(hidden)
            others = self._logits(hidden[None])[0], self._logits(hidden[:, None], embedded=1.0)[:, 0]
        except (IndexError, RuntimeError) as error:
            raise _not_a_tail(self._model, f"its forward fails for one token: {error}") from error
        if len(alone) != len(hidden):
            raise _not_a_tail(self._model, f"{len(hidden)} tokens have the logits of {len(alone)}")
        if not torch.isfinite(alone).all():
            raise InputError(
                f"{type(self._model).__name__}: its logits hold NaN or infinity; a weight of the final norm or of the "
                f"LM head is damaged, or numbers are too large for {str(hidden.dtype).removeprefix('torch.')} (--dtype)"
            )
        for found in others:
            if found.shape != alone.shape or not torch.allclose(found, alone, atol=CLOSE * float(alone.abs().max())):
                raise _not_a_tail(self._model, "they depend on more than the last block's output for a token")

    def _logits(self, hidden: Tensor, embedded: float = 0.0) -> Tensor:
        """``[batch, seqlen, vocabulary]`` of ``[batch, seqlen, d_model]``; the embedding gives this one number."""

        def embed(ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden.new_full((*ids.shape, self._width), embedded)

        def skip(*args: Any, **kwargs: Any) -> object:
            return self._wrap(take_hidden(args, kwargs)[0])

        def end(*_: Any, **__: Any) -> object:
            return self._wrap(hidden)

        with ExitStack() as replaced:
            replaced.enter_context(replaced_forward(input_embedding(self._model), embed))
            for block in self._blocks[:-1]:
                replaced.enter_context(replaced_forward(block.module, skip))
            replaced.enter_context(replaced_forward(self._blocks[-1].module, end))
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            replaced.enter_context(float32_products(hidden))
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits


def _not_a_tail(model: nn.Module, reason: str) -> InputError:
    return InputError(
        f"{type(model).__name__} cannot be distilled: its logits cannot be computed from the last block's output alone "
        f"({reason}); use train, or leave distill out"
    )
