"""Access to the blocks' weights during a run: all are in memory, or the files are read one block at a time."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import input_embedding, output_head, tie_weights_
from ace_ext.models.blocks import Block, check_weights
from ace_ext.models.safetensors_files import Shards, all_names


class BlockSource(Protocol):
    """Gives access to blocks. A block's weights can be read and written while it is loaded."""

    blocks: list[Block]

    def loaded(self, index: int) -> contextlib.AbstractContextManager[Block]:
        """Within this context the weights of block ``index`` are in memory."""

    def way_out(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within this context the last block's outputs can become logits (:class:`ace_ext.models.tail.Tail`)."""

    def entrance(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within this context tokens can enter the blocks of ``model``."""

    def outside_loaded(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within this context each module of ``model`` outside the blocks has its weights while it runs."""

    def outside_held(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within this context all modules of ``model`` outside the blocks have their weights."""


class ResidentBlocks:
    """Blocks of a model that is in memory as a whole."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[Block]:
        """Gives the block: its weights are in memory."""
        yield self.blocks[index]

    def way_out(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Does nothing: all weights are in memory."""
        return contextlib.nullcontext()

    def entrance(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Does nothing: all weights are in memory."""
        return contextlib.nullcontext()

    def outside_loaded(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Does nothing: all weights are in memory."""
        return contextlib.nullcontext()

    def outside_held(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Does nothing: all weights are in memory."""
        return contextlib.nullcontext()


class OffloadedBlocks:
    """Blocks of a :func:`ace_ext.models.skeleton.skeleton`: read from the shards when they are loaded, dropped
    afterwards. Writing changed weights back is the caller's work."""

    def __init__(self, blocks: list[Block], shards: Shards, device: torch.device | str) -> None:
        self.blocks, self.shards, self.device = blocks, shards, device
        self._ahead: ReadAhead | None = None
        self._written: Callable[[Block], Shards | None] = lambda block: None

    def read_pruned_from(self, files: Callable[[Block], Shards | None]) -> None:
        """From now on blocks that were pruned and written already are read from there. ``files``: those of a block;
        None for any other block."""
        self._written = files
        if self._ahead is not None:
            self._ahead.forget()  # the next block may have been read from the dense model's files

    def read_ahead(self) -> None:
        """Turns on reading ahead: the next block is read while one is in use, so two are in memory."""
        self._ahead = ReadAhead(self.blocks, self.shards_of, torch.device(self.device))

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[Block]:
        """Reads the block's weights and checks them (:func:`ace_ext.models.blocks.check_weights`)."""
        block = self.blocks[index]
        shards = self.shards_of(block)
        read = shards.read if self._ahead is None else self._ahead.take(index)
        load_(block.module, block.name, shards, self.device, read)
        for fused in block.fused:
            fused.bind()
        try:
            check_weights([block])
            yield block
        finally:
            unload_(block.module)
            for fused in block.fused:
                fused.bind()

    def shards_of(self, block: Block) -> Shards:
        """The files from which the block's weights are read."""
        return self._written(block) or self.shards

    def way_out(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Loads the weights after the blocks."""
        return way_out(model, self.blocks, self.shards, self.device)

    @contextlib.contextmanager
    def entrance(self, model: nn.Module) -> Iterator[None]:
        """Loads the weights before the blocks, and those of the first block."""
        with entrance(model, self.blocks, self.shards, self.device), self.loaded(0):
            yield  # the first block too: the form of a block's output is known only after one has run

    def outside_loaded(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Reads the weights of each module outside the blocks (embedding, head and others) when it is called."""
        return outside_loaded(model, self.blocks, self.shards, self.device)

    def outside_held(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Reads the weights of all modules outside the blocks, and drops them afterwards."""
        return outside_held(model, self.blocks, self.shards, self.device)


Read = Callable[[str], torch.Tensor]
"""Returns a tensor on the CPU, given its name in the model."""


class ReadAhead:
    """Reads the next block's parameters in a thread, while the caller works with the current block.

    Args:
        blocks: of a skeleton.
        shards_of: the files of a block.
        device: where the parameters will go.
    """

    def __init__(self, blocks: list[Block], shards_of: Callable[[Block], Shards], device: torch.device) -> None:
        self._blocks, self._shards_of, self._pinned = blocks, shards_of, device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._next: tuple[int, Future[dict[str, torch.Tensor]]] | None = None

    def forget(self) -> None:
        """Nothing that was read ahead is taken."""
        self._next = None

    def take(self, index: int) -> Read:
        """Returns a function that reads the parameters of block ``index``, each once. They are in memory already if
        this block follows the one that was taken last. The thread starts to read the next block.

        Raises:
            InputError: as :meth:`ace_ext.models.safetensors_files.Shards.read`.
        """
        tensors: dict[str, torch.Tensor] = {}
        if self._next is not None and self._next[0] == index:
            tensors = self._next[1].result()
            self._next = None
        if index + 1 < len(self._blocks) and (self._next is None or self._next[0] != index + 1):
            self._next = (index + 1, self._thread.submit(self._read, index + 1))
        shards = self._shards_of(self._blocks[index])
        return lambda name: tensors.pop(name) if name in tensors else shards.read(name)

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        block = self._blocks[index]
        shards = self._shards_of(block)
        names = [f"{block.name}.{name}" for name, _ in block.module.named_parameters()]
        return {name: self._read_one(shards, name) for name in names}

    def _read_one(self, shards: Shards, name: str) -> torch.Tensor:
        tensor = shards.read(name)
        return tensor.pin_memory() if self._pinned else tensor  # a GPU copies it asynchronously; not run on one


def load_(module: nn.Module, prefix: str, shards: Shards, device: torch.device | str, read: Read | None = None) -> None:
    """Reads a module's parameters from the shards, and those buffers that the files hold; other buffers are moved to
    ``device``. ``prefix``: the module's name in the model; ``read``: reads parameters in place of the shards.

    Raises:
        InputError: a tensor is missing, or its shape is not that of the configuration.
    """
    read = read or shards.read
    for name, parameter in list(module.named_parameters()):
        value = read(f"{prefix}.{name}").to(device, parameter.dtype, non_blocking=True)
        if value.shape != parameter.shape:
            raise InputError(
                f"{prefix}.{name} must be {list(parameter.shape)} by the configuration (got {list(value.shape)})"
            )
        _set_parameter(module, name, value)
    for name, buffer in list(module.named_buffers()):
        stored = f"{prefix}.{name}" in shards
        value = shards.read(f"{prefix}.{name}") if stored else buffer
        _set_buffer(module, name, value.to(device, buffer.dtype))


def unload_(module: nn.Module) -> None:
    """Moves a module's parameters to the meta device, which frees their memory."""
    for name, parameter in list(module.named_parameters()):
        _set_parameter(module, name, parameter.detach().to("meta"))


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _set_buffer(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._buffers[leaf] = value


@contextlib.contextmanager
def entrance(model: nn.Module, blocks: list[Block], shards: Shards, device: torch.device | str) -> Iterator[None]:
    """Within this context the skeleton's modules outside the blocks are in memory, so that a forward pass can reach the
    blocks. The LM head is left out: a pass that ends at the last block does not use it.
    """
    head = output_head(model)
    outside = [(name, module) for name, module in _outside(model, blocks) if module is not head and name]
    loaded: list[nn.Module] = []
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
                _set_parameter(module, name, parameter.detach().to("meta"))
        tie_weights_(model)  # loading and freeing the embedding separated it from a tied head


@contextlib.contextmanager
def outside_loaded(model: nn.Module, blocks: list[Block], shards: Shards, device: torch.device | str) -> Iterator[None]:
    """Within this context each of the skeleton's modules outside the blocks is in memory while it runs, also the head.
    A whole forward pass never needs memory for both the embedding and the head."""
    names = all_names(model)

    def read(parameter: nn.Parameter) -> torch.Tensor:
        known = names[id(parameter)]
        return shards.read(shards.stored_name(known) or known[0]).to(device, parameter.dtype)

    with contextlib.ExitStack() as hooks:
        for _, module in _outside(model, blocks):
            hooks.enter_context(_loaded_when_called(module, read, device))
        yield


@contextlib.contextmanager
def outside_held(model: nn.Module, blocks: list[Block], shards: Shards, device: torch.device | str) -> Iterator[None]:
    """Within this context all of the skeleton's modules outside the blocks are in memory: code outside a module may
    read its weights, such as those of positions."""
    names = all_names(model)
    values: dict[int, nn.Parameter] = {}
    before: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []
    try:
        for _, module in _outside(model, blocks):
            own = dict(module.named_parameters(recurse=False))
            before.append((module, own))
            for name, parameter in own.items():
                if id(parameter) not in values:
                    known = names[id(parameter)]
                    value = shards.read(shards.stored_name(known) or known[0]).to(device, parameter.dtype)
                    values[id(parameter)] = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = values[id(parameter)]
            for name, buffer in list(module.named_buffers(recurse=False)):
                _set_buffer(module, name, buffer.to(device))
        yield
    finally:
        for module, own in before:
            module._parameters.update(own)  # the same objects as before, so that tied ones stay tied


@contextlib.contextmanager
def _loaded_when_called(
    module: nn.Module, read: Callable[[nn.Parameter], torch.Tensor], device: torch.device | str
) -> Iterator[None]:
    """Within this context calls of the module get the values of its own parameters by ``read``, and drop them again.

    Between calls it has placeholders on the device: some models move tokens to the device of the embedding's weight
    before they call it, and on the meta device the tokens would be lost. Placeholders are NaN, so that code that reads
    them is noticed.
    """
    own = dict(module.named_parameters(recurse=False))
    number = {name: torch.full((), torch.nan, dtype=p.dtype, device=device) for name, p in own.items()}
    stand_ins = {name: nn.Parameter(number[name].expand(p.shape), requires_grad=False) for name, p in own.items()}

    def load_(*_: object) -> None:
        for name, parameter in own.items():
            _set_parameter(module, name, read(parameter))
        for name, buffer in list(module.named_buffers(recurse=False)):
            _set_buffer(module, name, buffer.to(device))

    def unload_(*_: object) -> None:
        module._parameters.update(stand_ins)

    unload_()
    before = module.register_forward_pre_hook(load_)
    after = module.register_forward_hook(unload_, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        module._parameters.update(own)  # the same objects as before, so that tied ones stay tied


def _outside(model: nn.Module, blocks: list[Block]) -> list[tuple[str, nn.Module]]:
    """The modules of a model that are not in its blocks, by name."""
    inside = {id(module) for block in blocks for module in block.module.modules()}
    return [(name, module) for name, module in model.named_modules() if id(module) not in inside]


def _load_own_(module: nn.Module, prefix: str, shards: Shards, device: torch.device | str) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = shards.read(f"{prefix}.{name}").to(device, parameter.dtype)
        _set_parameter(module, name, value)
    for name, buffer in list(module.named_buffers(recurse=False)):
        _set_buffer(module, name, buffer.to(device))


@contextlib.contextmanager
def way_out(model: nn.Module, blocks: list[Block], shards: Shards, device: torch.device | str) -> Iterator[None]:
    """Within this context the skeleton's modules outside the blocks are in memory, so that the last block's outputs can
    become logits. The embedding is left out, unless the LM head is tied to it."""
    head, embedding = output_head(model), input_embedding(model)
    assert head is not None  # a causal language model has one
    name = next(name for name, module in model.named_modules() if module is head)
    tied = head.weight is embedding.weight
    with entrance(model, blocks, shards, device):
        if not tied:
            unload_(embedding)
            load_(head, name, shards, device)
        tie_weights_(model)
        try:
            yield
        finally:
            unload_(head)
