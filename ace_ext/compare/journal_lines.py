"""The lines of ``runs.jsonl``, each a JSON object with a checksum."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINES = 2
"""The format of ``runs.jsonl``. Since 2 each line ends with a checksum. Files of format 1 are read and continued
without checksums."""
_START = b'{"format"'


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of the file. An incomplete last line, left by a crash, is removed from it.

    Raises:
        ChangedLineError: a checksum differs.
        ValueError: the file has a different form.
    """
    data = path.read_bytes()
    if not data.startswith(_START):
        raise ValueError("its first line has no format")
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        raise ValueError("its first line is incomplete")
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    lines = whole.decode("utf-8").splitlines()
    return map(_checked, range(1, len(lines) + 1), lines) if _format(lines[0]) >= LINES else map(json.loads, lines)


def format_of(path: Path) -> int:
    """The format that the first line names."""
    with path.open(encoding="utf-8") as file:
        return _format(file.readline())


def _format(line: str) -> int:
    found = json.loads(line)["format"]
    if found not in range(1, LINES + 1):
        raise ValueError(f"format {found}, not {LINES}")
    return int(found)


_SUM = ', "sha256": "'


def with_sum(line: str) -> str:
    """A JSON object with the checksum of its text added as its last value."""
    return f'{line[:-1]}{_SUM}{hashlib.sha256(line.encode()).hexdigest()}"}}'


def _checked(number: int, line: str) -> dict[str, Any]:
    text = line.rpartition(_SUM)[0] + "}"
    if with_sum(text) != line:
        raise ChangedLineError(number)
    found: dict[str, Any] = json.loads(text)
    return found


class ChangedLineError(Exception):
    """A line has changed since it was written. The argument is its number."""
