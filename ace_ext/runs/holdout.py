"""Perplexity before and after pruning, on a little held-out text: a rough check of what pruning cost.
``ace-prune eval`` measures it on more."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ace_ext.data.bos import BosChoice, begin_with, knows_english, perplexity_of, short_text_ids
from ace_ext.data.corpora import HELD_OUT, SELF, SMALL_SOURCES, SOURCES, load_text, texts_of
from ace_ext.data.local_files import same_file
from ace_ext.data.mixture import samples_of
from ace_ext.data.requests import check_tokens, positions_of
from ace_ext.data.windows import evaluation_tokens, tokens_between_samples
from ace_ext.errors import InputError
from ace_ext.formats import written_shards
from ace_ext.models._transformers import output_head
from ace_ext.models.block_store import BlockSource, OffloadedBlocks
from ace_ext.models.tokenizer import Tokenizer
from ace_ext.models.whole_forward import whole_logits
from ace_ext.records import HeldOutPerplexity, PruneReport, finite
from ace_ext.runs.model_source import Source
from ace_ext.runs.options import EVALUATE_AUTO, RunRequest

WINDOWS, WINDOW_TOKENS = 4, 128
"""Upper bounds for the text. :mod:`ace_ext.data.bos` measures a model on as many tokens, so the memory is the same."""


@dataclass(frozen=True, eq=False)
class HeldOutText:
    """Windows of text, and where they are from."""

    name: str
    windows: Tensor
    """int64 ``[windows, tokens]``, on the CPU; each begins with the BOS token if the calibration samples do."""

    def measure(self, logits: Callable[[Tensor], Tensor]) -> float | None:
        """The perplexity of a model by its ``logits``, ``(tokens [batch, seqlen]) -> [batch, seqlen, vocabulary]``;
        None if it is not finite."""
        with torch.no_grad():
            return finite(perplexity_of(logits(self.windows)[:, :-1], self.windows[:, 1:]))


def held_out_text(request: RunRequest, source: Source, bos: BosChoice) -> HeldOutText:
    """The text on which a run measures perplexity. With ``auto`` it is the held-out part of a small named source, or a
    part of the user's file that nothing else in the run reads. Otherwise it is a short English text.

    Raises:
        InputError: the model has no LM head, or there is not one window of text.
    """
    if output_head(source.model) is None:
        raise InputError("the model has no LM head")
    positions = positions_of(source.model) or WINDOW_TOKENS
    name, ids = measured_text(request, source.tokenizer, bos)
    width = min(WINDOW_TOKENS, positions) - (bos.token is not None)
    if len(ids) < 2 * width:
        width = len(ids) // WINDOWS
    if width < 2:
        raise InputError(f"too little text ({name})")
    count = min(WINDOWS, len(ids) // width)
    windows = begin_with(bos.token, ids[: count * width].view(count, width))
    check_tokens(source.model, windows)
    return HeldOutText(name, windows)


class Measurement:
    """The perplexity of a run's model before and after.

    Args:
        text: on which it is measured.
        source: the model.
        blocks: its blocks, dense.
        device: where blocks run.
    """

    def __init__(self, text: HeldOutText, source: Source, blocks: BlockSource, device: torch.device) -> None:
        self._text, self._source, self._blocks, self._device = text, source, blocks, device
        self._dense: float | None = None

    def before(self) -> None:
        """Measures the dense model."""
        self._dense = self._text.measure(logits_of(self._source, self._blocks, self._device))

    def follow(self, blocks: BlockSource) -> None:
        """From now on the model has other blocks: structures were removed."""
        self._blocks = blocks

    def after(self, report: PruneReport, folder: Path | None) -> None:
        """Measures the pruned model, the one in memory or the one that was written to ``folder``, for the report."""
        if folder is None:
            pruned = self._text.measure(logits_of(self._source, self._blocks, self._device))
        else:
            pruned = self._text.measure(logits_of_folder(self._source, folder, self._device))
        windows, seqlen = self._text.windows.shape
        report.perplexity = HeldOutPerplexity(self._text.name, windows, seqlen, self._dense, pruned)


def measurement_for(
    request: RunRequest, source: Source, blocks: BlockSource, bos: BosChoice | None, tell: Callable[[str], None]
) -> Measurement | None:
    """The measurement of a run; None if it measures nothing. If ``auto`` finds no text, ``tell`` is called with a line
    that says why.

    Raises:
        InputError: a text was named and cannot be used, or is named although no text calibrates the model.
    """
    if not request.evaluates:
        return None
    if bos is None:
        if request.calibration.evaluate == EVALUATE_AUTO:
            return None
        raise InputError(
            f"evaluate is for text with this model, and calibration {request.calibration.source!r} is none (got "
            f"{request.calibration.evaluate!r}); leave it out, and measure with ace-prune eval"
        )
    try:
        return Measurement(held_out_text(request, source, bos), source, blocks, request.device)
    except InputError as error:
        if request.calibration.evaluate != EVALUATE_AUTO:
            raise
        tell(f"perplexity before and after is not measured: {error}")
        return None


def measured_text(request: RunRequest, tokenizer: Tokenizer, bos: BosChoice) -> tuple[str, Tensor]:
    """The name and the ids ``[n]`` of the text. Of a file that also calibrates it is the part that no sample reads.

    Raises:
        InputError: the text cannot be read, or calibration reads all of it.
    """
    calibration = request.calibration
    wanted = calibration.evaluate
    if wanted != EVALUATE_AUTO:
        if not any(same_file(wanted, part.source) for part in texts_of(calibration.source)):
            return wanted, evaluation_tokens(wanted, tokenizer, text_field=calibration.text_field)
        unread = _unread(request, tokenizer, bos, wanted)
        if unread:
            return unread[0]
        raise InputError(
            f"evaluate must be text that calibration does not read (the samples read all of {wanted!r}); give another "
            "text, or fewer samples"
        )
    found = _unread(request, tokenizer, bos)
    if found:
        most = WINDOWS * WINDOW_TOKENS // len(found) if len(found) > 1 else None  # of a mixture: as much of each text
        return "; ".join(name for name, _ in found), torch.cat([ids[:most] for _, ids in found])
    if not knows_english(tokenizer):
        raise InputError("its tokenizer knows too few English words for the short text of this program")
    return "a short English text", torch.tensor(short_text_ids(tokenizer))


def _unread(
    request: RunRequest, tokenizer: Tokenizer, bos: BosChoice, wanted: str | None = None
) -> list[tuple[str, Tensor]]:
    """Of each calibration text, or of the ``wanted`` one, the name and the ids ``[n]`` of a part that the run does not
    read. A text without such a part is left out."""
    calibration = request.calibration
    texts = texts_of(calibration.source)
    read = [calibration, *([request.later] if request.later else [])]
    draws = [[(count, text.seed) for count in samples_of(texts, text.nsamples)] for text in read]
    found = []
    for source, *own_draws in zip((part.source for part in texts), *draws, strict=True):
        if wanted is not None and not same_file(wanted, source):
            continue
        if source in SMALL_SOURCES:
            found.append((f"{source}, held-out part", evaluation_tokens(source, tokenizer)))
        elif source not in (SELF, *SOURCES):
            documents = load_text(source, HELD_OUT, calibration.text_field)
            free = tokens_between_samples(documents, tokenizer, calibration.seqlen, own_draws, bos.token)
            if len(free) >= WINDOWS * 2:
                found.append((f"{Path(source).name}, between the samples", free))
    return found


def logits_of(source: Source, blocks: BlockSource, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The logits of a model whose blocks may be on the disk."""
    return lambda tokens: whole_logits(source.model, blocks, tokens, device)


def logits_of_folder(source: Source, folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The logits of a written folder with the structure of ``source``, dense or packed, read one block at a time.
    Afterwards the blocks of ``source`` have no weights."""
    shards = written_shards(folder)
    return logits_of(source, OffloadedBlocks(source.blocks, shards.adopt(source.model), device), device)
