"""What an output format is: the types that every file of this package uses."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ace_ext.models.blocks import Block
from ace_ext.models.safetensors_files import Shards


@dataclass(frozen=True)
class DenseModel:
    """The model that a run reads."""

    model: nn.Module
    tokenizer: Any
    blocks: list[Block]
    folder: Path | None
    """Its folder on this machine, if it has one."""
    shards: Shards | None
    """Its files, where they hold the weights just as they will be written: they can be copied and patched."""


class OutputWriter(Protocol):
    """Writes one output folder, block by block. What it has written must survive a crash: a resumed run opens a writer
    on the same folder, skips :meth:`lay_out`, and goes on with the first block that was not written."""

    def lay_out(self, dense: DenseModel) -> None:
        """Writes what does not depend on the pruned blocks: configuration, tokenizer, other weights."""
        ...

    def check(self, dense: DenseModel) -> None:
        """Raises :class:`ace_ext.InputError` for a weight that this format cannot hold, before anything is pruned."""
        ...

    def write(self, block: Block) -> None:
        """Writes a pruned block, and returns once it is on the disk."""
        ...


@dataclass(frozen=True)
class OutputFormat:
    """One format of ``ace-prune run --format``."""

    name: str
    summary: str
    open: Callable[[Path], OutputWriter]
    """A writer for a folder that exists."""
