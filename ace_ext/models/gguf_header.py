"""Checks the header of a GGUF file before the library ``gguf`` reads it. The library trusts each count in the header,
so with a damaged one it may run without end or fill the memory. :func:`gguf_reader` is the library's reader, three
times as fast, and :func:`read_once` spares transformers from reading the header several times.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import mmap
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ace_ext.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFReader

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by the number of its type. The other two, strings and arrays, begin with their length."""
_STRING, _ARRAY = 8, 9
_DEEPEST = 4
"""The deepest nesting of arrays that is accepted. No real file has more."""


def check_gguf(path: Path) -> None:
    """Checks that the file holds everything that its header counts.

    Raises:
        InputError: it does not, or the file is not in this format.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).walk()
    except (ValueError, OSError) as error:
        raise InputError(f"model {str(path)!r} is not a complete GGUF file: {error}; fetch it again") from error


@functools.cache
def _reader_class() -> "type[GGUFReader]":
    from gguf.gguf_reader import GGUFReader  # imported here: only GGUF files need it

    class PlainReader(GGUFReader):
        """The library's reader, with the file as a plain array. The library slices a ``numpy.memmap`` several times for
        each word of the vocabulary, and each slice of one costs as much as seven of a plain array."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value.view(np.ndarray) if isinstance(value, np.memmap) else value)

    return PlainReader


def gguf_reader(path: str | Path) -> "GGUFReader":
    """The header and the mapped tensors of a GGUF file that :func:`check_gguf` has found complete."""
    return _reader_class()(path)


_READING = threading.RLock()


@contextmanager
def read_once() -> Iterator[None]:
    """Within this context the header of a GGUF file is read once, and the names of a model's tensors are made once.

    Otherwise transformers reads the header four times to load a model (for the configuration, the tokenizer and the
    weights). This is slow Python code: each word of the vocabulary is an array of its own. It makes the names once for
    each module. Within this context caching functions replace the two functions of ``gguf`` for the whole process, so
    only one thread at a time can be in it.
    """
    import gguf  # imported here: only GGUF files need it

    with _READING:
        own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        try:
            for name, made in {**own, "GGUFReader": gguf_reader}.items():
                setattr(gguf, name, functools.lru_cache(maxsize=1)(made))
            yield
        finally:
            for name, made in own.items():
                setattr(gguf, name, made)


class _Walk:
    """Goes through a header from its start."""

    def __init__(self, data: mmap.mmap) -> None:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._data, self._at, self._order = data, 4, "<"

    def walk(self) -> None:
        """Walks over all keys with their values, then over the description of each tensor. Raises ValueError if a count
        does not fit."""
        if self._number("I") & 0xFFFF == 0:  # the version, written on a machine of the other byte order
            self._order = ">"
        tensors, keys = self._number("Q"), self._number("Q")
        for _ in range(self._fitting(keys, 12)):
            self._string()
            self._value(self._number("I"), 0)
        for _ in range(self._fitting(tensors, 24)):
            self._string()
            self._skip(self._fitting(self._number("I"), 8), 8)
            self._skip(1, 12)  # its type and its offset

    def _value(self, kind: int, depth: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth < _DEEPEST:
            of, count = self._number("I"), self._number("Q")
            if of in _SIZES:
                self._skip(count, _SIZES[of])
                return
            for _ in range(self._fitting(count, 8)):
                self._value(of, depth + 1)
        elif kind in _SIZES:
            self._skip(1, _SIZES[kind])
        else:
            raise ValueError(f"a value of type {kind} at byte {self._at}")

    def _string(self) -> None:
        self._skip(self._number("Q"), 1)

    def _number(self, kind: str) -> int:
        start = self._at
        self._skip(1, struct.calcsize(kind))
        return int(struct.unpack_from(self._order + kind, self._data, start)[0])

    def _skip(self, count: int, size: int) -> None:
        self._at += size * self._fitting(count, size)

    def _fitting(self, count: int, size: int) -> int:
        """Returns the count if the rest of the file is long enough for that many items of at least ``size`` bytes."""
        if count * size > len(self._data) - self._at:
            raise ValueError(f"{count} items of {size} bytes at byte {self._at} of {len(self._data)}")
        return count
