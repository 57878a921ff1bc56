"""The header of a safetensors file: which tensors it holds, where, and its metadata.

It is parsed here because the library does not tell the byte offsets, and patching in place needs them. The library
opens each file first, so that a file that it refuses is refused here too.
"""

import contextlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ace_ext.errors import InputError

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that a checkpoint may hold, by their names in the format. Others are those of quantized weights."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; its bytes begin at ``offset`` of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """The part of a file before its tensors: 8 bytes of length, then that many bytes of JSON."""

    text: str
    """The JSON as it is in the file, with its padding spaces."""
    entries: dict[str, Entry]
    """The tensors by name."""
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        InputError: the library refuses the file (damaged, cut, bytes that no tensor owns, tensors that overlap, a name
            twice), or a tensor's dtype is not in :data:`STORED_DTYPES`.
    """
    with _no_whole_file(path):
        size = path.stat().st_size
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes")
            text = file.read(length).decode("utf-8")
        return parse_header(text, path, size)


def parse_header(text: str, path: Path, size: int) -> Header:
    """Parses the JSON of a header. The file is named ``path`` and has ``size`` bytes.

    Raises:
        InputError: a tensor's dtype is not in :data:`STORED_DTYPES`.
        ValueError, KeyError, TypeError, AttributeError: it is not the header of a file of this size.
    """
    header = dict(json.loads(text))
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + len(text.encode("utf-8"))
    return Header(
        text, {name: _entry_of(path, name, entry, start, size) for name, entry in header.items()}, dict(metadata)
    )


@contextlib.contextmanager
def _no_whole_file(path: Path) -> Iterator[None]:
    """Turns what reading a damaged header raises into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (SafetensorError, struct.error, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file: {error!r}; fetch it again") from error


def _entry_of(path: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> Entry:
    """One entry of a header whose tensors begin at byte ``start`` of a file of ``size`` bytes."""
    if entry["dtype"] not in STORED_DTYPES:
        raise InputError(f"{path} holds {name} as {entry['dtype']}; give a checkpoint that is not quantized")
    begin, end = entry["data_offsets"]
    found = Entry(path, STORED_DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin)
    if begin < 0 or min(found.shape, default=0) < 0 or found.nbytes != end - begin or start + end > size:
        raise ValueError(f"the offsets of {name} do not fit its shape")
    return found
