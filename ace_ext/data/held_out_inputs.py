"""Held-out inputs of networks that are no causal language models, and their answers before and after pruning."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.data.agreement import Answers, Inputs, agreement, answers, word_error_rate, words
from ace_ext.data.bos import begin_with
from ace_ext.data.media import load_processor, media_batches
from ace_ext.data.media_items import media_items
from ace_ext.data.requests import check_tokens, positions_of
from ace_ext.errors import InputError
from ace_ext.models._transformers import decoder_of, main_input
from ace_ext.models.run_mode import evaluating, in_dtype_of
from ace_ext.models.token_masks import MASK
from ace_ext.records import Agreement

BATCH, MEASURED = 8, 2
"""Samples that go through the model together: of text or of a calibration, and of images or sound that are measured on.
With 8 clips of Whisper base the measurement took 0.57 GB more than pruning, with 2 clips 0.13 GB."""
LEAST = 3
"""Samples without which there is no rank correlation."""
TRANSCRIBED, TRANSCRIPT_TOKENS = 16, 128
"""Upper bounds for the samples that are transcribed, and for the tokens of a transcript."""
PROMPT_TOKENS = 4
"""At most so many tokens begin a transcript: the first one, a language, a task, and that there are no times."""


@dataclass(frozen=True, eq=False)
class HeldOutInputs:
    """Inputs that calibration does not read."""

    source: str
    """Where they are from, in words."""
    batches: Sequence[Inputs]
    texts: Sequence[str | None] = ()
    """What is said in each sample, where that is known; empty for inputs that are text."""
    processor: Any = None
    """Of the model; None for inputs that are text."""
    languages: Sequence[str | None] = ()
    """Of the texts, where they are named."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a model answers, and what it writes of what it hears or sees; no transcripts of a model that writes none."""

    answers: Answers
    transcripts: tuple[str, ...] = ()


def text_samples(model: nn.Module, windows: Tensor, batch: int = BATCH) -> list[dict[str, Tensor]]:
    """Windows of text, int64 ``[samples, seqlen]``, as inputs of a model, ``batch`` samples together. A model with an
    encoder and a decoder reads the halves of each."""
    parts = torch.split(windows, batch)
    if decoder_of(model) is None:
        return [{"input_ids": part} for part in parts]
    half = windows.shape[1] // 2
    return [{"input_ids": part[:, :half], "decoder_input_ids": part[:, half:]} for part in parts]


def text_windows(
    model: nn.Module, ids: Tensor, token: int | None, seqlen: int, most: int, place: tuple[str, str]
) -> Tensor:
    """Windows of a text for a model, int64 ``[windows, tokens]``: of ``seqlen`` tokens, or as many as it has positions.

    Args:
        model: it is not called.
        ids: of the text, int64 ``[n]``.
        token: with which each window begins; None: with the text.
        seqlen: tokens of a window, that one included.
        most: windows at most.
        place: the argument that names the text, and the text's name, for an error.

    Raises:
        InputError: there are fewer than :data:`LEAST` windows, or ids that the model does not know.
    """
    width = min(seqlen, positions_of(model) or seqlen) - (token is not None)
    count = min(most, len(ids) // width)
    if count < LEAST:
        raise InputError(
            f"{place[0]}: {place[1]} gives {count} windows of {width} tokens, and agreement needs {LEAST}; give more "
            "text, or more or shorter windows"
        )
    windows = begin_with(token, ids[: count * width].view(count, width))
    check_tokens(model, windows)
    return windows


def media_samples(
    source: str, folder: str, model: nn.Module, nsamples: int, seed: int = 0, after: int = 0, batch: int = MEASURED
) -> HeldOutInputs:
    """Images or sound, with their texts: ``nsamples`` at most, ``after`` so many that calibration draws by ``seed``, in
    batches of ``batch``.

    Args:
        source: a folder or a `.jsonl` file.
        folder: the model's, with its processor's files.
        model: its forward says which inputs it takes. It is not called.

    Raises:
        InputError: as :func:`ace_ext.data.media.media_batches`.
    """
    processor = load_processor(folder)
    read = media_batches(source, processor, model, nsamples, batch, seed, after)
    batches = [in_dtype_of(model, inputs) for inputs in read]
    items = media_items(source, nsamples, seed, after).items
    return HeldOutInputs(source, batches, [item.text for item in items], processor, [item.language for item in items])


def measure(model: nn.Module, inputs: HeldOutInputs) -> Measured:
    """What the model makes of the inputs. Its weights do not change."""
    return Measured(answers(model, inputs.batches), _transcripts(model, inputs))


@torch.no_grad()
def _transcripts(model: nn.Module, inputs: HeldOutInputs) -> tuple[str, ...]:
    """The texts that a model with a decoder writes of the first :data:`TRANSCRIBED` samples."""
    tokenizer, main = getattr(inputs.processor, "tokenizer", None), main_input(model)
    generate: Any = getattr(model, "generate", None)
    decoder = decoder_of(model)
    if tokenizer is None or decoder is None or generate is None:
        return ()
    device = next(model.parameters()).device
    found: list[str] = []
    most = (positions_of(decoder) or PROMPT_TOKENS + TRANSCRIPT_TOKENS) - PROMPT_TOKENS
    options: dict[str, Any] = {"max_new_tokens": max(1, min(TRANSCRIPT_TOKENS, most)), "do_sample": False}
    with evaluating(model):
        for batch in inputs.batches:
            if len(found) >= TRANSCRIBED:
                break
            languages = list(inputs.languages[len(found) : len(found) + len(batch[main])])
            spoken = {"language": languages, "task": "transcribe"} if languages and all(languages) else {}
            taken = (main,) if "input_ids" in batch else (main, MASK)  # a mask beside them is of the text
            heard = {name: batch[name].to(device) for name in taken if name in batch}
            tokens = generate(**heard, **options, **spoken)
            found += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return tuple(found)


def compare(dense: Measured, pruned: Measured, inputs: HeldOutInputs) -> Agreement:
    """How far two models agree. Word error rates are of the transcripts whose text, known or the dense model's, has a
    word."""
    found = replace(agreement(dense.answers, pruned.answers), source=inputs.source)
    if not dense.transcripts:
        return found
    texts = list(inputs.texts[: len(dense.transcripts)])
    return replace(
        found,
        changed_words=_error_rate(dense.transcripts, pruned.transcripts),
        word_error_rate=_error_rate(texts, pruned.transcripts),
        dense_word_error_rate=_error_rate(texts, dense.transcripts),
    )


def _error_rate(references: Sequence[str | None], transcripts: Sequence[str]) -> float | None:
    known = [(said or "", heard) for said, heard in zip(references, transcripts, strict=True) if words(said or "")]
    return word_error_rate(*map(list, zip(*known, strict=True))) if known else None
