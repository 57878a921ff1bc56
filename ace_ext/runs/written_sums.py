"""Checks that the output of an unfinished run has not changed since it was written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ace_ext.cards import BASE_CARD, CARD
from ace_ext.errors import InputError
from ace_ext.formats import OutputWriter
from ace_ext.models.blocks import Block
from ace_ext.records import REPORT_NAME
from ace_ext.runs.own_files import MANIFEST_NAME

AT_THE_END = frozenset({CARD, BASE_CARD, REPORT_NAME, MANIFEST_NAME})
"""Files that :meth:`ace_ext.runs.unfinished.UnfinishedRun.finish` writes. It replaces files of these names that were
copied from the dense model."""


def check_written(model: Path, writer: OutputWriter, blocks: list[Block], sums: Mapping[str, Any]) -> None:
    """Compares checksums of a folder with those that were recorded when it was written.

    Args:
        model: the folder.
        writer: its writer.
        blocks: all blocks of the model.
        sums: ``rest`` and ``blocks``, the checksums of :class:`ace_ext.formats.OutputWriter`; only those of written
            blocks.

    Raises:
        InputError: they differ; the message names the file or the block.
    """
    rest = writer.rest(blocks)
    if rest is None:
        return
    kept = {name: value for name, value in sums["rest"].items() if name not in AT_THE_END}
    changed = [str(model / name) for name, value in kept.items() if rest.get(name) != value]
    for block in blocks:
        if block.name in sums["blocks"] and writer.written(block) != sums["blocks"][block.name]:
            changed.append(f"{block.name} in {model}")
    if changed:
        raise InputError(
            f"resume: {changed[0]} has changed since the run wrote it (its checksum differs); start over without "
            "--resume"
        )
