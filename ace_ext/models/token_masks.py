"""Which tokens of a batch are padding, where its hidden states enter a part of a model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext.errors import InputError
from ace_ext.models._transformers import decoder_of, frame_mask, hears_or_sees, predicts_tokens
from ace_ext.models.tower_masks import IN_TOWERS, all_used, name_in, tower_mask

MASK, DECODER_MASK = "attention_mask", "decoder_attention_mask"
_OF_PIXELS = ("pixel_mask", "padding_mask")
"""Masks that no part of a model has in its hidden states' shape."""


class TokenMasks:
    """The masks of padded tokens in a model's inputs.

    ``attention_mask`` belongs to the tokens of ``input_ids``. In a model without these it belongs to what the first
    part reads, such as samples of sound, and the model's class says which frames come from them. In a model with an
    encoder and a decoder it is the encoder's, and ``decoder_attention_mask`` the decoder's. The tower of a language
    model that sees or hears has a mask of its own, if any.

    Args:
        model: the model.
        plain: only the blocks of a causal language model are pruned; None: the model is one.
    """

    def __init__(self, model: nn.Module, plain: bool | None = None) -> None:
        self._model, self.plain = model, predicts_tokens(model) if plain is None else plain
        """Whether it is a causal language model, with one mask."""
        decoder = None if self.plain else decoder_of(model)
        names = (name for name, module in model.named_modules() if decoder is not None and module is decoder)
        self._decoder = next(names, None)

    def of(self, block: str, batch: dict[str, Tensor], hidden: Tensor) -> Tensor | None:
        """The mask of the part that begins with a block: ``[batch * seqlen]`` bool; None if no token is padding.

        Args:
            block: the name of the part's first block.
            batch: arguments of the model's call.
            hidden: ``[batch, seqlen, d_model]``, the hidden states that enter the block.

        Raises:
            InputError: the mask has another number of tokens, for example because the model adds those of an image
                itself.
        """
        name = self._name(block, batch)
        return None if name is None else self._fitted(name, batch.get(name), batch, hidden)

    def of_states(
        self, block: str, batch: dict[str, Tensor], others: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The other states that blocks of a part read, ``[batch, seqlen, d]``, such as an encoder's output, each with
        its mask. ``others``: the blocks' arguments besides the hidden states."""
        if self.plain:
            return []
        given = (value for values, named in others for value in (*values, *named.values()))
        states = {value.data_ptr(): value for value in given if _are_states(value)}
        inside, mask = self._in_decoder(block), batch.get(MASK)

        def of_text(x: Tensor) -> bool:  # BridgeTower's blocks of images also read the text
            return self._in_tower(block, batch) and mask is not None and x.shape[:2] == mask.shape

        return [(x, self._fitted(MASK, mask, batch, x) if inside or of_text(x) else None) for x in states.values()]

    def check_used(self, blocks: list[str], batch: dict[str, Tensor]) -> None:
        """Checks that some part reads each mask of a batch.

        Args:
            blocks: the names of the parts' first blocks.
            batch: arguments of the model's call.

        Raises:
            InputError: tokens are padding by a mask that belongs to no part, so they would count.
        """
        if self.plain:
            return
        used = {self._name(block, batch) for block in blocks}
        if any(map(self._in_decoder, blocks)) or all(self._in_tower(block, batch) for block in blocks):
            used.add(MASK)  # in the states that they read of another part, if at all
        for name in (MASK, DECODER_MASK, *IN_TOWERS, *_OF_PIXELS):
            if name in batch and name not in used and not all_used(name, batch[name]):
                raise InputError(
                    f"{name} {list(batch[name].shape)} fits none of the pruned parts, so its padding would count; give "
                    "batches without padding"
                )

    def _name(self, block: str, batch: dict[str, Tensor]) -> str | None:
        if self.plain:
            return MASK
        if self._in_decoder(block):
            return DECODER_MASK
        return name_in(batch, block) if self._in_tower(block, batch) else MASK

    def _in_tower(self, block: str, batch: dict[str, Tensor]) -> bool:
        return "input_ids" in batch and hears_or_sees(block)

    def _in_decoder(self, block: str) -> bool:
        return self._decoder is not None and f"{block}.".startswith(f"{self._decoder}." if self._decoder else "")

    def _fitted(self, name: str, mask: Tensor | None, batch: dict[str, Tensor], hidden: Tensor) -> Tensor | None:
        if name == MASK:
            mask = self._appended(mask, batch.get("input_ids"), hidden)
        if mask is not None and name in IN_TOWERS:
            mask = tower_mask(name, mask, hidden, getattr(self._model, "config", None))
        if mask is None or bool(mask.all()):
            return None
        if mask.shape != hidden.shape[:2] and mask.dim() == 2 and "input_ids" not in batch and hidden.dim() == 3:
            frames = frame_mask(self._model, mask, hidden.shape[1])
            mask = mask if frames is None else frames
        if mask.shape != hidden.shape[:2]:
            raise InputError(
                f"{name} must have an entry for each token that the blocks see, {list(hidden.shape[:2])} "
                f"(got {list(mask.shape)}); give batches without padding"
            )
        return mask.flatten().bool()

    def _appended(self, mask: Tensor | None, ids: Tensor | None, hidden: Tensor) -> Tensor | None:
        """The mask with the positions that the model itself appends to ``ids [batch, seqlen]``, up to a multiple of the
        window in which its tokens attend (Longformer, LED)."""
        if ids is None or ids.dim() != 2 or hidden.dim() != 3 or (mask is not None and mask.shape != ids.shape):
            return mask
        windows = getattr(getattr(self._model, "config", None), "attention_window", None)
        sizes = [windows] if isinstance(windows, int) else windows or []
        missing = hidden.shape[1] - ids.shape[1]
        if missing <= 0 or missing not in {-ids.shape[1] % size for size in sizes}:
            return mask
        return functional.pad(torch.ones_like(ids) if mask is None else mask, (0, missing))


def _are_states(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def first_tokens(shape: tuple[int, ...], mask: Tensor | None, device: torch.device) -> Tensor:
    """``[batch * seqlen]`` bool: the first token of each sample that is no padding.

    Args:
        shape: ``(batch, seqlen)``.
        mask: ``[batch * seqlen]`` bool, or None if no token is padding.
        device: of the result.
    """
    used = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.view(shape).to(device)
    return (used & (used.cumsum(dim=1) == 1)).flatten()
