"""Files that this program may replace: those that it wrote itself.

A run never replaces or follows anything else: a file of another kind under the same name, a link, a device or a pipe.
The output folder holds a manifest with the names and sizes of the files that the run wrote. A folder with other files
is not replaced.
"""

import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ace_ext.errors import InputError
from ace_ext.whole_files import write_whole

MANIFEST_NAME = "ace_manifest.json"
FORMAT = 1


# Folders


def write_manifest(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Writes the manifest of a folder that is complete: the fingerprint of its run, and its files' names and sizes."""
    files = {name: path.stat().st_size for name, path in _files(folder).items()}
    text = json.dumps({"format": FORMAT, "fingerprint": fingerprint, "files": files}, indent=1)
    write_whole(folder / MANIFEST_NAME, f"{text}\n".encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None if there is none that this version reads."""
    path = folder / MANIFEST_NAME
    try:
        if path.is_symlink() or not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = (
            found["format"] == FORMAT and isinstance(found["files"], dict) and isinstance(found["fingerprint"], dict)
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if whole else None


def foreign_files(folder: Path) -> list[str]:
    """The sorted names of files that are not in the folder's manifest or have another size. Without a manifest: of all
    files."""
    manifest = read_manifest(folder)
    own = {} if manifest is None else manifest["files"]
    found = _files(folder)
    if manifest is not None:
        found.pop(MANIFEST_NAME, None)
    return [name for name, path in found.items() if path.is_symlink() or own.get(name) != path.stat().st_size]


def _files(folder: Path) -> dict[str, Path]:
    """All files and links below a folder, by their names relative to it, sorted."""
    found = {}
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*names, *links):
            path = Path(place, name)
            found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


# Single files


def check_replaceable(option: str, path: Path, what: str, is_own: Callable[[Path], bool]) -> None:
    """Checks that a file may be written: its folder exists and a new file can be made there, or a file that already has
    its name is empty or of the same kind.

    Args:
        option: the option that names the file.
        path: the file.
        what: its kind, for the message.
        is_own: whether a regular file is of this kind.

    Raises:
        InputError: it may not be written.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        folder = path.absolute().parent
        if not folder.is_dir():
            raise InputError(f"{option} must be a file in a folder that exists (got {str(path)!r})") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{option} {str(path)!r} cannot be written: its folder is read-only") from None
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {str(path)[:200]!r} is not a usable name: {error}; give another") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "link" if stat.S_ISLNK(found.st_mode) else "device or pipe"
        raise InputError(f"{option} must be a file (got {str(path)!r}, a {kind}); give another name")
    if found.st_size and not is_own(path):
        raise InputError(
            f"{option} {str(path)!r} exists and is not a {what}; it will not be replaced: give another name"
        )


DESCRIPTION = "statistics.json"
"""The member of a file of ``--save-stats`` that says what the others are."""


def stored_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a member of a file of ``--save-stats``.

    Raises:
        ValueError: it is compressed. The writer compresses nothing, and a compressed member may unpack to any size.
        KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile: there is none, or it cannot be read.
    """
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(member)


def is_statistics(path: Path) -> bool:
    """Whether a file is one of ``--save-stats``: an archive whose description has a format and kinds."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(stored_member(archive, DESCRIPTION))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False
    return isinstance(found, dict) and {"format", "kinds"} <= found.keys()


def stored_sizes(path: Path) -> list[int]:
    """Bytes of each block's statistics in a file of ``--save-stats``. Empty for any other file, which the run refuses
    when it reads it."""
    if not path.is_file():  # a pipe would be waited for
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return [member.file_size for member in archive.infolist() if member.filename != DESCRIPTION]
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):
        return []


def is_log(path: Path) -> bool:
    """Whether a file is one of ``--log-json``: its first line is an event."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.readline(2**16))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"event", "time"} <= found.keys()


PAGE_MARK = '<meta name="generator" content="ace-prune">'
"""A tag in the head of each page of this program."""


def is_page(path: Path) -> bool:
    """Whether a file is a page of this program."""
    try:
        with path.open("rb") as file:
            return PAGE_MARK.encode() in file.read(1024)
    except OSError:
        return False
