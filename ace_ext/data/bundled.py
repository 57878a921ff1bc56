"""The text in this package: mixed prose, dialogue, code and mathematics of free licences. ``texts/NOTICE.md`` names the
sources, ``tools/make_bundled.py`` makes the file."""

import functools
import json
from importlib import resources

import zstandard

KINDS = ("encyclopedia", "news", "dialogue", "code", "mathematics")
"""The kinds of its documents, in the order of the file."""


def bundled_text(split: str, *kinds: str) -> list[str]:
    """The documents of a split, ``calibration`` or ``held-out``; of all kinds, or of those named."""
    texts = _texts()
    return [document for kind in kinds or KINDS for document in texts[kind][split]]


@functools.lru_cache(maxsize=1)
def _texts() -> dict[str, dict[str, list[str]]]:
    """The documents by kind and split."""
    packed = resources.files("ace_ext.data").joinpath("texts", "bundled.json.zst").read_bytes()
    texts: dict[str, dict[str, list[str]]] = json.loads(zstandard.ZstdDecompressor().decompress(packed))
    return texts
