"""Agreement of a pruned model with the dense one on the same inputs, for models that perplexity does not measure.

Encoders are compared by their embeddings, classifiers by their labels, speech recognition by its transcripts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext.errors import InputError
from ace_ext.models.call_errors import explained
from ace_ext.models.run_mode import evaluating
from ace_ext.records import Agreement

Inputs = Mapping[str, Tensor]
"""The arguments of one call of a model, with the samples on the first axis."""

_EMBEDDINGS = ("text_embeds", "image_embeds", "audio_embeds", "sentence_embedding")
"""Outputs of transformers that are embeddings already, float ``[batch, width]``."""
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class Answers:
    """What a model answers for some inputs."""

    embeddings: tuple[Tensor, ...]
    """Float32 ``[samples, width]`` each, on the CPU; two of a model with two towers."""
    labels: Tensor | None
    """Int64 ``[samples]``, the most probable label. Of a model that gives logits for each position: ``[positions]`` of
    all samples, without padding. None: there are no logits."""


@torch.no_grad()
def answers(model: nn.Module, batches: Iterable[Inputs]) -> Answers:
    """What ``model`` answers, on the device of its weights. Its mode and weights do not change.

    A model with outputs such as ``text_embeds`` has its embeddings there. Others give hidden states, of the encoder if
    there is a decoder. Their mean over the positions without padding is the embedding, as sentence encoders use it. A
    model that gives only ``logits`` has these in place of hidden states.

    Raises:
        InputError: there is no batch, or it does not suit the model, or the model gives nothing of all this, or gives
            it without names.
    """
    device = next(model.parameters()).device
    found: list[tuple[Tensor, ...]] = []
    labels: list[Tensor] = []
    with evaluating(model):
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            with explained(model, inputs):
                outputs = model(**inputs)
            if not isinstance(outputs, Mapping):
                raise InputError(f"model: gives a {type(outputs).__name__}; set return_dict=True in its configuration")
            found.append(tuple(tensor.float().cpu() for tensor in _embeddings(outputs, inputs)))
            if isinstance(outputs.get("logits"), Tensor):
                labels.append(_labels(outputs["logits"], inputs).cpu())
    if not found:
        raise InputError("batches: none found; give at least one batch of the model's inputs")
    return Answers(tuple(map(torch.cat, zip(*found, strict=True))), torch.cat(labels) if labels else None)


def _labels(logits: Tensor, inputs: Inputs) -> Tensor:
    """The most probable labels, int64 ``[n]``, of ``logits [batch, labels]`` or ``[batch, positions, labels]``."""
    best = logits.argmax(-1)
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    return best[mask.bool()] if mask is not None and mask.shape == best.shape else best.flatten()


def _embeddings(outputs: Mapping[str, Any], inputs: Inputs) -> list[Tensor]:
    """The embeddings in a model's outputs, float ``[batch, width]`` each."""
    named = [outputs[name] for name in _EMBEDDINGS if isinstance(outputs.get(name), Tensor)]
    if named and all(tensor.dim() == 2 for tensor in named):  # BLIP's captions have a vector for each patch there
        return named
    for name in ("last_hidden_state", "encoder_last_hidden_state", "logits"):
        states = outputs.get(name)
        if isinstance(states, Tensor):
            return [states if states.dim() == 2 else _mean_of_positions(states, inputs.get("attention_mask"))]
    raise InputError(
        f"model: gives neither embeddings, hidden states nor logits (its outputs: {', '.join(outputs)}); load it as "
        "AutoModel"
    )


def _mean_of_positions(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean, in float32, of ``states [batch, positions, width]`` (or ``[batch, channels, rows, columns]``) over
    positions. ``mask [batch, positions]`` is 0 for padding; a mask of other positions, as that of a waveform, is not
    used."""
    states = states.float()
    if states.dim() == 4:
        return states.flatten(2).mean(2)
    if mask is None or mask.shape != states.shape[:2]:
        return states.mean(1)
    real = mask.bool()[..., None]
    mean: Tensor = states.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
    return mean


def agreement(dense: Answers, pruned: Answers) -> Agreement:
    """How far two models' answers for the same inputs agree. Of several embeddings, figures are means of those that are
    defined.

    Raises:
        InputError: the answers are of different numbers of samples or of different models.
    """
    if [e.shape for e in dense.embeddings] != [e.shape for e in pruned.embeddings]:
        shapes = [[list(e.shape) for e in found.embeddings] for found in (dense, pruned)]
        raise InputError(f"pruned: must have answers of the shapes {shapes[0]} (got {shapes[1]}); give the same inputs")
    pairs = list(zip(dense.embeddings, pruned.embeddings, strict=True))
    samples = len(pairs[0][0])
    correlations = [rank_correlation(*pair) for pair in pairs] if samples > 2 else []
    known = [value for value in correlations if value is not None]
    same = None if dense.labels is None or pruned.labels is None else (dense.labels == pruned.labels).float().mean()
    return Agreement(
        samples,
        sum(mean_cosine(*pair) for pair in pairs) / len(pairs),
        sum(known) / len(known) if known else None,
        None if same is None else float(same),
    )


def mean_cosine(dense: Tensor, pruned: Tensor) -> float:
    """Mean over rows of the cosine of ``dense [n, width]`` and ``pruned [n, width]``."""
    return float(functional.cosine_similarity(dense.double(), pruned.double(), dim=1).mean())


def rank_correlation(dense: Tensor, pruned: Tensor) -> float | None:
    """Spearman's correlation of the cosines of all pairs of rows of ``dense [n, width]`` with those of ``pruned``.

    It is what search and clustering depend on: 1 if all pairs have the same order of similarity. None if all pairs are
    equally similar in one of the models.
    """
    return spearman(_pair_cosines(dense), _pair_cosines(pruned))


def _pair_cosines(rows: Tensor) -> Tensor:
    """Float64 ``[n * (n - 1) / 2]``, without the digits that are rounding errors: equal pairs have equal cosines."""
    unit = functional.normalize(rows.double(), dim=1)
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    return (unit @ unit.T)[first, second].round(decimals=12)


def spearman(first: Tensor, second: Tensor) -> float | None:
    """Spearman's rank correlation of two vectors ``[n]``; equal values share the mean of their ranks. None if one
    vector has equal values only, NaN if one has a NaN."""
    if first.isnan().any() or second.isnan().any():
        return float("nan")
    if (first == first[0]).all() or (second == second[0]).all():
        return None
    return float(torch.corrcoef(torch.stack([_ranks(first), _ranks(second)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Float64 ``[n]``, from 1."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    mean_rank: Tensor = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return mean_rank[place]


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation. Word error rates depend on this."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def edit_distance(first: Sequence[object], second: Sequence[object]) -> int:
    """The least number of insertions, deletions and replacements that make one sequence the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, item in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (item != other))
    return row[-1]


def word_error_rate(references: Sequence[str], transcripts: Sequence[str]) -> float:
    """Edits of words that make the transcripts their references, relative to the references' words.

    It may exceed 1. With the dense model's transcripts as references it measures the change by pruning.

    Raises:
        InputError: there is not one transcript for each reference, or the references have no word.
    """
    if len(references) != len(transcripts):
        raise InputError(f"transcripts: must be one for each of {len(references)} references (got {len(transcripts)})")
    spoken = [words(text) for text in references]
    total = sum(map(len, spoken))
    if not total:
        raise InputError("references: have no word; give the texts that were spoken")
    return sum(edit_distance(text, words(heard)) for text, heard in zip(spoken, transcripts, strict=True)) / total
