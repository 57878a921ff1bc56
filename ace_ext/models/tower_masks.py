"""Which places in the hidden states of a tower are padding, by what a language model's processor makes for it."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SOUND = re.compile(r"audio|speech")
_OF_SOUND = ("feature_attention_mask", "input_features_mask", "audio_attention_mask")
"""Masks of frames, ``[batch, frames]``."""
_POSITIONS, _TILES = "image_position_ids", "aspect_ratio_mask"
_OF_IMAGES = ("pixel_attention_mask", "image_attention_mask", _POSITIONS, _TILES)
"""Masks of pixels or patches, ``[batch, images, height, width]`` or ``[images, patches]``; positions of patches,
``[images, patches, 2]``, -1 for padding (Gemma 4); and a mask of tiles, ``[batch, images, tiles]`` (Llama 3.2)."""
IN_TOWERS = (*_OF_SOUND, *_OF_IMAGES)


def name_in(batch: Mapping[str, Any], block: str) -> str | None:
    """The input that says what is padding in a tower, by the name of its first block; None: none does."""
    names = _OF_SOUND if _SOUND.search(block) else _OF_IMAGES
    return next((name for name in names if name in batch), None)


def all_used(name: str, given: Tensor) -> bool:
    """Whether a mask, or such positions, says that nothing is padding."""
    return bool((given >= 0).all() if name == _POSITIONS else given.all())


def tower_mask(name: str, given: Tensor, hidden: Tensor, config: Any) -> Tensor | None:
    """What is no padding in ``hidden [batch, seqlen, d]``: ``[batch, seqlen]`` bool, or None if nothing is. Of another
    shape if the input does not fit. In states ``[frames, d]`` samples of sound follow one another without padding.

    Args:
        name: one of :data:`IN_TOWERS`.
        given: that input.
        hidden: the states that enter the tower's first block.
        config: the model's.
    """
    if name != _TILES and all_used(name, given):
        return None
    if name in _OF_SOUND:
        return _of_frames(given, hidden)
    if name == _POSITIONS:
        return (given >= 0).all(-1).flatten(0, -2)
    if name == _TILES:
        return _of_tiles(given, hidden.shape[1], getattr(config, "vision_config", None))
    return _of_patches(given, hidden.shape[1]) if given.dim() == 4 and hidden.dim() == 3 else given


def _of_frames(mask: Tensor, hidden: Tensor) -> Tensor:
    """For blocks that see every second frame, or so, from the first one on."""
    if mask.dim() == 2 and hidden.dim() == 2:
        lengths = mask.sum(1)
        fits = any(int((-(-lengths // step)).sum()) == len(hidden) for step in (1, 2, 4, 8))
        return torch.ones(len(hidden), dtype=torch.bool) if fits else mask
    seen = mask[..., :: max(1, -(-mask.shape[-1] // hidden.shape[1]))]
    return seen if seen.shape[-1] == hidden.shape[1] else mask


def _of_patches(mask: Tensor, seqlen: int) -> Tensor:
    """For blocks that see square patches of each image: those with a pixel count. Images without one are not there
    (Idefics 2 and 3)."""
    images = mask.flatten(0, 1).bool()
    images = images[images.flatten(1).any(1)]
    side = math.isqrt(max(1, images[0].numel() // seqlen)) if len(images) else 1
    patches = images.unfold(1, side, side).unfold(2, side, side).flatten(3).any(3)
    return patches.flatten(1)


def _of_tiles(mask: Tensor, seqlen: int, sight: Any) -> Tensor:
    """For blocks that see the tiles of an image side by side. A tile has a place for each patch, one for the class,
    and padding up to a multiple of eight."""
    tiles = mask.flatten(0, 1).bool()
    places = torch.arange(seqlen // tiles.shape[1], device=mask.device)
    used: Tensor = places <= (sight.image_size // sight.patch_size) ** 2
    return (tiles[:, :, None] & used).flatten(1)
