"""Checksums of a model folder: of some tensors, or of everything else. Files are read one MiB at a time, so that no
whole tensor is in memory."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from ace_ext.models.safetensors_files import Shards

_CHUNK = 2**20


def tensors_sha256(shards: Shards, names: Iterable[str]) -> str:
    """SHA-256, in hex, of the bytes that a folder holds of these tensors, in this order."""
    digest = hashlib.sha256()
    for name in names:
        for path, offset, size in shards.spans(name):
            with path.open("rb", buffering=0) as file:
                _add(digest, file, offset, offset + size)
    return digest.hexdigest()


def rest_sha256(shards: Shards, names: Iterable[str]) -> dict[str, str]:
    """For each file of a folder, by its name there, SHA-256 in hex of its bytes without those of the named tensors."""
    skipped: dict[Path, list[tuple[int, int]]] = {}
    for name in names:
        for path, offset, size in shards.spans(name):
            skipped.setdefault(path, []).append((offset, offset + size))
    found = {}
    for path in sorted(shards.folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(shards.folder).as_posix()] = _without(path, skipped.get(path, []))
    return found


def file_sha256(path: Path) -> str:
    """SHA-256, in hex, of a whole file."""
    return _without(path, [])


def _without(path: Path, skipped: list[tuple[int, int]]) -> str:
    digest, place, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for begin, end in [*sorted(skipped), (size, size)]:
            _add(digest, file, place, begin)
            place = max(place, end)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", file: BinaryIO, begin: int, end: int) -> None:
    """Adds a file's bytes from ``begin`` up to ``end``. A shorter file adds fewer, and so has a different checksum."""
    file.seek(begin)
    while begin < end and (chunk := file.read(min(_CHUNK, end - begin))):
        digest.update(chunk)
        begin += len(chunk)
