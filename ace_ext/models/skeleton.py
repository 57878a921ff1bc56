"""Models whose parameters are on the meta device: structure, shapes and dtypes without the memory of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import (
    OWN_METHOD,
    check_version,
    initialise_,
    is_computed,
    is_left_out,
    model_of,
    no_init_weights,
    quantization_of,
    stays_float32,
    tie_weights_,
)
from ace_ext.models.loading import WEIGHT_DTYPES, check_causal, check_dtype, check_fit, check_plain
from ace_ext.models.location import ModelLocation, as_input_error, remote_code_allowed
from ace_ext.models.safetensors_files import Shards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Unpacking:
    """What loading takes if the files' weights must be converted: ``peak_bytes`` of memory in addition to the converted
    weights, and about ``seconds``."""

    peak_bytes: int
    seconds: float


def skeleton(folder: str | Path, shards: Shards | None, dtype: str = "auto", *, causal: bool = True) -> nn.Module:
    """The model of a folder with every parameter on the meta device; buffers, such as rotary frequencies, have data.
    The shards learn which of their tensors hold its parameters.

    Dtypes are those that loading it with ``dtype`` gives (``auto``: the configuration's, or the files'); some routers
    are float32 whatever ``dtype`` is. ``causal``: the model must predict the next token.

    Raises:
        InputError: transformers does not know the folder's configuration, it is not that of a causal language model
            although it must be, or ``dtype`` is not in :data:`ace_ext.models.loading.WEIGHT_DTYPES`.
    """
    check_version()
    check_dtype(dtype)
    with as_input_error(f"model {str(folder)!r} could not be laid out"):
        config = ModelLocation(str(folder)).config()
        if quantization_of(config) not in (OWN_METHOD, None if shards is None else shards.decodes):
            check_plain(str(folder), config)
        main = dtype_of(config, shards, dtype)
        model = empty_model(config, main)
    if causal:
        check_causal(str(folder), model)
    if shards is not None:
        shards.adopt(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype == main != torch.float32 and stays_float32(model, name, main):
            tensor.data = tensor.data.float()
    return model


def check_all_read(model: nn.Module, shards: Shards, source: str, *, strict: bool = False) -> None:
    """Checks that the shards hold all parameters of a skeleton and nothing else, as
    :func:`ace_ext.models.loading.load_model` checks a model. If both parameters and tensors are left over, transformers
    may know how to make the parameters from the tensors. Only ``load_model`` can find that out, so nothing is refused
    here, unless ``strict``.

    Raises:
        InputError: a parameter has no tensor, or no parameter or buffer is read from some tensor.
    """
    unread = [name for name in shards.unread(model) if not is_left_out(model, name)]
    missing = not_stored(model, shards)
    if strict or not (missing and unread):
        check_fit(source, missing, unread)
    for name, parameter in model.named_parameters():
        found = shards.describe(name)[1] if name in shards else tuple(parameter.shape)
        if found != tuple(parameter.shape):
            raise InputError(
                f"model {source!r}: its weights do not match its configuration ({name} is {list(found)} in the files, "
                f"and {list(parameter.shape)} by config.json); correct config.json, or fetch the files again"
            )


def not_stored(model: nn.Module, shards: Shards) -> list[str]:
    """The parameters of a skeleton for which the shards have no tensor under any of their names, and should."""
    stored = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in shards}
    return [name for name, p in model.named_parameters() if id(p) not in stored and not is_computed(model, name)]


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration, in evaluation mode, with every parameter on the meta device, tied ones tied.

    Raises what transformers raises for a configuration that it cannot build.
    """
    return without_weights(lambda: model_of(config, dtype, remote_code_allowed())).eval()


def without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """The model that ``make`` builds, with every parameter on the meta device, tied ones tied. Buffers have the data
    that they have in a loaded model."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = make()
    for name, module in model.named_modules():
        if module._non_persistent_buffers_set:  # GPT-J's constructor computes its sinusoids in the weights' dtype
            initialise_(model, name)
    tie_weights_(model)
    return model


def dtype_of(config: PreTrainedConfig, shards: Shards | None, dtype: str) -> torch.dtype:
    """The dtype that a model's weights are loaded in, apart from those that stay float32."""
    if dtype != "auto":
        return WEIGHT_DTYPES[dtype]
    stated: torch.dtype | None = getattr(config, "dtype", None)
    return stated or (torch.float32 if shards is None else shards.dtype)
