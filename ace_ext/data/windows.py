"""From text to tokens: the windows that a model is calibrated on, and the held-out tokens that it is evaluated on.

Documents are joined by empty lines, as for published perplexities, with no EOS token between them. No chat template is
applied.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ace_ext.data.bos import BosChoice, begin_with, choose_bos, text_ids
from ace_ext.data.corpora import HELD_OUT, SELF, load_parts, load_text
from ace_ext.data.mixture import Part, samples_of
from ace_ext.data.requests import check_request, seeded_generator
from ace_ext.errors import InputError
from ace_ext.fingerprint import tokens_sha256
from ace_ext.models.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Calibration samples, and what a report says of them."""

    tokens: torch.Tensor  # int64 [nsamples, seqlen], on the CPU
    source: str
    seed: int
    sha256: str  # of the tokens: ace_ext.fingerprint.tokens_sha256
    bos: BosChoice  # whether each sample begins with the BOS token


def load_windows(
    source: str,
    tokenizer: Tokenizer,
    nsamples: int,
    seqlen: int,
    seed: int,
    *,
    model: nn.Module | None = None,
    bos: str | BosChoice = "auto",
    text_field: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
    note: Callable[[str], None] | None = None,
) -> CalibrationData:
    """Return calibration samples, int64 [nsamples, seqlen], of a source of corpora.load_text, of a mixture of
    such sources by weights (ace_ext.data.mixture), or of the model itself.

    `bos` says whether each sample begins with the BOS token: `auto`, `always`, `never`, or a choice already made. The
    token counts among the `seqlen`. `source="self"` needs `model`, the dense model. Other sources need it only if
    `auto` has to measure it (ace_ext.data.bos); without it there is a warning and no BOS token. The numbers are checked
    before anything is read. While the model writes, `progress` shows a bar on stderr; `note` gets a line about it
    first.

    Raises:
        InputError: as choose_bos, token_windows, self_generated, corpora.load_parts and mixture.samples_of.
    """
    check_request(nsamples, seqlen, seed)
    if source == SELF and model is None:
        raise InputError("text: 'self' is text that the model writes, and no model was given; pass model=")
    texts = None if source == SELF else load_parts(source, text_field, cache_dir)
    choice = bos if isinstance(bos, BosChoice) else choose_bos(bos, tokenizer, model, own_text=source == SELF)
    if not choice.decided and not isinstance(bos, BosChoice):
        warnings.warn(f"{choice}; samples get no BOS token; pass model=, or bos='always' or 'never'", stacklevel=2)
    if texts is None:
        from ace_ext.data.generate import self_generated, writing_note  # imported here: other sources do not need it

        assert model is not None  # checked above
        if note is not None:
            note(writing_note(model, nsamples, seqlen))
        tokens = self_generated(
            model, tokenizer, nsamples, seqlen, seed, bos=choice.token is not None, progress=progress
        )
    else:
        tokens = _mixed_windows(texts, tokenizer, nsamples, seqlen, seed, choice.token)
    return CalibrationData(tokens, source, int(seed), tokens_sha256(tokens), choice)


def _mixed_windows(
    texts: Sequence[tuple[Part, list[str]]],
    tokenizer: Tokenizer,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: int | None,
) -> torch.Tensor:
    """Windows of each text by its weight, in random order: int64 [nsamples, seqlen]. Of one text: as token_windows."""
    if len(texts) == 1:
        return token_windows(texts[0][1], tokenizer, nsamples, seqlen, seed, bos)
    counts = samples_of(tuple(part for part, _ in texts), nsamples)
    drawn = [
        token_windows(documents, tokenizer, count, seqlen, seed, bos)
        for (_, documents), count in zip(texts, counts, strict=True)
    ]
    # Training reads samples in their order: the texts must alternate.
    return torch.cat(drawn)[torch.randperm(nsamples, generator=seeded_generator(seed))]


def evaluation_tokens(
    source: str, tokenizer: Tokenizer, *, text_field: str = "text", cache_dir: str | os.PathLike[str] | None = None
) -> torch.Tensor:
    """Return the held-out part of a source as one row of token ids without special tokens, int64 [n].

    Raises:
        InputError: as corpora.load_text; for `self`; for a text without a token.
    """
    if source == SELF:
        raise InputError("text: 'self' is for calibration only; evaluate on wiki-mini, another source or a file")
    return _tokenize(load_text(source, HELD_OUT, text_field, cache_dir), tokenizer)


def token_windows(
    documents: Sequence[str], tokenizer: Tokenizer, nsamples: int, seqlen: int, seed: int, bos: int | None = None
) -> torch.Tensor:
    """Return windows of the documents, joined and tokenized as one text: int64 [nsamples, seqlen].

    Windows start anywhere, may overlap, and are the same for the same arguments. With `bos`, each window is this token
    followed by `seqlen - 1` tokens of text. The global random state does not change.

    Raises:
        InputError: numbers out of range, or a text shorter than one window.
    """
    check_request(nsamples, seqlen, seed)
    ids = _tokenize(documents, tokenizer)
    width = seqlen if bos is None else seqlen - 1
    if len(ids) < width:
        most = len(ids) + seqlen - width
        fit = f"use {most} or less, or give more text" if most >= 2 else "give more text"
        raise InputError(f"seqlen: {seqlen} found, but the whole text has {len(ids)} tokens; {fit}")
    starts = _starts(len(ids), width, nsamples, seed)
    return begin_with(bos, torch.stack([ids[start : start + width] for start in starts]))


def tokens_between_samples(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    seqlen: int,
    draws: Iterable[tuple[int, int]],
    bos: int | None = None,
) -> torch.Tensor:
    """Return the longest stretch of the text that no sample reads: int64 [n], empty if there is none.

    The samples are those of token_windows for each `(nsamples, seed)` of `draws` and the other arguments.
    """
    ids = _tokenize(documents, tokenizer)
    width = seqlen if bos is None else seqlen - 1
    starts = [start for nsamples, seed in draws for start in _starts(len(ids), width, nsamples, seed)]
    best, end = range(0), 0
    for start in [*sorted(starts), len(ids)]:
        best = max(best, range(end, start), key=len)
        end = max(end, start + width)
    return ids[best.start : best.stop]


def _starts(length: int, width: int, nsamples: int, seed: int) -> list[int]:
    """The first token of each sample of a text of `length` tokens."""
    # The upper bound is off by one (the last start is never drawn). Kept, because published figures use it.
    last = max(1, length - width - 1)
    starts: list[int] = torch.randint(0, last, (nsamples,), generator=seeded_generator(seed)).tolist()
    return starts


def _tokenize(documents: Sequence[str], tokenizer: Tokenizer) -> torch.Tensor:
    """Return the ids of the documents, joined by empty lines: int64 [n]."""
    if isinstance(documents, str):
        raise InputError("documents: found one string; pass a list of strings, one per document")
    ids = text_ids("\n\n".join(documents), tokenizer)
    if not ids:
        raise InputError("documents: the tokenizer found no token in the text; give a text that is not empty")
    return torch.tensor(ids, dtype=torch.int64)
