"""The file of ``--log-json``."""

import io
import os

from ace_ext.errors import InputError

EVENT = b'{"event"'
"""How each line begins."""


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

    @classmethod
    def open(cls, name: str) -> "LogFile":
        """The file of this name, to which lines are appended. An incomplete last line, left by a crash or a full disk,
        is removed.

        Raises:
            InputError: it cannot be written.
        """
        try:
            _remove_cut_line(name)
            return cls(open(name, "ab", opener=_open_own), encoding="utf-8")
        except OSError as error:
            raise InputError(f"log-json {name!r} cannot be written: {error.strerror}; give another file") from error

    def _failed(self, error: OSError) -> InputError:
        return InputError(
            f"log-json {self.name!r} cannot be written: {error.strerror}; fix that and continue with --resume"
        )


def _remove_cut_line(name: str) -> None:
    """Removes the last line if it has no end and began as an event. Other text stays as it is."""
    if os.path.isfile(name):
        with open(name, "r+b", opener=_open_own) as file:
            written = file.read()
            last = written.rfind(b"\n") + 1
            if EVENT.startswith(written[last : last + len(EVENT)]):
                file.truncate(last)


def _open_own(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # follows no link and waits for no pipe
