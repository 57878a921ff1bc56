"""Models whose shapes are known but whose weights are not there: a folder with ``config.json`` alone, or the name of a
common size. ``plan`` takes them; every other verb needs weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ace_ext.errors import InputError
from ace_ext.models.blocks import find_blocks
from ace_ext.models.location import locate
from ace_ext.models.skeleton import dtype_of, empty_model, skeleton
from ace_ext.runs.model_source import ModelFiles, Source, open_source, wants_offload
from ace_ext.runs.options import RunRequest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class KnownSize:
    """A model by the published values of its configuration; weights in bfloat16."""

    config_class: str
    """A name in transformers."""
    values: Mapping[str, Any]

    def config(self) -> "PreTrainedConfig":
        """The configuration."""
        import transformers

        config: PreTrainedConfig = getattr(transformers, self.config_class)(**self.values, dtype="bfloat16")
        return config


def _llama(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """The values that the configurations of Llama and its relatives share."""
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {
        **sizes,
        "num_attention_heads": heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **more,
    }


KNOWN_SIZES = {
    "smollm2-135m": KnownSize(
        "LlamaConfig", _llama(49152, 576, 1536, 30, 9, num_key_value_heads=3, tie_word_embeddings=True)
    ),
    "llama-3.2-1b": KnownSize(
        "LlamaConfig",
        _llama(128256, 2048, 8192, 16, 32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    ),
    "llama-2-7b": KnownSize("LlamaConfig", _llama(32000, 4096, 11008, 32, 32, max_position_embeddings=4096)),
    "llama-3-8b": KnownSize("LlamaConfig", _llama(128256, 4096, 14336, 32, 32, num_key_value_heads=8)),
    "llama-3-70b": KnownSize("LlamaConfig", _llama(128256, 8192, 28672, 80, 64, num_key_value_heads=8)),
    "mistral-7b": KnownSize(
        "MistralConfig", _llama(32768, 4096, 14336, 32, 32, num_key_value_heads=8, sliding_window=None)
    ),
    "qwen2.5-0.5b": KnownSize(
        "Qwen2Config", _llama(151936, 896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen2.5-7b": KnownSize("Qwen2Config", _llama(152064, 3584, 18944, 28, 28, num_key_value_heads=4)),
    "gemma-3-4b": KnownSize(  # the text part
        "Gemma3TextConfig",
        _llama(262208, 2560, 10240, 34, 8, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True),
    ),
}
"""The sizes that ``plan --model`` knows by name."""


def open_for_plan(request: RunRequest) -> Source:
    """The skeleton of the model of a plan: its files need not be there.

    Raises:
        InputError: as :func:`ace_ext.runs.model_source.open_source`; the name of a size that is not known.
    """
    model = _laid_out(request)
    if model is None:
        return open_source(request, weights=False)
    blocks = find_blocks(
        model, request.config.skip, check=False, max_dense=request.config.dense_limit, towers=request.config.towers
    )
    files = ModelFiles(request.model, None, None)
    offload = wants_offload(model, blocks, None, request)
    return Source(model, _NoTokenizer(), blocks, files, offload, shapes_only=True)


def _laid_out(request: RunRequest) -> nn.Module | None:
    """The model on the meta device, if only its shapes are known."""
    path = Path(request.model).expanduser()
    if path.is_dir():
        return None if _has_weights(path) else skeleton(locate(request.model).name, None, request.dtype)
    known = KNOWN_SIZES.get(request.model.lower())
    if known is not None:
        config = known.config()
        return empty_model(config, dtype_of(config, None, request.dtype))
    try:
        locate(request.model)
    except InputError as error:
        raise InputError(f"{error}; plan also takes the name of a size: {', '.join(KNOWN_SIZES)}") from error
    return None


def _has_weights(folder: Path) -> bool:
    names = os.listdir(folder)
    return any(name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")) for name in names)


class _NoTokenizer:
    """Stands for the tokenizer of a model that has none here. A plan asks it for nothing."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __len__(self) -> int:
        raise InputError("tokenizer: there is none next to config.json")

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping[str, list[int]]:
        raise InputError("tokenizer: there is none next to config.json")

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> object:
        raise InputError("tokenizer: there is none next to config.json")
