"""Formats whose files are converted from dense ones after the last block.

Blocks are written into dense files, with the crash safety of :class:`ace_ext.formats.dense.DenseWriter`. At the end
these are converted into a second folder; then the folders are exchanged.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from ace_ext.formats._format import PACKED, REPLACED, DenseModel
from ace_ext.formats.dense import DenseWriter
from ace_ext.models.blocks import Block
from ace_ext.records import PruneReport


class ConvertingWriter(DenseWriter):
    """Writes dense blocks and converts the files at the end."""

    @property
    def converted(self) -> bool:
        """Whether the folder holds converted files."""
        raise NotImplementedError

    def check_converted(self) -> None:
        """Raises :class:`ace_ext.InputError` if the converted files are damaged."""
        raise NotImplementedError

    def convert(self, target: Path, report: PruneReport) -> None:
        """Writes the converted files into an empty folder, compares them with the dense ones, and syncs them."""
        raise NotImplementedError

    def check(self, dense: DenseModel) -> None:
        """As for the dense format. If the files were converted before a crash, checks those."""
        if self.converted:
            self.check_converted()
        else:
            super().check(dense)

    def rest(self, blocks: Iterable[Block]) -> dict[str, str] | None:
        """As for the dense format; None if the files have been converted."""
        return None if self.converted else super().rest(blocks)

    def finish(self, report: PruneReport) -> None:
        """Converts the model and replaces the folder with the converted one."""
        if self.converted:
            return
        target = self.folder.with_name(PACKED)
        shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed here
        target.mkdir()
        self.convert(target, report)
        self.folder.rename(self.folder.with_name(REPLACED))
        target.rename(self.folder)
