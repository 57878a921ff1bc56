"""From text to token windows: what a model is calibrated on and evaluated on."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from .errors import InputError
from .texts import CALIBRATION, HELD_OUT, SELF, load_text


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Token windows, and what a report needs to name them."""

    tokens: torch.Tensor  # int64 [nsamples, seqlen], on the CPU
    source: str
    seed: int
    sha256: str  # see tokens_sha256


def load_windows(
    source: str,
    tokenizer,
    nsamples: int,
    seqlen: int,
    seed: int,
    *,
    model=None,
    text_field: str = "text",
    cache_dir: str | os.PathLike | None = None,
) -> CalibrationData:
    """Return calibration windows, int64 [nsamples, seqlen], of a source of texts.load_text or of the model itself.

    `source="self"` needs `model`; the other sources ignore it. Raises InputError as token_windows, self_generated and
    texts.load_text do; the numbers are checked before anything is read.
    """
    _check_request(nsamples, seqlen, seed)
    if source == SELF:
        if model is None:
            raise InputError("source: 'self' is text the model writes, and no model was given; pass model=")
        tokens = self_generated(model, tokenizer, nsamples, seqlen, seed)
    else:
        documents = load_text(source, CALIBRATION, text_field, cache_dir)
        tokens = token_windows(documents, tokenizer, nsamples, seqlen, seed)
    return CalibrationData(tokens, source, int(seed), tokens_sha256(tokens))


def evaluation_tokens(
    source: str, tokenizer, *, text_field: str = "text", cache_dir: str | os.PathLike | None = None
) -> torch.Tensor:
    """Return the held-out part of a source as one row of token ids, int64 [n].

    Raises InputError as texts.load_text does, for `self`, and for a text without a token.
    """
    if source == SELF:
        raise InputError("source: 'self' is for calibration only; evaluate on wiki-mini, another source or a file")
    return _tokenize(load_text(source, HELD_OUT, text_field, cache_dir), tokenizer)


