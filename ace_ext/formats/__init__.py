"""Output formats: how a pruned model is written. Each file declares one format: its name and its writer.

Every file of this package that defines ``FORMAT`` is registered; a file whose name starts with ``_`` is not a format.
To add a format, add a file: ``ace-prune run --format`` and the documentation read the registry. Each packed format, a
file of ``ace_ext.packed.codecs``, is a format too. May import ``packed``, the settings of ``pruning``, and the layers
below.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ace_ext._registry import Registry, files
from ace_ext.errors import InputError
from ace_ext.formats._format import (
    DenseModel,
    OutputFormat,
    OutputWriter,
    complete,
    exchanging,
    grid_of,
    pattern_of,
    table_grids_of,
)
from ace_ext.models.safetensors_files import Shards


def _packed_formats() -> dict[str, Callable[[], OutputFormat]]:
    """The packed formats by name. :mod:`ace_ext.packed` is imported when one of them is read: most runs do not pack."""
    codecs = files("ace_ext.packed.codecs", [str(Path(__file__).parents[1] / "packed" / "codecs")], "CODEC")

    def loader(codec: Callable[[], Any]) -> Callable[[], OutputFormat]:
        def load() -> OutputFormat:
            from ace_ext.formats._packed import packed_format

            return packed_format(codec())

        return load

    return {name: loader(codec) for name, codec in codecs.items()}


FORMATS: Registry[OutputFormat] = Registry("format", {**files(__name__, __path__, "FORMAT"), **_packed_formats()})
"""Every output format by name."""

DEFAULT_FORMAT = "dense"
"""The format of ``ace-prune run`` without ``--format``."""


def register(output_format: OutputFormat) -> None:
    """Registers a format that is not a file of this package.

    Raises:
        ValueError: the name is taken.
    """
    FORMATS.add(output_format)


def format_named(name: str) -> OutputFormat:
    """The format of this name.

    Raises:
        InputError: no format has this name.
    """
    if name not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)} (got {name!r})")
    return FORMATS[name]


def written_shards(folder: str | Path, mapped: bool = True) -> Shards:
    """The weights of a folder of any format, read like those of a dense folder.

    Args:
        folder: the folder.
        mapped: whether packed weights are mapped from their files.

    Raises:
        InputError: its files are missing or damaged.
    """
    from ace_ext.packed.compressed_tensors import CompressedShards, is_compressed  # imported here: most runs read none
    from ace_ext.packed.files import PackedShards, is_packed

    if is_packed(folder):
        return PackedShards(folder, mapped=mapped)
    return CompressedShards(folder) if is_compressed(folder) else Shards(folder)


__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "DenseModel",
    "OutputFormat",
    "OutputWriter",
    "complete",
    "exchanging",
    "format_named",
    "grid_of",
    "pattern_of",
    "register",
    "table_grids_of",
    "written_shards",
]
