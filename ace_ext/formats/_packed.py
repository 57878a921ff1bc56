"""The packed formats (:mod:`ace_ext.packed`) as formats of a run: dense files, packed after the last block.

The order of blocks differs from the order of tensors in a file, and a packed file holds the hash of the dense file. So
blocks are written into dense files, with the crash safety of :class:`ace_ext.formats.dense.DenseWriter`. At the end
these are packed into a second folder, one tensor at a time, and compared; then the folders are exchanged.
"""

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ace_ext.errors import InputError
from ace_ext.formats._format import PACKED, REPLACED, DenseModel, OutputFormat, pattern_of
from ace_ext.formats.dense import DenseWriter
from ace_ext.models.blocks import Block
from ace_ext.packed import Codec
from ace_ext.packed.files import PackedShards, is_packed
from ace_ext.packed.packing import check_hashes, pack_into
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import PruneReport


class PackedWriter(DenseWriter):
    """Writes dense blocks and packs them at the end."""

    def __init__(self, folder: Path, codec: Codec) -> None:
        super().__init__(folder)
        self._codec = codec

    def check(self, dense: DenseModel) -> None:
        """As for the dense format. If the files were packed before a crash, checks that they restore every byte of the
        dense files."""
        if is_packed(self.folder):
            check_hashes(PackedShards(self.folder))
        else:
            super().check(dense)

    def rest(self, blocks: Iterable[Block]) -> dict[str, str] | None:
        """As for the dense format; None if the files have been packed."""
        return None if is_packed(self.folder) else super().rest(blocks)

    def finish(self, report: PruneReport) -> None:
        """Packs the model, checks that every byte can be restored, and replaces the folder with the packed one."""
        if is_packed(self.folder):
            return
        target = self.folder.with_name(PACKED)
        shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed here
        target.mkdir()
        pack_into(self.folder, target, self._codec, pattern_of(report))
        self.folder.rename(self.folder.with_name(REPLACED))
        target.rename(self.folder)


def packed_format(codec: Codec) -> OutputFormat:
    """The format of a run that packs with this codec."""

    def check(config: PruneConfig) -> None:
        if codec.needs_pattern and config.pattern is None:
            raise InputError(f"format {codec.name} is for N:M patterns; add --pattern 2:4, or choose another format")

    return OutputFormat(codec.name, f"packed: {codec.summary}", partial(PackedWriter, codec=codec), check, codec)
