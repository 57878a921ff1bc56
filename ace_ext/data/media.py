"""Calibration with images, sound, and pairs of either with text, by a model's own processor."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ace_ext.data.conversations import conversation, converses
from ace_ext.data.media_items import IMAGE, Item, Items, media_items, read_item, sound_part, text_of
from ace_ext.data.requests import check_int, positions_in
from ace_ext.errors import InputError, one_line
from ace_ext.models.location import remote_code_allowed
from ace_ext.models.token_masks import MASK

_INPUTS = {
    "image": ("pixel_values", "image_pixel_values"),
    "audio": ("input_features", "input_values", "audio_input_features"),
}
"""By kind of file, the arguments of a model's forward that take it."""
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
"""One of these files is in a folder with a tokenizer."""


def load_processor(folder: str) -> Any:
    """The processor of a model's folder or hub name: its image processor, feature extractor or both with a tokenizer.
    Without a tokenizer, which a model that reads no text need not have, it is the image processor or feature extractor,
    also where the folder has a tokenizer that belongs to neither. A folder with a tokenizer alone gives that.

    Raises:
        InputError: there is none, or it cannot be made; or it has a tokenizer too, and a package is missing.
    """
    # imported here: it imports every modality
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    errors: list[Exception] = []
    tokenizer = None
    for kind in (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor):
        try:
            found = kind.from_pretrained(folder, trust_remote_code=remote_code_allowed())
            if not isinstance(found, PreTrainedTokenizerBase):
                return found
            tokenizer = found
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            errors.append(error)
            has_tokenizer = any((Path(folder) / name).is_file() for name in _TOKENIZERS)
            if isinstance(error, ImportError) and kind is AutoProcessor and has_tokenizer:
                break  # its image processor alone would read no text
    if tokenizer is not None:
        return tokenizer
    reason = one_line(errors[0], 200)
    if isinstance(errors[0], ImportError):
        raise InputError(
            f"model: the processor of {folder} needs a package that is not installed ({reason}); install it "
            "('ace_ext[vision]' and 'ace_ext[audio]' have those that most need)"
        ) from errors[0]
    raise InputError(
        f"model: {folder} has no processor that loads ({reason}); images and sound need the model's "
        "preprocessor_config.json or processor_config.json beside its weights"
    ) from errors[0]


def media_batches(
    source: str, processor: Any, model: nn.Module, nsamples: int, batch: int, seed: int = 0, after: int = 0
) -> list[dict[str, Tensor]]:
    """Batches of a model's inputs, with the samples on the first axis, on the CPU.

    Args:
        source: a folder or a `.jsonl` file, as :func:`ace_ext.data.media_items.media_items` reads it.
        processor: of the model, as :func:`load_processor` returns it.
        model: its forward says which inputs it takes. It is not called.
        nsamples: how many samples are drawn at random; all are used if there are fewer.
        batch: samples of a batch.
        seed: of the draw.
        after: how many of the drawn samples are left out first; with those of a calibration, others follow.

    A model with a decoder reads the text of each sample as ``decoder_input_ids``; one with a text tower as
    ``input_ids``. Batches are of one sample where padding would be read as sound, and for a language model that
    sees or hears (:mod:`ace_ext.data.conversations`).

    Raises:
        InputError: a source, file or line as in the functions that read them; a model that does not take this kind of
            file, or needs text that the source does not have.
    """
    check_int("batch", batch, 1)
    found = media_items(source, nsamples, seed, after)
    taken = inspect.signature(model.forward).parameters
    if not set(_INPUTS[found.kind]) & set(taken):
        main = getattr(model, "main_input_name", "input_ids")
        raise InputError(f"input: {source} has {found.kind} files, and {type(model).__name__} takes {main}; give such")
    if isinstance(processor, PreTrainedTokenizerBase):
        raise InputError(
            "model: has a tokenizer and no processor for images or sound; add the model's preprocessor_config.json or "
            "processor_config.json beside its weights"
        )
    if converses(processor, found.kind, model):
        return [conversation(item, found.kind, processor, model) for item in found.items]
    tokenizer = getattr(processor, "tokenizer", None)
    side = _text_inputs(model, taken)
    _check_texts(source, found, side, tokenizer)
    parts = [found.items[start : start + batch] for start in range(0, len(found.items), batch)]
    made = [pair for part in parts for pair in _together(part, found.kind, processor, model, taken)]
    if side is not None:
        read = _texts if side == "input_ids" else _decoder_texts
        made = [(part, inputs | read(part, tokenizer, model)) for part, inputs in made]
    return [{name: value for name, value in inputs.items() if name in taken} for _, inputs in made]


def _text_inputs(model: nn.Module, taken: Mapping[str, Any]) -> str | None:
    """The argument through which a forward reads the text of a sample; None if it reads none."""
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        return "decoder_input_ids"
    return "input_ids" if "input_ids" in taken else None


