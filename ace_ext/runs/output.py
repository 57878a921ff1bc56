"""The output folder of a run: whether it may be written, errors of its disk in words, and the report in it."""

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ace_ext.errors import InputError
from ace_ext.records import REPORT_NAME, PruneReport


def check_output(output: str | Path, overwrite: bool) -> Path:
    """The output folder as a path, if it may be written; asked before the hours of work, not after.

    Raises:
        InputError: it exists and ``overwrite`` is not set, it is a file, or its parent cannot be written.
    """
    path = Path(output).expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"output {str(output)!r} is a file; give a folder")
    if path.exists() and not overwrite:
        raise InputError(f"output folder {str(output)!r} exists; pass --overwrite to replace it, or give another name")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise InputError(f"output folder {str(output)!r} holds something that is no model; it will not be replaced")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # without a name on Linux: nothing to leave there when killed
    except OSError as error:
        raise InputError(f"output {str(output)!r} cannot be written: {error.strerror}; give another folder") from error
    return path


def read_report(folder: str | Path) -> PruneReport:
    """The report beside a pruned model.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        raise InputError(f"{str(folder)!r} has no {REPORT_NAME}; give a folder that ace-prune run wrote")
    try:
        return PruneReport.from_json(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no report of ace-prune: {error!r}") from error


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Errors of the disk in words. What is done stays there for ``--resume``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError(_disk_message(path, error.errno, error.filename)) from error
    except SafetensorError as error:  # the writer hands the system's error on as text only
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise InputError(_disk_message(path, int(number[1]), None)) from error


def _disk_message(path: Path, number: int, name: str | bytes | None) -> str:
    mend = "make room there" if number in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    at = "" if name is None or str(name) == str(path) else f" at {os.fsdecode(name)!r}"
    return f"output {str(path)!r} cannot be written: {os.strerror(number)}{at}; {mend} and go on with --resume"
