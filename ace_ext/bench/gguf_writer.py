"""Writes a dense folder as a GGUF file that llama.cpp can run, for measuring.

The file has no real vocabulary: token ``i`` is the text `` i``, so that token ids go in and can be read from the text
that comes out. That is enough to measure speed and to compare tokens, and it works for a folder without a tokenizer.

Names of tensors are those of the ``gguf`` package's ``TensorNameMap``. Facts about the format (the order of rows of q
and k, norms, keys, a head with more bits) are those of llama.cpp's ``convert_hf_to_gguf.py`` and ``llama-quantize``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.models.location import ModelLocation, as_input_error
from ace_ext.models.safetensors_files import Shards

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("bf16", "q8_0", "q4_0")
"""The types of weights that can be written."""

GROUP = 32
"""Columns that share a scale in Q8_0 and Q4_0. A matrix with another number of columns is written in bfloat16."""

_GLOBAL_LAYER = 6
"""Of Gemma 3: every sixth layer attends to all tokens. llama.cpp has this number in its code."""
_LOCAL_BASE = 10_000.0
"""Of Gemma 3: the rotary base of the other layers, also in llama.cpp's code."""


@dataclass(frozen=True)
class _Class:
    """What llama.cpp expects of a class of models."""

    architecture: str
    paired: bool = False
    """Rows of q and k are in the order of pairs (2i, 2i + 1) that rotate together, not (i, i + half)."""
    norm_shift: float = 0.0
    """Is added to the weights of norms."""


_CLASSES = {
    "LlamaForCausalLM": _Class("llama", paired=True),
    "MistralForCausalLM": _Class("llama", paired=True),
    "Qwen2ForCausalLM": _Class("qwen2"),
    "Qwen3ForCausalLM": _Class("qwen3"),
    "Gemma3ForCausalLM": _Class("gemma3", norm_shift=1.0),
}


def check_writable(dense: str | Path) -> None:
    """Checks that :func:`write_gguf` can write this folder.

    Raises:
        InputError: a class of models or a setting that it does not know.
    """
    _known(_config(dense))


