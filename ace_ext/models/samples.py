"""Divides the arguments of a block's call into those of some samples of the batch.

A shape does not say what belongs to a sample: ``[8, 1, seqlen]`` may be 8 samples, 4 heads of each of 2 samples
(Bloom), or 8 heads for all samples (MPT). So the model is also called with one sample: what has fewer entries then is
divided.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.models.replay import BlockCall


def one_sample(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first sample of the arguments of a model's call. A single one is whole: its image may have many rows."""
    if len(batch.get("input_ids", ())) == 1:
        return batch
    return {name: value[:1] for name, value in batch.items()}


def note_sample_shapes(calls: Sequence[BlockCall], hidden: torch.Size, single: Iterator[BlockCall]) -> None:
    """Notes in each call the shapes of the arguments of a call with one sample.

    Args:
        calls: of all batches.
        hidden: the shape of the hidden states of the first.
        single: the call with its first sample. Nothing is noted where the model cannot be called with it, as with
            images that are divided in other ways than text.

    Raises:
        InputError: the first dimension of the hidden states is that of the tokens.
    """
    call = None
    with suppress(TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, AssertionError):
        call = next(single)
    if call is None or call.hidden is None:
        return
    alone = call.hidden.shape
    if alone[0] == hidden[0] and alone[1] != hidden[1]:
        raise InputError(
            f"train divides a batch into samples, and the blocks of this model get hidden states {list(hidden)} whose "
            "first dimension is that of the tokens; leave out train"
        )
    if alone[0] == 1:
        shapes = [shapes_of(others) for others in call.others]
        for each in calls:
            each.sample_shapes = shapes


def shapes_of(value: Any) -> Any:
    """A block's arguments with the shape of each tensor in its place."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, tuple | list):
        return [shapes_of(item) for item in value]
    if isinstance(value, Mapping):
        return {key: shapes_of(item) for key, item in value.items()}
    return None


def of_samples(value: Any, batch: int, part: slice, alone: Any = None) -> Any:
    """A block's arguments for some of the samples of a batch: tensors are divided, also inside tuples, lists and dicts.

    Args:
        value: the arguments, or a part of them.
        batch: the number of samples.
        part: which of them.
        alone: what :func:`shapes_of` has for one sample. Where that is not known, tensors are divided whose first of
            several dimensions is that of the batch. One-dimensional ones then hold positions, not samples.
    """
    if isinstance(value, Tensor):
        if not isinstance(alone, torch.Size) or not alone:
            return value[part] if value.dim() > 1 and value.shape[0] == batch else value
        each = alone[0]
        return value[part.start * each : part.stop * each] if value.shape[0] == batch * each else value
    if isinstance(value, tuple | list):
        known = alone if isinstance(alone, list) and len(alone) == len(value) else [None] * len(value)
        return type(value)(of_samples(item, batch, part, one) for item, one in zip(value, known, strict=True))
    if isinstance(value, Mapping):
        named = alone if isinstance(alone, dict) else {}
        return {key: of_samples(item, batch, part, named.get(key)) for key, item in value.items()}
    return value
