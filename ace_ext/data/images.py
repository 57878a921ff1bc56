"""Images from files, for a model's own image processor. Needs Pillow."""

from pathlib import Path
from typing import TYPE_CHECKING

from ace_ext.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDE = ("I", "F")
"""How the modes of Pillow begin that have 16 or 32 bits. Its conversion to 8 bits cuts values off: such images become
white or black."""


def read_image(file: Path, channels: int = 3) -> "Image":
    """An image as RGB, or as grey values if ``channels`` is 1. It is turned as its file says.

    Raises:
        InputError: the file is not an image, is broken, or has more than 8 bits in a channel; Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError(f"input: {file} needs Pillow to be read; pip install 'ace_ext[vision]'") from error
    try:
        with Image.open(file) as opened:
            wide = opened.mode if opened.mode.startswith(_WIDE) else None
            image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:  # Pillow has no base class
        raise InputError(f"input: {file} is not an image that Pillow reads ({error}); remove or replace it") from error
    if wide is not None:
        raise InputError(
            f"input: {file} has more than 8 bits in a channel (Pillow's mode {wide}), and models scale these in "
            "different ways; convert it to 8 bits"
        )
    return image
