"""Checks of the arguments for calibration samples, and the random generator of a seed."""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import output_head, predicts_tokens, text_config, token_embedding
from ace_ext.process_memory import available_bytes

BYTES_OF_A_SAMPLE = 200
"""Approximate memory of a sample while it is drawn, without its tokens."""


def seeded_generator(seed: int) -> torch.Generator:
    """A separate CPU generator; torch's global random state is not changed."""
    return torch.Generator().manual_seed(int(seed))


def sample_count(batches: Iterable[Mapping[str, torch.Tensor]]) -> int:
    """The samples in batches of a model's inputs, which have them on the first axis. Images of a language model may
    have their parts there."""
    return sum(len(batch.get("input_ids", next(iter(batch.values())))) for batch in batches)


def check_request(nsamples: int, seqlen: int, seed: int) -> None:
    """Checks the number of samples, the tokens of each, and the seed.

    Raises:
        InputError: one is not a whole number, or is out of range.
    """
    check_int("nsamples", nsamples, 1)
    check_int("seqlen", seqlen, 2, "; a window of one token attends to nothing but itself and predicts nothing")
    check_int("seed", seed, 0)
    if seed >= 2**63:
        raise InputError(f"seed: {str(seed)[:100]} found; use a whole number from 0 to 2**63 - 1")
    needed = nsamples * (8 * seqlen + BYTES_OF_A_SAMPLE)
    if needed > available_bytes():
        raise InputError(
            f"nsamples: {_short(nsamples)} samples of {_short(seqlen)} tokens do not fit in memory; lower one of them"
        )


def check_int(name: str, value: int, least: int, why: str = "") -> None:
    """Raises :class:`InputError` unless a value is a whole number of at least ``least``; ``why`` ends the message."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}: {_short(value)} found; use a whole number of at least {least}{why}")


def check_positions(model: nn.Module, seqlen: int) -> None:
    """Raises :class:`InputError` if a model has fewer positions than ``seqlen``. Some models would raise an index
    error, and others would use positions that they were not trained on."""
    positions = positions_of(model)
    if positions is not None and seqlen > positions:
        raise InputError(
            f"seqlen: {_short(seqlen)} found, but the model has {positions} positions; use {positions} or less"
        )


def positions_of(model: nn.Module) -> int | None:
    """How many positions a model has, as :func:`positions_in`."""
    return positions_in(text_config(model))


def positions_in(settings: Any) -> int | None:
    """How many positions a configuration of a language part gives. None if it gives no number, or one below 1: XLNet
    has no limit and gives -1."""
    positions = getattr(settings, "max_position_embeddings", None) or getattr(settings, "max_target_positions", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def check_predicts(model: nn.Module, what: str) -> None:
    """Raises :class:`InputError` for a model without an LM head, such as a classifier, and for one that consists of
    encoders, or of an encoder and a decoder. ``what`` ends the message: what needs predictions, and what to do."""
    if output_head(model) is None:
        raise InputError(f"model: {type(model).__name__} has no LM head, so it predicts no token; {what}")
    if not predicts_tokens(model):
        raise InputError(
            f"model: {type(model).__name__} is an encoder or has one, so it does not predict the next token; {what}"
        )


def check_tokens(model: nn.Module, tokens: torch.Tensor) -> None:
    """Raises :class:`InputError` for tokens, of any shape, that a model's embedding does not know."""
    check_data("tokens", tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        found = str(tokens.dtype).removeprefix("torch.")
        raise InputError(f"tokens: {found} found; use ids in int64 or int32, as a tokenizer returns them")
    known = vocabulary_of(model)
    if known is not None and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < known:
        raise InputError(
            f"tokens: ids from {int(tokens.min())} to {int(tokens.max())} found, but the model knows those from 0 to "
            f"{known - 1}; use the tokenizer that belongs to the model"
        )


def check_data(name: str, tensor: torch.Tensor) -> None:
    """Raises :class:`InputError` for a tensor whose values cannot be read: on the meta device, or sparse."""
    if tensor.is_meta or tensor.layout != torch.strided:
        found = "on the meta device, without data" if tensor.is_meta else str(tensor.layout)
        raise InputError(f"{name} must be an ordinary tensor with data (got one that is {found})")


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids a model knows. None for a model that does not say which of its embeddings are those of tokens,
    such as one of text and images."""
    embedding = token_embedding(model)
    if embedding is None or (not isinstance(embedding, nn.Embedding) and not predicts_tokens(model)):
        return None
    return len(embedding.weight)  # type: ignore[arg-type]  # a tensor in every class of embedding


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
