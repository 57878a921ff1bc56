"""The types of output formats: the declaration, the writer and the dense model. Also the folders that a packed format
exchanges."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.models.blocks import Block
from ace_ext.models.safetensors_files import Shards
from ace_ext.models.tokenizer import Tokenizer
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.groups import SparsityPattern
from ace_ext.pruning.method import quantize_of
from ace_ext.records import REPORT_NAME, PruneReport

if TYPE_CHECKING:
    from ace_ext.packed import Codec, Kept


@dataclass(frozen=True)
class DenseModel:
    """The model that a run reads."""

    model: Any
    tokenizer: Tokenizer
    blocks: list[Block]
    folder: Path | None
    """Its folder on this machine, if it has one."""
    shards: Shards | None
    """Its safetensors files, if they hold the weights exactly as the output will. They can then be copied and patched.
    Else None."""


class OutputWriter(Protocol):
    """Writes one output folder, block by block.

    Written blocks must survive a crash: a resumed run opens a writer on the same folder, skips :meth:`lay_out`, and
    continues with the first unwritten block.
    """

    @property
    def shards(self) -> Shards:
        """The dense files that blocks are written into."""
        ...

    def lay_out(self, dense: DenseModel) -> None:
        """Writes everything that does not depend on pruned blocks: configuration, tokenizer, other weights."""
        ...

    def check(self, dense: DenseModel) -> None:
        """Raises :class:`ace_ext.InputError` for a weight that this format cannot store. Called before any block is
        pruned."""
        ...

    def write(self, block: Block) -> None:
        """Writes a pruned block; it is synced to the disk when this returns."""
        ...

    def finish(self, report: PruneReport) -> None:
        """Called after every block has been written. A resumed run may call it again."""
        ...

    def written(self, block: Block) -> str:
        """A checksum of a block's tensors in the folder. Called only after :meth:`check`, like :meth:`rest`."""
        ...

    def rest(self, blocks: Iterable[Block]) -> dict[str, str] | None:
        """For each file of the folder, by its name, a checksum of its content outside the blocks. None once the output
        is in its final form: :meth:`check` verifies that."""
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
    """Raises :class:`ace_ext.InputError` for settings whose result this format cannot store."""
    check_model: Callable[[Any, list[Block], Grid | None], None] = lambda model, blocks, grid: None
    """Raises :class:`ace_ext.InputError` for a model whose blocks the format cannot store if they are on this grid, as
    far as that shows without the files."""
    codec: "Codec | None" = None
    """The codec, if this is a packed format. Packing takes place at the end."""
    size: "Callable[[Kept], int] | None" = None
    """The bytes of a pruned matrix in this format; None: those of the dense one."""


PACKED, REPLACED = "packed", "dense"
"""Folders of an unfinished run beside ``model``. A format that converts writes the first, and then puts it in place of
``model``, which becomes the second."""


def exchanging(folder: Path) -> bool:
    """Whether a run was killed while it exchanged these folders in ``folder``."""
    return not (folder / "model").exists() and (folder / PACKED).is_dir() and (folder / REPLACED).is_dir()


def complete(folder: Path) -> None:
    """Completes the exchange after a run was killed during it."""
    (folder / PACKED).rename(folder / "model")


def pattern_of(report: PruneReport) -> tuple[int, int] | None:
    """N and M of a report; None without a pattern."""
    text = report.config.get("pattern")
    if not text:
        return None
    pattern = SparsityPattern.parse(text)
    return pattern.keep_n, pattern.group_m


def grid_of(report: PruneReport) -> Grid | None:
    """The grid of a report's method; None if it does not quantize.

    Raises:
        InputError: its stage ``quantize`` names no grid.
    """
    with _known_grids():
        stage = quantize_of(str(report.config.get("method") or ""))
    return None if stage is None else stage.grid


def table_grids_of(report: PruneReport) -> dict[str, Grid]:
    """The grids of the tables that a report names, by each name of their tensors.

    Raises:
        InputError: one is no grid.
    """
    with _known_grids():
        return {name: Grid(table.bits, table.group) for table in report.embeddings for name in table.names}


@contextmanager
def _known_grids() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{REPORT_NAME} names no grid that ace-prune knows: {error}; prune the model again") from error
