"""The output folder of a run: checks that it may be written, error messages for disk errors, and its report."""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ace_ext.errors import InputError, existing_folder, one_line
from ace_ext.fingerprint import differences
from ace_ext.records import REPORT_NAME, PruneReport
from ace_ext.runs.own_files import MANIFEST_NAME, foreign_files, read_manifest
from ace_ext.runs.unfinished import folder_of


def output_path(output: str | Path) -> Path:
    """The output folder as a path.

    Raises:
        InputError: its last part cannot be the name of a folder, or it is a link.
    """
    path = Path(os.path.expanduser(output))
    if path.name in ("", "..") or "\0" in str(path) or (str(output).startswith("~") and str(path) == str(output)):
        raise InputError(f"output must end in the name of a folder (got {str(output)!r}); e.g. pruned")
    if os.path.islink(path):
        raise InputError(f"output {str(output)!r} is a link; give a folder's own name")
    with disk_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(folder_of(path))  # raises if this longer name is too long
    return path


def check_output(output: str | Path, overwrite: bool, resume: bool = False) -> Path:
    """Checks the output folder before the run starts, and returns it as a path.

    Args:
        output: the folder.
        overwrite: it may be replaced if it is an earlier output.
        resume: it may exist if it is an earlier output, perhaps of this run (:func:`finished_report`).

    Raises:
        InputError: it exists and must not be replaced, or its parent cannot be written.
    """
    path = output_path(output)
    if path.exists() and not path.is_dir():
        raise InputError(f"output {str(output)!r} is a file; give a folder")
    if path.exists() and not (overwrite or (resume and read_manifest(path) is not None)):
        raise _exists(path)
    if path.is_dir():
        _check_own_output(path)
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # has no name on Linux, so a killed process leaves no file
    except OSError as error:
        raise InputError(f"output {str(output)!r} cannot be written: {error.strerror}; give another folder") from error
    return path


def _exists(path: Path) -> InputError:
    return InputError(f"output folder {str(path)!r} exists; pass --overwrite to replace it, or give another name")


def _check_own_output(path: Path) -> None:
    foreign = foreign_files(path)
    if foreign and read_manifest(path) is None:
        raise InputError(
            f"output folder {str(path)!r} has no {MANIFEST_NAME}, so ace-prune did not write it (or an earlier version "
            "did); it will not be replaced: move it, or give another name"
        )
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"output folder {str(path)!r} holds {foreign[0]!r}{more}, which ace-prune did not write or which has "
            "changed; it will not be replaced: move that, or give another name"
        )


def finished_report(output: Path, fingerprint: dict[str, Any], overwrite: bool) -> PruneReport | None:
    """The report of a resumed run that had already finished. None if there is no output, or if the output may be
    replaced.

    Raises:
        InputError: the output is that of another run, and ``overwrite`` is not set.
    """
    manifest = read_manifest(output) if output.is_dir() else None
    changed = [] if manifest is None else differences(manifest["fingerprint"], fingerprint)
    if manifest is not None and not foreign_files(output) and not changed:
        return read_report(output)
    if output.exists() and not overwrite:
        raise _of_another_run(output, changed) if changed else _exists(output)
    return None


def already_complete(output: Path) -> str:
    """The message of a resumed run whose output is complete."""
    return f"{str(output)!r} is already complete; nothing was done"


def _of_another_run(output: Path, changed: list[str]) -> InputError:
    return InputError(
        f"output folder {str(output)!r} is complete, but of a run with other arguments ({'; '.join(changed)}); give "
        "another name, or pass --overwrite to replace it"
    )


def check_apart(output: Path, *inputs: str | Path | None) -> None:
    """Checks that a run will not replace its inputs or write into them.

    Args:
        output: the output folder. The run also makes the folder of :func:`ace_ext.runs.unfinished.folder_of` beside it.
        inputs: files and folders that the run reads. None, and names that do not exist on this machine, are ignored.

    Raises:
        InputError: an input is inside one of these folders, or contains one.
    """
    places = [_real(output), _real(folder_of(output))]
    for name in inputs:
        if name is None or not os.path.exists(os.path.expanduser(name)):
            continue
        real = _real(name)
        if any(place in (real, *real.parents) for place in places):
            raise _overlaps(output, name)
        if real in places[0].parents and real.is_dir():
            raise _overlaps(output, name)


def _overlaps(output: Path, name: str | Path) -> InputError:
    return InputError(f"output {str(output)!r} overlaps an input of this run, {str(name)!r}; give a folder elsewhere")


def check_outside(output: Path, option: str, file: Path | None) -> None:
    """Checks that a separate file that a run writes is not in a folder that the run replaces.

    Raises:
        InputError: it is.
    """
    if file is not None and {_real(output), _real(folder_of(output))} & {*_real(file).parents}:
        raise InputError(f"{option} {str(file)!r} is in the output folder, which is replaced; give a file elsewhere")


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))


def read_report(folder: str | Path) -> PruneReport:
    """The report in the folder of a pruned model.

    Raises:
        InputError: there is no such folder, it has no report, or the file is not a report of this program.
    """
    path = existing_folder(folder) / REPORT_NAME
    if not os.path.isfile(path):
        raise InputError(f"{str(folder)!r} has no {REPORT_NAME}; give a folder that ace-prune run wrote")
    try:
        return PruneReport.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a report of ace-prune: {one_line(error)}") from error


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Context manager that turns disk errors into :class:`InputError` with a message. Finished blocks stay on the disk
    for ``--resume``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        file = error.filename if error.filename2 is None else error.filename2  # of a copy that failed: the new file
        raise InputError(_disk_message(path, error.errno, file)) from error
    except SafetensorError as error:  # safetensors reports a system error only as text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise InputError(_disk_message(path, int(number[1]), None)) from error


def _disk_message(path: Path, number: int, name: str | bytes | None) -> str:
    mend = "free some space" if number in (errno.ENOSPC, errno.EDQUOT) else "correct that"
    at = "" if name is None or str(name) == str(path) else f" at {os.fsdecode(name)!r}"
    return f"output {str(path)!r} cannot be written: {os.strerror(number)}{at}; {mend} and continue with --resume"