def write_gguf(dense: str | Path, file: Path, kind: str, step: Callable[[], object] = lambda: None) -> None:
    """Writes the weights of a dense folder as GGUF, one tensor at a time.

    Matrices get the type ``kind``; in a ``q4_0`` file embeddings and head are Q8_0, as llama.cpp writes them with more
    bits too. Vectors are float32.

    Args:
        dense: a folder with ``config.json`` and safetensors files.
        file: is overwritten.
        kind: of :data:`TYPES`.
        step: is called after each tensor.

    Raises:
        InputError: a class of models or a setting that is not known, or a tensor without a name in GGUF.
    """
    import gguf

    config = _config(dense)
    known = _known(config)
    shards = Shards(Path(dense).expanduser())
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, known.architecture)
    try:
        _write_settings(writer, config)
        _write_vocabulary(writer, config.vocab_size)
        makers: list[Callable[[], Tensor]] = []
        types = []
        for name, target, shape in _tensors(shards, names, config):
            makers.append(partial(_values, shards, name, known, config))
            types.append(_type(kind, target, shape))
            _declare(writer, target, shape, types[-1])
        factors = _rope_factors(config)
        if factors is not None:
            makers.append(factors.clone)
            types.append(gguf.GGMLQuantizationType.F32)
            _declare(writer, "rope_freqs.weight", tuple(factors.shape), types[-1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for make, own in zip(makers, types, strict=True):
            writer.write_tensor_data(gguf.quants.quantize(make().float().contiguous().numpy(), own))
            step()
    finally:
        writer.close()


def _config(dense: str | Path) -> Any:
    with as_input_error(f"model {str(dense)!r} could not be read"):
        return ModelLocation(str(Path(dense).expanduser())).config()


def _known(config: Any) -> _Class:
    name = next(iter(config.architectures or ()), None)
    if name not in _CLASSES:
        raise InputError(
            f"llama.cpp cannot be measured with a model of class {name}: only {', '.join(_CLASSES)} can be written as "
            "GGUF here; leave out --against"
        )
    known = _CLASSES[name]
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if known.architecture == "gemma3":
        full = [i % _GLOBAL_LAYER == _GLOBAL_LAYER - 1 for i in range(config.num_hidden_layers)]
        expected = ["full_attention" if whole else "sliding_attention" for whole in full]
        local = _rope(config, "sliding_attention")
        if kinds != expected or local.get("rope_theta") != _LOCAL_BASE:
            raise InputError(
                "llama.cpp runs Gemma 3 only with five local layers for each global one; leave out --against"
            )
        if config.query_pre_attn_scalar != config.head_dim:
            raise InputError(
                f"llama.cpp scales queries of Gemma 3 by head_dim ({config.head_dim}), not by query_pre_attn_scalar "
                f"({config.query_pre_attn_scalar}); leave out --against"
            )
    elif "sliding_attention" in kinds or getattr(config, "sliding_window", None) is not None:
        raise InputError(f"llama.cpp has no sliding window for {name}; leave out --against")
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"rope_type {kind!r} cannot be written as GGUF here; leave out --against")
    return known


def _rope(config: Any, layer: str = "full_attention") -> dict[str, Any]:
    """The settings of rotary embeddings, of one kind of layers if they differ."""
    found = dict(config.rope_parameters or {})
    return dict(found.get(layer, found))


def _write_settings(writer: GGUFWriter, config: Any) -> None:
    rope, heads = _rope(config), config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if getattr(config, "model_type", "").startswith("gemma3"):
        writer.add_sliding_window(config.sliding_window)


def _write_vocabulary(writer: GGUFWriter, size: int) -> None:
    """Token ``i`` is `` i``. SentencePiece's kind, because it needs no merges; U+2581 stands for a space there."""
    import gguf

    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"\u2581{token}" for token in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def _tensors(shards: Shards, names: Any, config: Any) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The name of each tensor in the folder and in GGUF, and its shape, in the folder's order."""
    for name in shards.entries:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings
        if name.endswith(".rotary_emb.inv_freq"):
            continue  # computed from the settings
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise InputError(f"tensor {name} has no name in GGUF; leave out --against")
        yield name, target, shards.describe(name)[1]


def _type(kind: str, target: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == "bf16" or shape[-1] % GROUP:
        return GGMLQuantizationType.BF16
    if target in ("token_embd.weight", "output.weight"):
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType[kind.upper()]


def _declare(writer: GGUFWriter, target: str, shape: tuple[int, ...], own: GGMLQuantizationType) -> None:
    import gguf
    import numpy

    if own == gguf.GGMLQuantizationType.F32:
        writer.add_tensor_info(target, shape, numpy.dtype(numpy.float32), 4 * shape[0])
        return
    stored = gguf.quant_shape_to_byte_shape(shape, own)
    writer.add_tensor_info(target, stored, numpy.dtype(numpy.uint8), stored[0] * stored[1], raw_dtype=own)


def _values(shards: Shards, name: str, known: _Class, config: Any) -> Tensor:
    """A tensor as llama.cpp wants it."""
    tensor = shards.read(name)
    if name.endswith("norm.weight"):
        return tensor.float() + known.norm_shift
    module = name.rpartition(".")[0]
    if known.paired and module.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads
        if module.endswith("k_proj"):
            heads = getattr(config, "num_key_value_heads", None) or heads
        return paired_rows(tensor, heads)
    return tensor


def paired_rows(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k, or their bias, in llama.cpp's order. Within a head of ``2 half`` rows transformers rotates row
    ``i`` with row ``i + half``; llama.cpp has these two side by side, at ``2 i`` and ``2 i + 1``."""
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, -1, *rest).transpose(1, 2).reshape(tensor.shape)


def _rope_factors(config: Any) -> Tensor | None:
    """By what llama.cpp divides the rotary frequencies, for those of Llama 3.1; None for others."""
    if _rope(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    size = 2 * len(scaled)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    return torch.pow(torch.tensor(float(_rope(config)["rope_theta"])), -exponents) / scaled
