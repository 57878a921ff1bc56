"""Files that are written whole or not at all: to a temporary name first, which is then renamed."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ace_ext.errors import InputError


def part_of(path: Path) -> Path:
    """Where a file stands while :func:`written_whole` writes it. A process that was killed there leaves it behind."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file of which no part can be left under its name."""
    with written_whole(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, which takes its place when the block ends without an error; else it is removed.

    Raises:
        InputError: something that is no file has the temporary name.
    """
    part = part_of(path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(part.lstat().st_mode):
            raise InputError(f"{str(part)!r} is in the way and no file; remove it")
        part.unlink()  # of a run that was killed
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
