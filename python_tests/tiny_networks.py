"""Tiny random networks that are no causal language models, each with inputs of its forward, made from the real classes
without a download."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGE = {"image_size": 16, "patch_size": 4}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def ids(seqlen: int, batch: int = 3) -> Tensor:
    return torch.randint(3, 64, (batch, seqlen), generator=_generator())


def values(*shape: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, *shape, generator=_generator())


def _bert() -> nn.Module:
    config = transformers.BertConfig(**_BLOCKS, vocab_size=64, max_position_embeddings=64)
    return transformers.BertForSequenceClassification(config)


def _dinov2() -> nn.Module:
    size = {**_BLOCKS, "mlp_ratio": 2}
    size.pop("intermediate_size")
    return transformers.Dinov2Model(transformers.Dinov2Config(**size, **_IMAGE))


def _swin() -> nn.Module:
    """Its second stage is twice as wide as the first."""
    size = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
    return transformers.SwinModel(transformers.SwinConfig(**size, window_size=4))


def _whisper() -> nn.Module:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _SIDE.items()}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    size = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sides, **tokens, **size))


_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def _wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = transformers.Wav2Vec2Config(**_BLOCKS, **convolutions, **position, vocab_size=32)
    return transformers.Wav2Vec2ForCTC(config)


def _t5() -> nn.Module:
    size = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**size, decoder_start_token_id=0))


def _clip() -> nn.Module:
    text = {**_BLOCKS, "vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**_BLOCKS, **_IMAGE}, projection_dim=16)
    return transformers.CLIPModel(config)


NETWORKS: dict[str, tuple[Any, Any]] = {
    "bert": (_bert, lambda: {"input_ids": ids(12)}),
    "vit": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**_BLOCKS, **_IMAGE)),
        lambda: {"pixel_values": values(3, 16, 16)},
    ),
    "dinov2": (_dinov2, lambda: {"pixel_values": values(3, 16, 16)}),
    "swin": (_swin, lambda: {"pixel_values": values(3, 16, 16)}),
    "whisper": (_whisper, lambda: {"input_features": values(8, 20), "decoder_input_ids": ids(9)}),
    "wav2vec2": (_wav2vec2, lambda: {"input_values": values(200)}),
    "t5": (_t5, lambda: {"input_ids": ids(12), "decoder_input_ids": ids(9)}),
    "clip": (_clip, lambda: {"input_ids": ids(12), "pixel_values": values(3, 16, 16)}),
}
"""By name: what makes the model, and what makes its inputs."""


def make_network(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights, the same for a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NETWORKS[name][0]().eval()
        with torch.no_grad():
            for own, parameter in model.named_parameters():
                ones = "norm" in own and own.endswith("weight")
                parameter.normal_(1.0 if ones else 0.0, 0.2)
    return model.to(dtype)


def make_inputs(name: str, batches: int = 2) -> list[dict[str, Tensor]]:
    """Inputs of ``batches`` calls, which differ."""
    first = NETWORKS[name][1]()
    return [{key: x.roll(shift, -1) for key, x in first.items()} for shift in range(batches)]
