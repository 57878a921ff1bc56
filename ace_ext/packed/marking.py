"""Adds to a packed folder's ``config.json`` the line by which transformers recognises it, and removes it.

``{"quantization_config": {"quant_method": "ace_ext"}`` makes ``from_pretrained`` ask the quantizer that ``import
ace_ext`` registers (:mod:`ace_ext.runtime.quantizer`). If it is not registered, transformers reports that it does not
know the type ``ace_ext``, finds no weight file with a name that it knows, and stops.
"""

import json
from pathlib import Path

from ace_ext.models._transformers import OWN_METHOD

CONFIG = "config.json"

_LINE = f'\n  "quantization_config": {{"quant_method": "{OWN_METHOD}"}},'


def mark(path: Path) -> None:
    """Adds the line to a configuration after its first brace. Does nothing if the file is missing, cannot be read, or
    has a ``quantization_config``."""
    if not path.is_file():
        return
    text = _text(path)
    try:
        found = json.loads(text)
    except ValueError:
        return
    if isinstance(found, dict) and found and "quantization_config" not in found:
        path.write_bytes(text.replace("{", "{" + _LINE, 1).encode("utf-8", "surrogateescape"))


def unmarked(path: Path) -> bytes:
    """A configuration without the line: the bytes before :func:`mark`."""
    return _text(path).replace(_LINE, "", 1).encode("utf-8", "surrogateescape")


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")
