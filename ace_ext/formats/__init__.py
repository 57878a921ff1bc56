"""Output formats: how a pruned model is written. Each file declares one format: its name and its writer.

Every file of this package that defines ``FORMAT`` is registered; a file whose name starts with ``_`` is not a format.
To add a format, add a file: ``ace-prune run --format`` and the documentation read the registry. Each packed format
(``ace_ext.packed.CODECS``) is a format too. May import ``packed``, the settings of ``pruning``, and the layers below.
"""

from pathlib import Path

from ace_ext._registry import add, discover
from ace_ext.errors import InputError
from ace_ext.formats._converting import complete, exchanging
from ace_ext.formats._format import DenseModel, OutputFormat, OutputWriter
from ace_ext.formats._packed import grid_of, packed_format, pattern_of
from ace_ext.models.safetensors_files import Shards
from ace_ext.packed import CODECS
from ace_ext.packed.compressed_tensors import CompressedShards, is_compressed
from ace_ext.packed.files import PackedShards, is_packed

FORMATS: dict[str, OutputFormat] = {}
"""Every output format by name."""

DEFAULT_FORMAT = "dense"
"""The format of ``ace-prune run`` without ``--format``."""


def register(output_format: OutputFormat) -> None:
    """Registers a format that is not a file of this package.

    Raises:
        ValueError: the name is taken.
    """
    add(FORMATS, output_format, "format")


def format_named(name: str) -> OutputFormat:
    """The format of this name.

    Raises:
        InputError: no format has this name.
    """
    if name not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)} (got {name!r})")
    return FORMATS[name]


def written_shards(folder: str | Path) -> Shards:
    """The weights of a folder of any format, read like those of a dense folder.

    Raises:
        InputError: its files are missing or damaged.
    """
    if is_packed(folder):
        return PackedShards(folder)
    return CompressedShards(folder) if is_compressed(folder) else Shards(folder)


for _format in discover(__name__, __path__, "FORMAT"):
    register(_format)
for _codec in CODECS.values():
    register(packed_format(_codec))

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
    "written_shards",
]
