"""Files that are written whole or not at all: under a temporary name that is renamed once all data is on the disk."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ace_ext.errors import InputError


def part_of(path: Path) -> Path:
    """The temporary name of a file while :func:`written_whole` writes it. A killed process leaves this file behind."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    with written_whole(path) as part:
        part.write_bytes(data)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk. Does nothing if the file system cannot do that."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new file in the folder of ``path``. If the block ends without an error, the file is synced to the disk and
    renamed to ``path``; else it is removed.

    Raises:
        InputError: something that is not a file has the temporary name.
    """
    part = part_of(path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(part.lstat().st_mode):
            raise InputError(f"{str(part)!r} is in the way and is not a file; remove it")
        part.unlink()  # left by a killed run
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
