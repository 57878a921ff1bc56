"""Text from a user's own files: `.txt` (one document) and `.jsonl` (a document a line)."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ace_ext.errors import InputError, suggestion


def read_file(source: str, text_field: str, names: Sequence[str]) -> list[str]:
    """The documents of a file.

    Args:
        source: the path of a `.txt` or `.jsonl` file, in UTF-8.
        text_field: the field of a `.jsonl` line that holds the text.
        names: the other sources, for the error message.

    Raises:
        InputError: there is no such file, or its content is not text in that form.
    """
    file = Path(source)
    reader = {".txt": _read_txt, ".jsonl": _read_jsonl}.get(file.suffix.lower())
    if not os.path.exists(file):  # Path.exists raises if a name is too long
        raise InputError(
            f"text: {source!r} is neither a file nor a known name; use {', '.join(names)}, or a .txt or .jsonl file"
            f"{suggestion(source, [name for name in names if name != source])}"
        )
    if reader is None or not file.is_file():
        raise InputError(
            f"text: {source!r} is not a .txt or .jsonl file; give one of these (.jsonl: one JSON object per line)"
        )
    try:
        return reader(file, text_field)
    except UnicodeDecodeError as error:
        raise InputError(f"text: {source} is not UTF-8 ({error.reason}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"text: {source} cannot be read ({error.strerror}); check its permissions") from error


def same_file(one: str, other: str) -> bool:
    """Whether two sources name the same file or folder."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _read_txt(file: Path, text_field: str) -> list[str]:
    return [file.read_text(encoding="utf-8-sig")]  # -sig drops a byte order mark


def _read_jsonl(file: Path, text_field: str) -> list[str]:
    with file.open(encoding="utf-8-sig") as lines:
        return [_text_of(line, text_field, f"{file}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _text_of(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"text: {where}: not valid JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise InputError(f"text: {where}: found a JSON {type(record).__name__}; each line must be one JSON object")
    if text_field not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise InputError(
            f"text_field: {where}: no field {text_field!r}; fields found: {found}; name the field that holds the text"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(
            f"text_field: {where}: field {text_field!r} is a {type(text).__name__}, not a string; name the field that "
            "holds the text"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text_field: {where}: field {text_field!r} holds half a surrogate pair ({error.reason}); repair the escape"
        ) from error
    return text