def _check_texts(source: str, found: Items, side: str | None, tokenizer: Any) -> None:
    if side is None:
        return
    for item in found.items:
        text_of(item, found.kind)
    if tokenizer is None:
        raise InputError(f"model: its processor has no tokenizer for the texts of {source}; add tokenizer.json")


def _together(
    items: Sequence[Item], kind: str, processor: Any, model: nn.Module, taken: Mapping[str, Any]
) -> list[tuple[Sequence[Item], dict[str, Tensor]]]:
    """One batch of the items, or one of each where the model would read padding: the first Wav2Vec2 was trained on
    sounds without a mask, and a mask of pixels says nothing about the tokens that blocks read."""
    channels = getattr(model.config, "num_channels", 3)
    read = [read_item(item, kind, processor, channels) for item in items]
    first = _media(read[:1], items[0].where, kind, processor)
    if kind != IMAGE and MASK in first and MASK in taken:
        return [(items, _media(read, items[0].where, kind, processor))]
    others = zip(read[1:], items[1:], strict=True)
    alone = [first, *(_media([content], item.where, kind, processor) for content, item in others)]
    if all(_shapes(inputs) == _shapes(first) for inputs in alone):
        return [(items, {name: torch.cat([inputs[name] for inputs in alone]) for name in first})]
    return [([item], inputs) for item, inputs in zip(items, alone, strict=True)]


def _shapes(inputs: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in inputs.items()}


def _media(contents: Sequence[Any], where: str, kind: str, processor: Any) -> dict[str, Tensor]:
    """The inputs that a processor makes of the contents of files; ``where``: the first of them."""
    if kind == IMAGE:
        reader = getattr(processor, "image_processor", processor)
        return _tensors(reader(images=contents, return_tensors="pt"), where)
    reader = sound_part(processor)
    padding = "max_length" if hasattr(reader, "n_samples") else True  # Whisper hears windows of one length
    made = reader(contents, sampling_rate=int(reader.sampling_rate), padding=padding, return_tensors="pt")
    return _tensors(made, where)


def _tensors(made: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """What a processor returned, if it is of tensors."""
    for name, value in made.items():
        if not isinstance(value, Tensor):
            sizes = "images of different sizes" if isinstance(value, list) else type(value).__name__
            raise InputError(f"input: {where} and others: {name} cannot be one tensor ({sizes}); use batches of 1")
    return dict(made)


def _texts(items: Sequence[Item], tokenizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """The inputs of a text tower: ``input_ids [batch, positions]`` and ``attention_mask``. A tower whose tokenizer
    gives no mask, as SigLIP's, reads padding too: it was trained on texts that fill all positions."""
    positions = positions_in(getattr(model.config, "text_config", model.config))
    limit = {} if positions is None else {"truncation": True, "max_length": positions}
    padding = True if MASK in tokenizer.model_input_names or not limit else "max_length"
    return dict(tokenizer([item.text or "" for item in items], padding=padding, return_tensors="pt", **limit))


def _decoder_texts(items: Sequence[Item], tokenizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """The inputs of a decoder that is to predict the texts: each begins with the decoder's first token and lacks the
    last one, as in training. ``decoder_attention_mask`` is 0 for padding."""
    config: Any = model.config
    first = _first_token(model)
    rows = []
    for item in items:
        _set_language_(tokenizer, item)
        ids = list(tokenizer(item.text or "").input_ids)
        rows.append((ids if ids[0] == first else [first, *ids])[:-1])
    rows = [row[: getattr(config, "max_target_positions", None)] for row in rows]
    width = max(map(len, rows))
    padding = getattr(config, "pad_token_id", None) or 0
    return {
        "decoder_input_ids": torch.tensor([row + [padding] * (width - len(row)) for row in rows]),
        "decoder_attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def _set_language_(tokenizer: Any, item: Item) -> None:
    """Makes texts begin as a transcript in the sample's language does, if it names one.

    Raises:
        InputError: the model has no languages, or not this one.
    """
    if item.language is None:
        return
    if not hasattr(tokenizer, "set_prefix_tokens"):
        raise InputError(f"input: {item.where} has a language, and the model's tokenizer knows none; leave it out")
    try:
        tokenizer.set_prefix_tokens(language=item.language, task="transcribe")
        tokenizer.prefix_tokens  # noqa: B018  # some versions look the language up only here
    except (ValueError, KeyError) as error:
        raise InputError(
            f"input: {item.where}: language {item.language!r} is unknown to the model's tokenizer; give one like 'en'"
        ) from error


def _first_token(model: nn.Module) -> int:
    for config in (model.config, getattr(model, "generation_config", None), getattr(model.config, "decoder", None)):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                return token
    raise InputError("model: its configuration names no decoder_start_token_id; set it, or calibrate from Python")
