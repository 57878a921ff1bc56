"""The packed formats (:mod:`ace_ext.packed`) as formats of a run: dense files, packed after the last block.

The order of blocks differs from the order of tensors in a file, and a packed file holds the hash of the dense file. So
files are packed at the end (:class:`ace_ext.formats._converting.ConvertingWriter`), one tensor at a time, and compared.
"""

from functools import partial
from pathlib import Path

from ace_ext.errors import InputError
from ace_ext.formats._converting import ConvertingWriter
from ace_ext.formats._format import OutputFormat, grid_of, pattern_of, table_grids_of
from ace_ext.grids import Grid
from ace_ext.models.blocks import Block
from ace_ext.packed import Codec
from ace_ext.packed.files import PackedShards, is_packed
from ace_ext.packed.packing import check_hashes, pack_into
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import PruneReport


class PackedWriter(ConvertingWriter):
    """Writes dense blocks and packs them at the end."""

    def __init__(self, folder: Path, codec: Codec) -> None:
        super().__init__(folder)
        self._codec = codec

    @property
    def converted(self) -> bool:
        """Whether the files have been packed."""
        return is_packed(self.folder)

    def check_converted(self) -> None:
        """Checks that the packed files restore every byte of the dense ones."""
        check_hashes(PackedShards(self.folder))

    def convert(self, target: Path, report: PruneReport) -> None:
        """Packs the model, and checks that every byte can be restored."""
        pack_into(self.folder, target, self._codec, pattern_of(report), grid_of(report), table_grids_of(report))


def packed_format(codec: Codec) -> OutputFormat:
    """The format of a run that packs with this codec."""

    def check(config: PruneConfig) -> None:
        if codec.needs_pattern and config.pattern is None:
            raise InputError(f"format {codec.name} is for N:M patterns; add --pattern 2:4, or choose another format")

    def check_model(model: object, blocks: list[Block], grid: Grid | None) -> None:
        columns = [block.is_stored_transposed(child) for block in blocks for child in block.linears]
        if codec.needs_pattern and columns and all(columns):
            raise InputError(
                f"format {codec.name} needs N:M along the rows of the files, and the matrices of "
                f"{type(model).__name__} are stored transposed; use format bitmap"
            )

    opened = partial(PackedWriter, codec=codec)
    return OutputFormat(codec.name, f"packed: {codec.summary}", opened, check, check_model, codec, codec.size)
