"""Where blocks' weights are while a run walks over them: all in memory, or one block at a time from the files."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from ace_ext.errors import InputError
from ace_ext.models.blocks import Block, check_weights
from ace_ext.models.safetensors_files import Shards


class BlockSource(Protocol):
    """Hands out blocks whose weights can be read and written while they are held."""

    blocks: list[Block]

    def hold(self, index: int) -> contextlib.AbstractContextManager[Block]:
        """While it lasts, the block has its weights."""
        ...

    def entrance(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """While it lasts, tokens can enter the blocks of the model."""
        ...


class ResidentBlocks:
    """Blocks of a model that is in memory as a whole."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks

    @contextlib.contextmanager
    def hold(self, index: int) -> Iterator[Block]:
        yield self.blocks[index]

    def entrance(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


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

    @contextlib.contextmanager
    def entrance(self, model: nn.Module) -> Iterator[None]:
        with entrance(model, self.blocks, self.shards, self.device), self.hold(0):
            yield  # the first block too: what a block returns is only known once one has run


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