def token_windows(documents: Sequence[str], tokenizer, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Return windows of the documents, joined and tokenized as one text: int64 [nsamples, seqlen].

    Windows start anywhere, may overlap, and are the same for the same arguments. The global random state is untouched.
    Raises InputError for numbers out of range and for a text shorter than one window.
    """
    _check_request(nsamples, seqlen, seed)
    ids = _tokenize(documents, tokenizer)
    if len(ids) < seqlen:
        fit = f"use {len(ids)} or less, or give more text" if len(ids) >= 2 else "give more text"
        raise InputError(f"seqlen: {seqlen} found, but the whole text has {len(ids)} tokens; {fit}")
    # One start less than there are, where there are several: published figures were drawn so.
    starts = torch.randint(0, max(1, len(ids) - seqlen - 1), (nsamples,), generator=_generator(seed))
    return torch.stack([ids[start : start + seqlen] for start in starts.tolist()])


def self_generated(
    model, tokenizer, nsamples: int, seqlen: int, seed: int, temperature: float = 1.0, batch_size: int = 16
) -> torch.Tensor:
    """Return text that the model writes: int64 [nsamples, seqlen], on the CPU.

    Each row starts with the tokenizer's BOS token (else its EOS, else a random token) and is sampled from the model's
    own distribution to the full length, past any EOS. One random number is drawn for each token beforehand, so a seed
    gives the same text whatever the batch size or the device (up to rounding in the model's logits). The global random
    state is untouched, and so are the modules' training modes.
    Raises InputError for numbers out of range, more tokens than the model has positions for, a start token that the
    model does not know, and logits that are not finite.
    """
    _check_request(nsamples, seqlen, seed)
    _check_int("batch_size", batch_size, 1)
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature: {temperature!r} found; use a finite number above 0 (1 is the model's own)")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise InputError(f"seqlen: {seqlen} found, but the model has {positions} positions; use {positions} or less")

    generator = _generator(seed)
    first = _first_tokens(model, tokenizer, nsamples, generator)
    draws = torch.rand(nsamples, seqlen - 1, dtype=torch.float64, generator=generator)
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would change the text and draw from the global random state
    try:
        rows = [
            _write(model, first[i : i + batch_size], draws[i : i + batch_size], temperature)
            for i in range(0, nsamples, batch_size)
        ]
    finally:
        for module in training:
            module.training = True
    return torch.cat(rows)


def tokens_sha256(tokens: torch.Tensor) -> str:
    """Return the SHA-256, in hex, of a token tensor of any shape: its shape, then its ids, as little-endian int64."""
    digest = hashlib.sha256(torch.tensor(tokens.shape).numpy().astype("<i8").tobytes())
    digest.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _tokenize(documents: Sequence[str], tokenizer) -> torch.Tensor:
    """Return the ids of the documents, joined by empty lines: int64 [n]."""
    if isinstance(documents, str):
        raise InputError("documents: found one string; pass a list of strings, one a document")
    ids = tokenizer("\n\n".join(documents), verbose=False)["input_ids"]  # else it warns of a text so long
    if not ids:
        raise InputError("documents: the tokenizer found no token in the text; give a text that is not empty")
    return torch.tensor(ids, dtype=torch.int64)


def _first_tokens(model, tokenizer, nsamples: int, generator: torch.Generator) -> torch.Tensor:
    """Return the token each row starts with, int64 [nsamples]."""
    known = model.get_input_embeddings().weight.shape[0]
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            if start >= known:
                raise InputError(
                    f"tokenizer: its first token has id {start}, but the model knows ids below {known}; "
                    "pass the tokenizer that belongs to the model"
                )
            return torch.full((nsamples,), start)
    return torch.randint(0, min(known, len(tokenizer)), (nsamples,), generator=generator)


@torch.no_grad()
def _write(model, first: torch.Tensor, draws: torch.Tensor, temperature: float) -> torch.Tensor:
    """Continue each row's first token [rows] by one token a draw [rows, n], uniform in [0, 1): int64 [rows, n + 1]."""
    draws = draws.to(model.device)
    tokens = first[:, None].to(model.device)
    news, past = tokens, {}
    finite = torch.ones((), dtype=torch.bool, device=model.device)
    for draw in draws.split(1, dim=1):
        output = model(input_ids=news, use_cache=True, **past)
        # float64: in float32 the running sum over a large vocabulary would swallow its rare tokens.
        logits = output.logits[:, -1].to(model.device, torch.float64)
        probabilities = torch.softmax(logits / temperature, dim=-1)
        running = probabilities.cumsum(dim=-1)
        total = running[:, -1:]
        finite &= total.isfinite().all()
        # right=True skips tokens of probability 0; the clamp is for a product rounded up to the total, and for NaN.
        news = torch.searchsorted(running, draw * total, right=True).clamp_(max=running.shape[1] - 1)
        tokens = torch.cat([tokens, news], dim=1)
        past = _past(output)
        if not past:
            news = tokens  # a model that returns no cache reads the whole row again
    if not finite:
        raise InputError("model: its logits hold NaN or infinity, so it cannot write text; use another source")
    return tokens.cpu()


def _past(output) -> dict:
    """Return the keyword under which the next call takes the model's cache, or nothing without one."""
    for name in ("cache", "past_key_values"):  # its name today, and its name in older transformers
        if getattr(output, name, None) is not None:
            return {name: getattr(output, name)}
    return {}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


def _check_request(nsamples: int, seqlen: int, seed: int) -> None:
    _check_int("nsamples", nsamples, 1)
    _check_int("seqlen", seqlen, 2, "; a window of one token attends to nothing but itself and predicts nothing")
    _check_int("seed", seed, 0)
    if seed >= 2**63:
        raise InputError(f"seed: {seed} found; use a whole number from 0 to 2**63 - 1")


def _check_int(name: str, value: int, least: int, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}: {value!r} found; use a whole number of at least {least}{why}")
