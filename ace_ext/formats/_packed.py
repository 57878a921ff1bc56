"""The packed formats (:mod:`ace_ext.packed`) as formats of a run: the dense files, packed once every block is done.

Blocks are pruned in another order than tensors lie in a file, and a packed file holds the hash of the dense one. So
blocks are written into dense files, as :class:`ace_ext.formats.dense.DenseWriter` does, with its safety against
crashes; at the end these are packed beside, one tensor at a time, compared, and exchanged.
"""

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ace_ext.errors import InputError
from ace_ext.formats._format import DenseModel, OutputFormat
from ace_ext.formats.dense import DenseWriter
from ace_ext.models.blocks import Block
from ace_ext.packed import Codec
from ace_ext.packed.files import PackedShards, is_packed
from ace_ext.packed.packing import check_hashes, pack_into
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.pattern import SparsityPattern
from ace_ext.records import PruneReport

PACKED, REPLACED = "packed", "dense"
"""Folders beside that of the model: the packed one until it is complete, and the dense one once it is replaced."""


class PackedWriter(DenseWriter):
    """Writes dense blocks, and packs them at the end."""

    def __init__(self, folder: Path, codec: Codec) -> None:
        super().__init__(folder)
        self._codec = codec

    def check(self, dense: DenseModel) -> None:
        """As for the dense format. If the files have been packed already, before a crash, that each byte of the dense
        ones comes back."""
        if is_packed(self.folder):
            check_hashes(PackedShards(self.folder))
        else:
            super().check(dense)

    def rest(self, blocks: Iterable[Block]) -> dict[str, str] | None:
        """As for the dense format; None if the files have been packed."""
        return None if is_packed(self.folder) else super().rest(blocks)

    def finish(self, report: PruneReport) -> None:
        """Packs the model, checks that every byte of it comes back, and puts the packed folder in its place."""
        if is_packed(self.folder):
            return
        target = self.folder.with_name(PACKED)
        shutil.rmtree(target, ignore_errors=True)  # of a run that was killed here
        target.mkdir()
        pack_into(self.folder, target, self._codec, pattern_of(report))
        self.folder.rename(self.folder.with_name(REPLACED))
        target.rename(self.folder)


def exchanging(folder: Path) -> bool:
    """Whether a run was killed while :meth:`PackedWriter.finish` exchanged the folders in its ``folder``."""
    return not (folder / "model").exists() and (folder / PACKED).is_dir() and (folder / REPLACED).is_dir()


def complete(folder: Path) -> None:
    """Ends the exchange of a run that was killed in it."""
    (folder / PACKED).rename(folder / "model")


def packed_format(codec: Codec) -> OutputFormat:
    """The format of a run that writes by this codec."""

    def check(config: PruneConfig) -> None:
        if codec.needs_pattern and config.pattern is None:
            raise InputError(f"format {codec.name} is for N:M patterns; give one, as --pattern 2:4, or another format")

    return OutputFormat(codec.name, f"packed: {codec.summary}", partial(PackedWriter, codec=codec), check, codec)


def pattern_of(report: PruneReport) -> tuple[int, int] | None:
    """N and M of a report; None without a pattern."""
    text = report.config.get("pattern")
    if not text:
        return None
    pattern = SparsityPattern.parse(text)
    return pattern.keep_n, pattern.group_m
