"""Writes a safetensors file tensor by tensor, so that only one tensor is in memory."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ace_ext.models.safetensors_files import bytes_of
from ace_ext.models.safetensors_header import STORED_DTYPES

ALIGNMENT = 64
"""Every tensor begins at a multiple of this many bytes: vector loads of a mapped tensor cross no cache line."""

PADDING = "pad."
"""The prefix of the names of padding tensors, which fill the space before the next tensor: holes are not allowed."""

_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


class StreamWriter:
    """A file whose header is written last, into space reserved for it, padded with blanks.

    Args:
        path: of the file, which must not exist.
        room: the bytes to reserve for the header.
        alignment: tensors begin at multiples of it.
    """

    def __init__(self, path: Path, room: int, alignment: int = ALIGNMENT) -> None:
        self._start = -(-(8 + room) // ALIGNMENT) * ALIGNMENT
        self._file = path.open("xb")
        self._file.write(bytes(self._start))
        self._header: dict[str, Any] = {}
        self._alignment = alignment
        self._size = 0

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._header or name.startswith(PADDING):
            raise ValueError(f"tensor name {name!r} is taken")
        missing = -self._size % self._alignment
        if missing:
            self._append(f"{PADDING}{self._size}", "U8", [missing], bytes(missing))
        self._append(name, _NAMES[tensor.dtype], list(tensor.shape), bytes_of(tensor.detach().cpu().contiguous()))

    def _append(self, name: str, dtype: str, shape: list[int], data: bytes | memoryview) -> None:
        self._file.write(data)
        end = self._size + len(data)
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self._size, end]}
        self._size = end

    def finish(self, metadata: dict[str, str]) -> None:
        """Writes the header.

        Raises:
            ValueError: it needs more space than was reserved.
        """
        text = json.dumps({"__metadata__": metadata} | self._header, separators=(",", ":"))
        header = text.encode("utf-8").ljust(self._start - 8)
        if len(header) > self._start - 8:
            raise ValueError(f"the header needs {len(header)} bytes (room: {self._start - 8})")
        self._file.seek(0)
        self._file.write((self._start - 8).to_bytes(8, "little") + header)


def header_room(metadata: dict[str, str], names: list[str], parts: int) -> int:
    """An upper bound of a header's bytes, for tensors of up to ``parts`` parts each."""
    entry = 200  # for dtype, shape and offsets of a part, and for the padding before it
    return len(json.dumps({"__metadata__": metadata})) + sum(parts * (len(json.dumps(n)) + entry) for n in names) + 64
