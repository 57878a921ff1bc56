"""Output formats: how a pruned model is written. One file each, which declares its name and its writer.

Every file of this package that defines ``FORMAT`` is registered; a file whose name starts with ``_`` is not a format.
To add a format, add a file: ``ace-prune run --format`` and the documentation read the registry. May import ``models``
and what lies below it.
"""

import pkgutil
from importlib import import_module

from ace_ext.errors import InputError
from ace_ext.formats._format import DenseModel, OutputFormat, OutputWriter

FORMATS: dict[str, OutputFormat] = {}
"""Every output format by name."""

DEFAULT_FORMAT = "dense"
"""The format of ``ace-prune run`` without ``--format``."""


def register(output_format: OutputFormat) -> None:
    """Registers a format that is not a file of this package.

    Raises:
        ValueError: the name is taken.
    """
    if output_format.name in FORMATS:
        raise ValueError(f"format {output_format.name!r} is registered already; choose another name")
    FORMATS[output_format.name] = output_format


def format_named(name: str) -> OutputFormat:
    """The format of this name.

    Raises:
        InputError: no format has this name.
    """
    if name not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)} (got {name!r})")
    return FORMATS[name]


for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        register(import_module(f"{__name__}.{_module.name}").FORMAT)

__all__ = ["DEFAULT_FORMAT", "FORMATS", "DenseModel", "OutputFormat", "OutputWriter", "format_named", "register"]
