"""The output folder of a run: checks that it may be written, error messages for disk errors, and its report."""

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
    """The output folder as a path. It is checked before the run starts, so that hours of work are not lost.

    Raises:
        InputError: it exists and ``overwrite`` is not set, it is a file, it holds something other than a model, or its
            parent cannot be written.
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
        tempfile.TemporaryFile(dir=nearest).close()  # has no name on Linux, so a killed process leaves no file
    except OSError as error:
        raise InputError(f"output {str(output)!r} cannot be written: {error.strerror}; give another folder") from error
    return path


def read_report(folder: str | Path) -> PruneReport:
    """The report in the folder of a pruned model.

    Raises:
        InputError: there is none, or the file is not a report of this program.
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
    """Context manager that turns disk errors into :class:`InputError` with a message. Finished blocks stay on the disk
    for ``--resume``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError(_disk_message(path, error.errno, error.filename)) from error
    except SafetensorError as error:  # safetensors reports a system error only as text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise InputError(_disk_message(path, int(number[1]), None)) from error


def _disk_message(path: Path, number: int, name: str | bytes | None) -> str:
    mend = "make room there" if number in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    at = "" if name is None or str(name) == str(path) else f" at {os.fsdecode(name)!r}"
    return f"output {str(path)!r} cannot be written: {os.strerror(number)}{at}; {mend} and go on with --resume"
