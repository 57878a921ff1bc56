"""Which images or audio files a calibration reads: those of a folder, or those named in a `.jsonl` file."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ace_ext.data.audio import read_audio
from ace_ext.data.images import read_image
from ace_ext.data.requests import check_int, seeded_generator
from ace_ext.errors import InputError

IMAGE, AUDIO = "image", "audio"
SUFFIXES = {
    IMAGE: {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"},
    AUDIO: {".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".wav"},
}
"""By kind, the names' ends of the files that are read from a folder."""
_SOUND_PARTS = ("feature_extractor", "audio_processor")
_LINE = '{"image": "a.png", "text": "…"} or {"audio": "a.wav", "text": "…"}'


@dataclass(frozen=True)
class Item:
    """One sample: a file, and the text that belongs to it, if any."""

    file: Path
    text: str | None
    where: str
    """For messages: the file, or the line that names it."""
    language: str | None = None
    """Of the text, for a model of several languages."""


@dataclass(frozen=True)
class Items:
    """The samples of a calibration, all of one kind."""

    kind: str
    """``IMAGE`` or ``AUDIO``."""
    items: tuple[Item, ...]


def is_media(source: str) -> bool:
    """Whether a calibration source is a folder, or a `.jsonl` file whose first line names an image or audio file."""
    path = Path(source)
    try:
        if path.is_dir():
            return True
        if path.suffix.lower() != ".jsonl" or not path.is_file():
            return False
        with path.open(encoding="utf-8-sig") as lines:
            first = json.loads(next((line for line in lines if line.strip()), "{}"))
    except (OSError, ValueError, RecursionError):
        return False  # the reader of texts says what is wrong
    return isinstance(first, dict) and bool({IMAGE, AUDIO} & set(first))


def media_items(source: str, nsamples: int, seed: int, after: int = 0) -> Items:
    """At most ``nsamples`` samples of a source, in random order, ``after`` the first ones; all of them if there are
    fewer.

    Args:
        source: a folder, whose images or audio files are read with those of its subfolders; or a `.jsonl` file, each
            line of which has the path ``image`` or ``audio`` (relative to the file's folder) and may have ``text`` and
            ``language``.

    Raises:
        InputError: the source has no such files, not more than ``after``, or both kinds; a line lacks its keys, or a
            file is missing.
    """
    check_int("nsamples", nsamples, 1)
    check_int("seed", seed, 0)
    found = _all(Path(source))
    if after >= len(found.items):
        raise InputError(f"input: {source} has {len(found.items)} samples, and calibration takes {after}; give more")
    order = torch.randperm(len(found.items), generator=seeded_generator(seed))[after : after + nsamples]
    return Items(found.kind, tuple(found.items[place] for place in order.tolist()))


def text_of(item: Item, kind: str) -> str:
    """The text of a sample, for a model that reads one with each file.

    Raises:
        InputError: it has none.
    """
    if item.text is None:
        raise InputError(
            f"input: {item.where} has no text, and the model reads text with each {kind}; give a .jsonl file "
            f'with lines like {{"{kind}": "FILE", "text": "…"}}'
        )
    return item.text


def read_item(item: Item, kind: str, processor: Any, channels: int = 3) -> Any:
    """What a processor takes: an image, of ``channels``, or the samples of sound at the rate that it asks for.

    Raises:
        InputError: the file cannot be read, or the processor has no rate of sound.
    """
    if kind == IMAGE:
        return read_image(item.file, channels)
    rate = getattr(sound_part(processor), "sampling_rate", None)
    if rate is None:
        raise InputError(f"model: its processor, {type(processor).__name__}, says no rate of sound (sampling_rate)")
    return read_audio(item.file, int(rate)).numpy()


def sound_part(processor: Any) -> Any:
    """What reads the sound for a processor of several kinds of files."""
    return next((getattr(processor, name) for name in _SOUND_PARTS if hasattr(processor, name)), processor)


def listing_sha256(source: str) -> str:
    """The SHA-256, in hex, of the names and sizes of a source's files, and of the samples' texts.

    Raises:
        InputError: as :func:`media_items`.
    """
    path = Path(source)
    place = path if path.is_dir() else path.parent
    described = [[os.path.relpath(item.file, place), item.file.stat().st_size, item.text] for item in _all(path).items]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _all(path: Path) -> Items:
    return _of_folder(path) if path.is_dir() else _of_lines(path)


def _of_folder(folder: Path) -> Items:
    try:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
    except OSError as error:
        raise InputError(f"input: {folder} cannot be read ({error.strerror}); check its permissions") from error
    by_kind = {kind: [file for file in files if file.suffix.lower() in suffixes] for kind, suffixes in SUFFIXES.items()}
    kinds = [kind for kind, found in by_kind.items() if found]
    if not kinds:
        known = ", ".join(sorted(suffix for suffixes in SUFFIXES.values() for suffix in suffixes))
        raise InputError(
            f"input: {folder} has no images and no audio files; give a folder with files that end in {known}"
        )
    if len(kinds) > 1:
        raise InputError(f"input: {folder} has both images and audio files; give a folder with one kind")
    return Items(kinds[0], tuple(Item(file, None, str(file)) for file in by_kind[kinds[0]]))


def _of_lines(file: Path) -> Items:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            read = [_item(line, file, f"{file}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"input: {file} is not UTF-8 ({error.reason}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"input: {file} cannot be read ({error.strerror}); check its path and permissions") from error
    if not read:
        raise InputError(f"input: {file} has no line; each must be like {_LINE}")
    kind = read[0][0]
    for other, item in read:
        if other != kind:
            raise InputError(f"input: {item.where}: has {other!r}, other lines have {kind!r}; give one kind")
    with_language = [item.language is not None for _, item in read]
    if any(with_language) and not all(with_language):
        without = read[with_language.index(False)][1]
        raise InputError(f"input: {without.where}: has no 'language', other lines have one; give it in all or in none")
    return Items(kind, tuple(item for _, item in read))


def _item(line: str, file: Path, where: str) -> tuple[str, Item]:
    """The kind and the sample of a line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"input: {where}: not valid JSON ({error}); each line must be like {_LINE}") from error
    kinds = [kind for kind in (IMAGE, AUDIO) if isinstance(record, dict) and kind in record]
    if len(kinds) != 1:
        found = (
            ", ".join(map(repr, record)) or "none" if isinstance(record, dict) else f"a JSON {type(record).__name__}"
        )
        raise InputError(f"input: {where}: must have one of 'image' and 'audio' (found: {found}); write {_LINE}")
    name = _string(record, kinds[0], where)
    text, language = (_string(record, key, where) if key in record else None for key in ("text", "language"))
    path = file.parent / name
    if "\0" in name or not path.is_file():
        raise InputError(f"input: {where}: {name!r} is not a file; paths are relative to {file.parent}")
    return kinds[0], Item(path, text, where, language)


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"input: {where}: {key!r} must be a text that is not empty (found: {str(value)[:60]!r})")
    return value
