"""Where blocks' weights are while a run walks over them: all in memory, or one block at a time from the files."""

from pathlib import Path

import torch
from torch import nn

from ace_ext.errors import InputError
from ace_ext.models.loading import DTYPES, check_dtype
from ace_ext.models.safetensors_files import Shards


def skeleton(folder: str | Path, shards: Shards | None, dtype: str = "auto") -> nn.Module:
    """The model of a folder with every parameter on the meta device; buffers, such as rotary frequencies, are real.
    The shards are told where its parameters lie.

    Dtypes are those that loading it with ``dtype`` gives (``auto``: the configuration's, or the files'), which of some
    routers is float32 whatever is asked for.

    Raises:
        InputError: the folder's configuration is none that transformers knows, or the dtype is none of ours.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    check_dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(folder)
        main = dtype_of(config, shards, dtype)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=main)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(
            f"model {str(folder)!r} could not be laid out: {' '.join(str(error).split())[:400]}"
        ) from error
    model.tie_weights()
    if shards is not None:
        shards.adopt(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype == main != torch.float32 and _stays_float32(model, name, main):
            tensor.data = tensor.data.float()
    return model.eval()


def dtype_of(config, shards: Shards | None, dtype: str) -> torch.dtype:
    """What a model's weights are loaded in, but for a few."""
    if dtype != "auto":
        return DTYPES[dtype]
    return getattr(config, "dtype", None) or (torch.float32 if shards is None else shards.dtype)


def _stays_float32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """By the lists that a model's class has for transformers to read when it loads the model in half precision."""
    parts = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        parts |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return any(f".{part}." in f".{name}." for part in parts)
