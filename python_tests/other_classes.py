"""One tiny random model of every encoder, encoder-decoder, vision, speech and contrastive class of the installed
transformers, with inputs for it.

Configurations are shrunk as in :mod:`every_class`. What a class needs beside that is in :data:`BESIDE`.
"""

import inspect
from typing import Any

import every_class
import torch
from torch import Tensor, nn

MAPPINGS = {
    "contrastive": ("ZERO_SHOT_IMAGE_CLASSIFICATION",),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"),
    "encoder": ("MASKED_LM", "TEXT_ENCODING"),
    "vision": ("IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "IMAGE"),
}
"""By kind, the mappings of transformers (``MODEL_FOR_…_MAPPING_NAMES``) whose classes are built: of each model type
one."""

_STAGES = {
    "embed_dim": 16,
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 2],
    "window_size": 2,
    "patch_size": 4,
    "image_size": 32,
}
_CONVOLUTIONS = {"hidden_sizes": [64, 64, 64, 96], "depths": [1, 1, 2, 1]}
_BACKBONE = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4}
_DETECTOR = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None} | {
    "backbone_config": _BACKBONE | {"out_features": ["stage2", "stage3", "stage4"]}
}
BESIDE: dict[str, dict[str, Any]] = every_class.BESIDE | {
    "conditional_detr": _DETECTOR,
    "convnext": _CONVOLUTIONS,
    "convnextv2": _CONVOLUTIONS,
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 4]},
    "dab-detr": _DETECTOR,
    "deformable_detr": _DETECTOR,
    "detr": _DETECTOR,
    "dinov3_convnext": _CONVOLUTIONS,
    "donut-swin": _STAGES,
    "esm": {"vocab_size": every_class.VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4},
    "hiera": {"depths": [1, 1, 2, 1]},
    "perceiver": {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 2},
    "reformer": {"is_decoder": False, "axial_pos_embds": False},
    "swin": _STAGES,
    "swinv2": _STAGES,
    "table-transformer": _DETECTOR,
    "wav2vec2-bert": {"vocab_size": every_class.VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": every_class.VOCABULARY},
    "videoprism_vision_model": {"tubelet_size": [1, 4, 4], "image_size": 16, "num_frames": 2},
}
"""What else a class needs, by its configuration's ``model_type``."""

TEXT_CONFIG = {"emu3", "llama4", "mllama"}
"""Types whose class takes the configuration of the text part."""
WORDS_ONLY = {"audioflamingo3", "modernvbert", "moss_transcribe_diarize", "musicflamingo", "qwen2_audio", "ultravbert"}
WORDS_ONLY |= {
    "glmasr",
    "granite_speech",
    "granite_speech_plus",
    "qwen3_asr",
    "voxtral",
    "vibevoice_asr",
    "shieldgemma2",
}
"""Language models with another tower. They are called with text alone here."""
LARGE = {"align", "convnext", "convnextv2", "dinov3_convnext", "efficientnet", "mobilevitv2", "pvt"}
"""Types whose stages make images of 16 pixels too small."""

CANNOT = {"vibevoice": "its decoder of sound cannot be shrunk by name"}
"""What is not built here, and why."""
SAMPLES = 3


def classes() -> dict[str, tuple[str, str]]:
    """By ``model_type``: the kind and the name of its class. A class that several types share is there once."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str]] = {}
    names: set[str] = set()
    for kind, mappings in MAPPINGS.items():
        for mapping in mappings:
            for model_type, known in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
                name = known if isinstance(known, str) else known[0]
                if model_type not in found and name not in names:
                    found[model_type] = (kind, name)
                    names.add(name)
    return found


def config_of(model_type: str) -> Any:
    """A small configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**every_class.shrunk(kind(), BESIDE.get(model_type, {})))


def build(model_type: str) -> nn.Module:
    """The model, float32, with random matrices, in evaluation mode."""
    import transformers

    _, name = classes()[model_type]
    config = config_of(model_type)
    if model_type in TEXT_CONFIG:
        config = config.get_text_config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, name)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2 and parameter.requires_grad:
                    parameter.normal_(0.0, 0.15)
            for module in model.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0  # as some classes are loaded
    return model


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the settings that a configuration, or a part of it, has."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "model_type"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """A batch of random inputs, by the arguments of the model's forward."""
    config: Any = model.config
    taken = inspect.signature(model.forward).parameters
    draw = torch.Generator().manual_seed(0)
    size = _setting(config, "image_size", "img_size", default=32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _setting(config, "num_channels", "in_channels", "in_chans", default=3)
    found: dict[str, Tensor] = {}
    if config.model_type == "siglip2":
        side, patch = 4, config.vision_config.patch_size
        found["pixel_values"] = torch.randn(SAMPLES, side * side, channels * patch * patch, generator=draw)
        found["pixel_attention_mask"] = torch.ones(SAMPLES, side * side, dtype=torch.long)
        found["spatial_shapes"] = torch.full((SAMPLES, 2), side)
    elif "pixel_values" in taken and config.model_type not in WORDS_ONLY:
        if config.model_type in LARGE:
            height = width = 64
        frames = _setting(config, "num_frames")
        shape = (SAMPLES, channels, height, width) if frames is None else (SAMPLES, frames, channels, height, width)
        found["pixel_values"] = torch.randn(shape, generator=draw)
    if "pixel_values_videos" in taken:
        frames = _setting(config, "frames_per_clip", default=2)
        found["pixel_values_videos"] = torch.randn(SAMPLES, frames, channels, height, width, generator=draw)
    if "input_values" in taken and config.model_type not in WORDS_ONLY:
        found["input_values"] = torch.randn(_sound(config), generator=draw)
    if "inputs" in taken:
        found["inputs"] = torch.randint(4, every_class.VOCABULARY, (SAMPLES, 12), generator=draw)
    if "input_features" in taken and "input_values" not in taken and config.model_type not in WORDS_ONLY:
        found["input_features"] = torch.randn(_features(config), generator=draw)
    words = model.main_input_name == "input_ids" or "pixel_values" in taken or config.model_type in WORDS_ONLY
    if "input_ids" in taken and words and "input_features" not in found:
        found["input_ids"] = torch.randint(4, every_class.VOCABULARY, (SAMPLES, 12), generator=draw)
    if "decoder_input_ids" in taken:
        found["decoder_input_ids"] = torch.randint(4, every_class.VOCABULARY, (SAMPLES, 8), generator=draw)
    return found


def outputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All tensors of floating point that a forward returns, in their order."""

    def tensors(value):
        if isinstance(value, Tensor):
            return [value] if value.is_floating_point() else []
        if isinstance(value, dict):
            value = value.values()
        elif not isinstance(value, list | tuple):
            return []
        return [tensor for part in value for tensor in tensors(part)]

    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # some models mask or drop at random
        return tensors(model(**inputs))


def _sound(config: Any) -> tuple[int, ...]:
    """The shape of sound: of a spectrogram, or of a waveform."""
    if _setting(config, "max_length") and _setting(config, "num_mel_bins"):
        return SAMPLES, config.max_length, config.num_mel_bins
    if "omniasr" in config.model_type or config.model_type == "vibevoice":
        return SAMPLES, 1, 3200
    return SAMPLES, 3200


def _features(config: Any) -> tuple[int, ...]:
    """The shape of a spectrogram: Whisper has frames last."""
    bands = _setting(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", default=80)
    if config.model_type == "whisper":
        return SAMPLES, bands, 2 * config.max_source_positions
    return SAMPLES, 64, bands
