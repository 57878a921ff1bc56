"""Packed model folders: the files of a pruned model without its zeros, and back, byte for byte.

``matrix.py`` and ``quantized_matrix.py`` are the layouts that kernels read. Each file of ``codecs`` defines ``CODEC``,
a format of files; a file whose name starts with ``_`` is not one. ``compressed_tensors.py`` writes the form of another
library. ``docs/formats.md`` describes the formats. May import ``models`` and the layers below.
"""

from ace_ext._registry import Registry, files
from ace_ext.errors import InputError
from ace_ext.packed._codec import Codec, Kept

CODECS: Registry[Codec] = Registry("packed format", files(f"{__name__}.codecs", [f"{__path__[0]}/codecs"], "CODEC"))
"""Every packed format by name."""

DEFAULT_CODEC = "bitmap"
"""The format of ``ace-prune pack`` without ``--format``."""


def register(codec: Codec) -> None:
    """Registers a packed format that is not a file of this package.

    Raises:
        ValueError: the name is taken.
    """
    CODECS.add(codec)


def codec_named(name: str) -> Codec:
    """The packed format of this name.

    Raises:
        InputError: no packed format has this name.
    """
    if not isinstance(name, str) or name not in CODECS:
        raise InputError(f"format must be one of {', '.join(CODECS)} (got {name!r})")
    return CODECS[name]


__all__ = ["CODECS", "DEFAULT_CODEC", "Codec", "Kept", "codec_named", "register"]
