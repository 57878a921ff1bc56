"""The file of ``--log-json``."""

import contextlib
import io
import os
import sys
from typing import TextIO

from ace_ext.errors import InputError


class LogFile(io.TextIOWrapper):
    """The file of ``--log-json``. A disk error names this file instead of the output folder."""

    def write(self, text: str) -> int:
        """As for any text file. Raises InputError if the file cannot be written."""
        try:
            return super().write(text)
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """As for any text file. Raises InputError if the file cannot be written."""
        try:
            super().flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """As for any text file. Raises InputError if the rest cannot be written."""
        try:
            super().close()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> InputError:
        return InputError(
            f"log-json {self.name!r} cannot be written: {error.strerror}; fix that and continue with --resume"
        )


def open_log(name: str | None, opened: contextlib.ExitStack) -> TextIO | None:
    """The file of ``--log-json``; None without one. ``opened`` closes it.

    Raises:
        InputError: the file cannot be written.
    """
    if name is None or name == "-":
        return sys.stderr if name else None
    try:
        return opened.enter_context(LogFile(open(name, "ab", opener=_open_own), encoding="utf-8"))
    except OSError as error:
        raise InputError(f"log-json {name!r} cannot be written: {error.strerror}; give another file") from error


def _open_own(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # follows no link and waits for no pipe
