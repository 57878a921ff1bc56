"""The folder of an unfinished run, next to its output: its lock, its state, and the rename of the complete output.

``.NAME.unfinished/`` holds ``model/`` (the output, patched block by block), ``state.json`` (the run's fingerprint, its
progress and its report so far), hidden states (``*.bin``), files of the kind of run, and ``lock``. If a folder of this
name holds anything else, or is a link, this program did not make it and does not touch it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ace_ext.cards import BASE_CARD, CARD, write_card
from ace_ext.errors import InputError
from ace_ext.fingerprint import differences
from ace_ext.formats import OutputWriter, complete, exchanging
from ace_ext.models.blocks import Block
from ace_ext.models.safetensors_files import umask
from ace_ext.records import REPORT_NAME, PruneReport
from ace_ext.runs.own_files import MANIFEST_NAME, write_manifest
from ace_ext.whole_files import sync_folder, write_whole

FORMAT = 1

AT_THE_END = frozenset({CARD, BASE_CARD, REPORT_NAME, MANIFEST_NAME})
"""Files that :meth:`UnfinishedRun.finish` writes. It replaces files of these names that were copied from the dense
model."""


class UnfinishedRun:
    """The folder of one unfinished run: its lock, its state, and the output until it is complete.

    A kind of run extends :meth:`_take_state`, which reads its own values of the state.

    Args:
        output: the output folder.
        fingerprint: everything that the output depends on, as plain values. Only a run with the same one is resumed.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any]) -> None:
        self.output, self.fingerprint = output, fingerprint
        self.folder = folder_of(output)
        self.model = self.folder / "model"
        self._lock: TextIO | None = None
        self._made: list[Path] = []

    # Opening

    def _has_state(self) -> bool:
        return (self.folder / "state.json").is_file() and self.model.is_dir()

    def _open(self, resume: bool) -> None:
        """Makes and locks the folder. Then reads the state of an earlier run, or removes its files.

        Raises:
            InputError: another run has locked the folder, or ``resume`` finds a run with another fingerprint.
        """
        self._make_parents()
        self._take_lock()
        try:
            if resume and self._has_state():
                self._read_state()
            else:
                self._clear()
        except BaseException:
            self.close()
            raise

    def _make_parents(self) -> None:
        for parent in [self.output.parent, *self.output.parent.parents]:
            if parent.exists():
                break
            self._made.append(parent)
        self.output.parent.mkdir(parents=True, exist_ok=True)

    def _take_lock(self) -> None:
        while self._lock is None:  # None: a run that ended meanwhile removed the folder; then try again
            check_own(self.folder)
            self.folder.mkdir(exist_ok=True)
            self._lock = _locked(self.folder, self.output)

    def _read_state(self) -> None:
        with self._damage_told():
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            if state.pop("sha256") != _sha256(state):
                raise ValueError("its checksum differs")
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']}, not {FORMAT}")
            changed = differences(dict(state["fingerprint"]), self.fingerprint)
        if changed:
            raise InputError(
                f"resume: the unfinished run differs from this one: {'; '.join(changed)}; give the same arguments, or "
                "start over without --resume"
            )
        with self._damage_told():
            self._take_state(state)

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            path = self.folder / "state.json"
            raise InputError(f"resume: {path} is damaged ({error!r}); start over without --resume") from error

    def _take_state(self, state: dict[str, Any]) -> None:
        """Reads a state's own values. Raises KeyError, TypeError or ValueError if it is damaged."""
        raise NotImplementedError

    def _clear(self) -> None:
        for path in _all_but_the_lock(self.folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write_state(self, values: dict[str, Any]) -> None:
        """Writes the state and syncs it to the disk. After a crash the file has the old state or the new one."""
        part = self.folder / "state.json.part"
        with part.open("w", encoding="utf-8") as file:
            state = json.loads(json.dumps({"format": FORMAT, "fingerprint": self.fingerprint, **values}))
            json.dump({**state, "sha256": _sha256(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / "state.json")

    # The end

    def finish(self, report: PruneReport, report_name: str) -> Path:
        """Writes the report, the model card and the manifest to the disk, and moves the model to the output folder. An
        older folder is deleted only after that."""
        write_whole(self.model / report_name, report.to_json().encode())
        write_card(self.model, report)
        write_manifest(self.model, self.fingerprint)
        _open_to_others(self.model)
        old = self.folder / "old"
        if self.output.exists():
            os.replace(self.output, old)
        try:
            os.replace(self.model, self.output)
        except OSError:
            if old.exists():
                os.replace(old, self.output)
            raise
        sync_folder(self.output.parent)
        self.remove()
        _discard_first_part(self.output)
        return self.output

    def remove(self) -> None:
        """Removes the folder, and the parent folders that were made for it if they are empty."""
        _remove(self.folder)
        self.close()  # last: after an earlier close another run could take the lock, and then lose its folder
        for parent in self._made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()

    def close(self) -> None:
        """Releases the lock; the files stay."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def folder_of(output: Path) -> Path:
    """The folder of the unfinished run that writes ``output``."""
    return output.parent / f".{output.name}.unfinished"


def first_part(output: Path) -> Path:
    """What the first part of a run with ``distill`` writes in place of ``output``; it is never finished."""
    return output.with_name(f"{output.name}.pruned")


def _discard_first_part(output: Path) -> None:
    """Removes what a run with ``distill`` that was killed left beside its output. A run that writes an output of that
    name has a folder of the same name, and another state."""
    if "files" in _recorded(first_part(output)):
        with contextlib.suppress(InputError):  # it is locked: this run is its second part, and the whole run removes it
            discard(first_part(output))


def _all_but_the_lock(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != "lock"]


def _remove(folder: Path) -> None:
    """Removes the folder of a run that holds its lock. The lock is the last file: as soon as it is gone another run can
    lock the folder, and what was still removed then could be that run's."""
    with contextlib.suppress(OSError):
        for path in _all_but_the_lock(folder):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sha256(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


_OWN = re.compile(
    r"lock|state\.json(\.part)?|model|packed|dense|old|stats|[a-z]+(-[a-z0-9]+)*\.bin|training-\d+|\.model\.unfinished"
)
"""Names that such a folder may contain."""


def check_own(folder: Path) -> None:
    """Checks that a folder, if it exists, is that of an unfinished run. Call it before anything in it is removed.

    Raises:
        InputError: it is a link or a file, or holds a link or something that no run puts there.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{str(folder)!r} is a link or a file where the run needs a folder; remove it")
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.is_symlink() or not (path.is_file() or path.is_dir()) or not _OWN.fullmatch(path.name):
            raise InputError(
                f"{str(path)!r} was not made by ace-prune, and the run needs its folder; move it elsewhere"
            )


def recorded_fingerprint(output: Path) -> dict[str, Any]:
    """The fingerprint of an unfinished run. Empty if there is none or its state is damaged (:class:`Workspace` then
    refuses to resume it)."""
    found = _recorded(output).get("fingerprint")
    return found if isinstance(found, dict) else {}


def _recorded(output: Path) -> dict[str, Any]:
    """The state of an unfinished run. Empty if there is none or it is damaged."""
    try:
        state = json.loads((folder_of(output) / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def recover(output: Path) -> None:
    """Completes or undoes the move of a run that was killed during :meth:`UnfinishedRun.finish`. The output is then
    the older folder or the new one, and never missing.

    Raises:
        InputError: the folder is not that of a run; another run has locked it; or both an older and a newer output
            exist, and the user must choose one.
    """
    folder = folder_of(output)
    check_own(folder)
    if exchanging(folder):
        with _while_locked(folder, output) as there:
            if there:
                complete(folder)
    old, model = folder / "old", folder / "model"
    in_place = folder.is_dir() and output.is_dir() and not model.is_dir()
    if not old.is_dir() and not in_place:
        return
    with _while_locked(folder, output) as there:
        if not there:
            return
        if not model.is_dir() and output.is_dir():
            _remove(folder)  # the model was moved; only this folder was left
        elif old.is_dir() and not output.exists():
            os.replace(old, output)
        elif old.is_dir():
            raise InputError(f"output {str(output)!r} exists twice, also as {str(old)!r}; remove or move one of them")


def discard(output: Path) -> None:
    """Removes the folder of an unfinished run whose output is complete, if there is one.

    Raises:
        InputError: as :func:`recover`.
    """
    folder = folder_of(output)
    check_own(folder)
    if folder.is_dir():
        with _while_locked(folder, output) as there:
            if there:
                _remove(folder)


def check_written(model: Path, writer: OutputWriter, blocks: list[Block], sums: Mapping[str, Any]) -> None:
    """Checks that the output of an unfinished run has not changed since it was written, by its checksums.

    Args:
        model: the folder.
        writer: its writer.
        blocks: all blocks of the model.
        sums: ``rest`` and ``blocks``, the checksums of :class:`ace_ext.formats.OutputWriter`; only those of written
            blocks.

    Raises:
        InputError: they differ; the message names the file or the block.
    """
    rest = writer.rest(blocks)
    if rest is None:
        return
    kept = {name: value for name, value in sums["rest"].items() if name not in AT_THE_END}
    changed = [str(model / name) for name, value in kept.items() if rest.get(name) != value]
    for block in blocks:
        if block.name in sums["blocks"] and writer.written(block) != sums["blocks"][block.name]:
            changed.append(f"{block.name} in {model}")
    if changed:
        raise InputError(
            f"resume: {changed[0]} has changed since the run wrote it (its checksum differs); start over without "
            "--resume"
        )


def _locked(folder: Path, output: Path) -> TextIO | None:
    """The folder's lock file, locked, so that two runs cannot write one folder. The lock lasts until the file is closed
    or the process ends, even by a crash. None if the folder was removed meanwhile.

    Raises:
        InputError: another run has locked it.
    """
    try:
        lock = os.fdopen(_open_lock(folder / "lock"), "w", encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
            return lock
    except FileNotFoundError:
        pass
    except BlockingIOError as error:
        lock.close()
        raise InputError(f"output {str(output)!r} is being written by another run; wait for it") from error
    lock.close()
    return None


@contextlib.contextmanager
def _while_locked(folder: Path, output: Path) -> Iterator[bool]:
    """Locks a folder, as :func:`_locked`. False if a run that ended meanwhile removed it."""
    lock = _locked(folder, output)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.close()


def _open_lock(path: Path) -> int:
    """Opens a lock file or makes it, but follows no link and waits for no pipe."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise InputError(f"{str(path)!r} is not a file; remove it")
    return number


def _open_to_others(folder: Path) -> None:
    """Gives the files the permissions of any new file; safetensors makes its files readable only by their owner."""
    mask = umask()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)
