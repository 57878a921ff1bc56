"""Models whose parameters are on the meta device: structure, shapes and dtypes without the memory of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ace_ext.models._transformers import stays_float32
from ace_ext.models.loading import WEIGHT_DTYPES, check_dtype
from ace_ext.models.location import ModelLocation, as_input_error
from ace_ext.models.safetensors_files import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def skeleton(folder: str | Path, shards: Shards | None, dtype: str = "auto") -> nn.Module:
    """The model of a folder with every parameter on the meta device; buffers, such as rotary frequencies, are real.
    The shards are told where its parameters lie.

    Dtypes are those that loading it with ``dtype`` gives (``auto``: the configuration's, or the files'); some routers
    are float32 whatever ``dtype`` is.

    Raises:
        InputError: transformers does not know the folder's configuration, or ``dtype`` is none of
            :data:`ace_ext.models.loading.WEIGHT_DTYPES`.
    """
    check_dtype(dtype)
    with as_input_error(f"model {str(folder)!r} could not be laid out"):
        config = ModelLocation(str(folder)).config()
        main = dtype_of(config, shards, dtype)
        model = empty_model(config, main)
    if shards is not None:
        shards.adopt(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype == main != torch.float32 and stays_float32(model, name, main):
            tensor.data = tensor.data.float()
    return model


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration, in evaluation mode, with every parameter on the meta device, tied ones tied.

    Raises what transformers raises for a configuration that it cannot build.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    laid_out: nn.Module = model.eval()
    return laid_out


def dtype_of(config: PreTrainedConfig, shards: Shards | None, dtype: str) -> torch.dtype:
    """The dtype that a model's weights are loaded in, apart from those that stay float32."""
    if dtype != "auto":
        return WEIGHT_DTYPES[dtype]
    stated: torch.dtype | None = getattr(config, "dtype", None)
    return stated or (torch.float32 if shards is None else shards.dtype)
