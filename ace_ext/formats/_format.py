"""The types that every output format uses: its declaration, its writer and the model that it reads."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ace_ext.models.blocks import Block
from ace_ext.models.safetensors_files import Shards
from ace_ext.models.tokenizer import Tokenizer
from ace_ext.packed import Codec
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import PruneReport


@dataclass(frozen=True)
class DenseModel:
    """The model that a run reads."""

    model: Any
    tokenizer: Tokenizer
    blocks: list[Block]
    folder: Path | None
    """Its folder on this machine, if it has one."""
    shards: Shards | None
    """Its safetensors files, if they hold the weights exactly as they will be written, so that they can be copied and
    patched; else None."""


class OutputWriter(Protocol):
    """Writes one output folder, block by block.

    Written blocks must survive a crash: a resumed run opens a writer on the same folder, skips :meth:`lay_out`, and
    continues with the first block that was not written.
    """

    def lay_out(self, dense: DenseModel) -> None:
        """Writes everything that does not depend on the pruned blocks: configuration, tokenizer, other weights."""
        ...

    def check(self, dense: DenseModel) -> None:
        """Raises :class:`ace_ext.InputError` for a weight that this format cannot hold. Called before any block is
        pruned."""
        ...

    def write(self, block: Block) -> None:
        """Writes a pruned block; it is on the disk when this returns."""
        ...

    def finish(self, report: PruneReport) -> None:
        """Called when every block has been written. A resumed run may call it again."""
        ...

    def written(self, block: Block) -> str:
        """A checksum of what the folder holds of a block. Like :meth:`rest` only called after :meth:`check`."""
        ...

    def rest(self, blocks: Iterable[Block]) -> dict[str, str] | None:
        """For each file of the folder, by its name there, a checksum of what it holds beside the blocks; None once the
        output has its last form, which :meth:`check` compares with what it was made of."""
        ...


@dataclass(frozen=True)
class OutputFormat:
    """One format of ``ace-prune run --format``."""

    name: str
    summary: str
    """One line for help texts."""
    open: Callable[[Path], OutputWriter]
    """``open(folder)``: a writer for a folder that exists."""
    check: Callable[[PruneConfig], None] = lambda config: None
    """Raises :class:`ace_ext.InputError` for settings whose result this format cannot hold."""
    codec: Codec | None = None
    """The packed format that is written at the end, if it is one."""
