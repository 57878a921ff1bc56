"""Loads a model with its tokenizer, from a folder, a hub name or a GGUF file."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import (
    OWN_METHOD,
    check_version,
    dequantize_options,
    forget_quantization_,
    has_encoder,
    is_encoder,
    main_input,
    model_class,
    quantization_of,
    quiet_stderr,
)
from ace_ext.models.location import ModelLocation, as_input_error, locate
from ace_ext.models.tokenizer import Tokenizer

WEIGHT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The dtypes in which a model's weights can be loaded and pruned, by the names that ``--dtype`` takes."""


@dataclass
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and the name that the caller gave."""

    model: nn.Module
    tokenizer: Tokenizer
    source: str


class NoTokenizer:
    """Stands for the tokenizer of a model that has none, such as one that sees images. Using it is an error.

    Args:
        why: the error's message.
    """

    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self, why: str) -> None:
        self._why = why

    def __len__(self) -> int:
        raise InputError(self._why)

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping[str, list[int]]:
        """Raises the error."""
        raise InputError(self._why)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> object:
        """Writes nothing."""
        return None


def load_model(
    source: str, dtype: str = "auto", device: str | torch.device = "cpu", *, causal: bool = True
) -> LoadedModel:
    """Loads a model and its tokenizer. The model is of the class that its checkpoint names.

    Args:
        source: a folder, a ``.gguf`` file, or a hub name like ``org/model``.
        dtype: ``auto`` (what the checkpoint says; bfloat16 for GGUF), float32, float16 or bfloat16.
        device: where to put the weights.
        causal: the model must predict the next token. False: a network of any kind, which may have no tokenizer
            (:class:`NoTokenizer`).

    Raises:
        InputError: there is no model, or transformers cannot load it; quantized weights; weights that do not fit the
            configuration; a model that does not predict the next token, if it must.
    """
    check_version()
    check_dtype(dtype)
    location = locate(source)
    unpacks = location.gguf_file is not None
    wanted = WEIGHT_DTYPES.get(dtype, torch.bfloat16 if unpacks else "auto")
    options = location.options | (dequantize_options() if unpacks else {})
    reading: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if unpacks:
        from ace_ext.models.gguf_header import read_once  # imported here: most models are folders

        reading = read_once()
    with as_input_error(f"model {source!r} could not be loaded"), quiet_stderr(), reading:
        config = location.config()
        if not unpacks:
            check_plain(source, config)
        kind = model_class(config)
        if causal:
            _check_reads_text(source, kind.__name__, main_input(kind))  # before it asks for a tokenizer
        tokenized = causal or unpacks or _has_tokenizer(location.name)  # a GGUF file has its tokenizer in it
        tokenizer = location.tokenizer() if tokenized else no_tokenizer(source)
        model: nn.Module
        if unpacks:
            options["config"] = config  # otherwise it would be read once more
        model, found = kind.from_pretrained(location.name, dtype=wanted, output_loading_info=True, **options)
    if causal:
        check_causal(source, model)
    check_fit(source, found["missing_keys"], found["unexpected_keys"])
    forget_quantization_(model)
    return LoadedModel(model.to(device).eval(), tokenizer, source)


def no_tokenizer(source: str) -> NoTokenizer:
    """What stands for the tokenizer of a model that has none."""
    return NoTokenizer(
        f"model {source!r} has no tokenizer, so text cannot calibrate it; give the inputs of its own processor"
    )


_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def _has_tokenizer(name: str) -> bool:
    """Whether a folder has a tokenizer. Of a hub name: yes, so that the hub is asked."""
    folder = Path(name)
    return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def check_plain(source: str, config: Any) -> None:
    """Raises :class:`InputError` for the configuration of a model whose weights are quantized."""
    quantization = quantization_of(config)
    if quantization == OWN_METHOD:
        raise InputError(f"model {source!r} is a packed folder; give the dense one (ace-prune unpack)")
    if quantization is not None:
        raise InputError(
            f"model {source!r} holds {quantization} weights; give the unquantized checkpoint, or dequantize this one "
            "with transformers and save that; prune it, then quantize"
        )


def check_fit(source: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Checks that the files hold the tensors of the configuration. transformers would fill a missing parameter with
    random numbers, and ignore an unknown tensor.

    Args:
        source: the model, as the user named it.
        missing: parameters that the files lack.
        unexpected: tensors of the files that the model does not read.

    Raises:
        InputError: there are any; it names the first of them.
    """
    kinds = (("missing", missing), ("not in the model", unexpected))
    found = [f"{kind}: {_some(sorted(names))}" for kind, names in kinds if names]
    if found:
        raise InputError(
            f"model {source!r}: its weights do not match its configuration ({'; '.join(found)}); correct config.json "
            "(model_type, num_hidden_layers), or fetch the files again"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:200] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def check_causal(source: str, model: nn.Module) -> None:
    """Raises :class:`InputError` for a model that does not read text, or does not read it from left to right: it
    predicts no next token, so its perplexity means nothing."""
    _check_reads_text(source, type(model).__name__, main_input(model))
    if has_encoder(model):
        raise InputError(
            f"model {source!r} has an encoder and a decoder ({type(model).__name__}); this takes decoder-only models"
        )
    if is_encoder(model):
        raise InputError(
            f"model {source!r} is an encoder: each token sees those after it, so it does not predict the next one, as "
            'this needs; if it was trained to, set "is_decoder": true in config.json'
        )


def _check_reads_text(source: str, kind: str, reads: str) -> None:
    if reads != "input_ids":
        raise InputError(f"model {source!r} is not a language model: {kind} reads {reads}")


def check_dtype(dtype: str) -> None:
    """Raises :class:`InputError` for a name that is not ``auto`` and not in :data:`WEIGHT_DTYPES`."""
    if dtype != "auto" and dtype not in WEIGHT_DTYPES:
        raise InputError(f"dtype must be auto, {', '.join(WEIGHT_DTYPES)} (got {dtype!r})")


def load_tokenizer(folder: Path, *, needed: bool = True) -> Tokenizer:
    """The tokenizer of a model folder. ``needed``: False for a model that may have none.

    Raises:
        InputError: there is none that transformers can load.
    """
    if not needed and not _has_tokenizer(str(folder)):
        return no_tokenizer(str(folder))
    with as_input_error(f"tokenizer of {str(folder)!r} could not be loaded"):
        return ModelLocation(str(folder)).tokenizer()


def local_folder(source: str) -> Path | None:
    """The folder on this machine that holds a model: ``source`` itself, or its copy in the hub's cache, downloaded if
    needed. None for a ``.gguf`` file.

    Raises:
        InputError: as :func:`load_model`, or the hub does not provide it.
    """
    location = locate(source)
    if location.gguf_file is not None:
        return None
    if Path(location.name).is_dir():
        return Path(location.name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
    try:
        return Path(snapshot_download(location.name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model {source!r} could not be fetched: {reason[:400]}") from error
