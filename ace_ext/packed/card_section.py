"""Adds to a packed folder's model card the section that says how to load it, and removes it."""

from pathlib import Path

from ace_ext.packed.files import PackedShards
from ace_ext.whole_files import write_whole

CARD = "README.md"
"""A model's card, as hubs name it."""

_START, _END = "<!-- ace-prune pack -->", "<!-- end of ace-prune pack -->"
_SECTION = """
{start}
## Packed

The weights are stored without their zeros, in the format `{codec.name}` of `ace_ext` ({codec.summary}):

```python
import ace_ext
from transformers import AutoModelForCausalLM

ace_ext.register()  # tells transformers about packed folders
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```
{codes}
Its Linears multiply from the packed weights on a CPU. `ace-prune unpack FOLDER --output DENSE` gives back the dense
folder, byte for byte, and `ace-prune bench FOLDER` measures both.
{end}
"""
_CODES = """
Kept weights are codes of {grid.bits} bits. {grid.group} columns of a row share a scale. A weight of these matrices
takes {bits:.2f} bits, zeros included.
"""


def add_section(folder: Path, packed: PackedShards) -> None:
    """Appends the section to a packed folder's card. Does nothing if there is no card."""
    add_section_text(folder, section_of(packed))


def add_section_text(folder: Path, section: bytes) -> None:
    """Appends a section to a folder's card. Does nothing if there is no card."""
    path = folder / CARD
    if path.is_file():
        write_whole(path, path.read_bytes() + section)


def section_of(packed: PackedShards) -> bytes:
    """The section."""
    found = packed.code_bits()
    codes = "" if found is None else _CODES.format(grid=found[0], bits=found[1])
    return _SECTION.format(start=_START, end=_END, codec=packed.packed[0].codec, codes=codes).encode("utf-8")


def without_section(path: Path) -> bytes:
    """A card without the section: the bytes before :func:`add_section`."""
    card = path.read_bytes()
    start, end = (mark.encode() for mark in ("\n" + _START + "\n", _END + "\n"))
    before, found, rest = card.rpartition(start)
    _, ended, after = rest.partition(end)
    return before + after if found and ended else card
