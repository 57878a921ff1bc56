"""Where blocks' weights are while a run walks over them: all in memory, or one block at a time from the files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .checkpoint import DTYPES, check_dtype
from .errors import InputError
from .model_walk import Block, check_weights
from .shards import Shards


class BlockSource(Protocol):
    """Hands out blocks whose weights can be read and written while they are held."""

    blocks: list[Block]

    def hold(self, index: int) -> contextlib.AbstractContextManager[Block]: ...


class ResidentBlocks:
    """Blocks of a model that is in memory as a whole."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks

    @contextlib.contextmanager
    def hold(self, index: int) -> Iterator[Block]:
        yield self.blocks[index]


class OffloadedBlocks:
    """Blocks of a :func:`skeleton`: read from the shards when they are held, forgotten afterwards."""

    def __init__(self, blocks: list[Block], shards: Shards, device: torch.device | str) -> None:
        self.blocks, self.shards, self.device = blocks, shards, device

    @contextlib.contextmanager
    def hold(self, index: int) -> Iterator[Block]:
        block = self.blocks[index]
        load_(block.module, block.name, self.shards, self.device)
        for fused in block.experts:
            fused.bind()
        try:
            check_weights([block])
            yield block
        finally:
            unload_(block.module)
            for fused in block.experts:
                fused.bind()


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


def load_(module: nn.Module, prefix: str, shards: Shards, device: torch.device | str) -> None:
    """Gives a module of the skeleton its parameters from the shards, and its buffers where the files hold them."""
    for name, parameter in list(module.named_parameters()):
        value = shards.read(f"{prefix}.{name}").to(device, parameter.dtype)
        if value.shape != parameter.shape:
            raise InputError(
                f"{prefix}.{name} must be {list(parameter.shape)} by the configuration (got {list(value.shape)})"
            )
        _assign(module, name, nn.Parameter(value, requires_grad=False))
    for name, buffer in list(module.named_buffers()):
        stored = f"{prefix}.{name}" in shards
        value = shards.read(f"{prefix}.{name}") if stored else buffer
        _assign(module, name, value.to(device, buffer.dtype), buffer=True)


def unload_(module: nn.Module) -> None:
    """Puts a module's parameters back on the meta device."""
    for name, parameter in list(module.named_parameters()):
        _assign(module, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))


def _assign(module: nn.Module, name: str, value: torch.Tensor, buffer: bool = False) -> None:
    owner, _, leaf = name.rpartition(".")
    target = module.get_submodule(owner)
    (target._buffers if buffer else target._parameters)[leaf] = value


@contextlib.contextmanager
def entrance(model: nn.Module, blocks: list[Block], shards: Shards, device: torch.device | str) -> Iterator[None]:
    """While it lasts, the skeleton's parts before its blocks are in memory, so that hidden states can enter them.

    Everything outside the blocks is loaded but the LM head, which no forward reaches that ends at the last block.
    """
    inside = {id(module) for block in blocks for module in block.module.modules()}
    head = model.get_output_embeddings()
    outside = [
        (name, module)
        for name, module in model.named_modules()
        if id(module) not in inside and module is not head and name
    ]
    loaded = []
    try:
        for name, module in outside:
            own = {n for n, _ in module.named_parameters(recurse=False)} | {
                n for n, _ in module.named_buffers(recurse=False)
            }
            if own:
                _load_own_(module, name, shards, device)
                loaded.append(module)
        yield
    finally:
        for module in loaded:
            for name, parameter in list(module.named_parameters(recurse=False)):
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _load_own_(module: nn.Module, prefix: str, shards: Shards, device: torch.device | str) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = shards.read(f"{prefix}.{name}").to(device, parameter.dtype)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    for name, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[name] = buffer.to(device)
