"""The folder of an unfinished run, next to its output. It records finished blocks, so that a crash loses at most one.

``.NAME.unfinished/`` holds ``model/`` (the output, patched block by block), ``state.json`` (the run's fingerprint, its
progress and its report so far), ``hidden-*.bin`` (the hidden states before the next block) and ``lock``.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.fingerprint import differences
from ace_ext.formats import OutputWriter
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates, Layout
from ace_ext.records import BlockReport, PruneReport

FORMAT = 1


class UnfinishedRun:
    """The folder of one unfinished run: its lock, its state, and the output until it is complete.

    A kind of run extends :meth:`_take_state`, which reads its own values of the state.

    Args:
        output: the output folder.
        fingerprint: everything that the output depends on, as plain values. Only a run with the same one is resumed.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any]) -> None:
        self.output, self.fingerprint = output, fingerprint
        self.folder = _folder_of(output)
        self.model = self.folder / "model"
        self._lock: TextIO | None = None
        self._made: list[Path] = []

    # Opening

    def _has_state(self) -> bool:
        return (self.folder / "state.json").is_file() and self.model.is_dir()

    def _open(self, resume: bool) -> None:
        """Makes and locks the folder, and reads the state of an earlier run, or removes what it left.

        Raises:
            InputError: another run holds the folder, or ``resume`` finds a run with another fingerprint.
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
            self.folder.mkdir(exist_ok=True)
            self._lock = _locked(self.folder, self.output)

    def _read_state(self) -> None:
        with self._damage_told():
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']}, not {FORMAT}")
            changed = differences(dict(state["fingerprint"]), self.fingerprint)
        if changed:
            raise InputError(
                f"resume: the unfinished run was another one: {'; '.join(changed)}; give the same arguments, or start "
                "over without --resume"
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
        for path in self.folder.iterdir():
            if path.name == "lock":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write_state(self, values: dict[str, Any]) -> None:
        """Writes the state, which is on the disk when this returns; after a crash it is the old one or the new one."""
        part = self.folder / "state.json.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "fingerprint": self.fingerprint, **values}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / "state.json")

    # The end

    def finish(self, report: PruneReport, report_name: str) -> Path:
        """Writes the report and moves the model to the output folder. An older folder is deleted only after that."""
        (self.model / report_name).write_text(report.to_json(), encoding="utf-8")
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
        self.remove()
        return self.output

    def remove(self) -> None:
        """Removes the folder, and the parent folders that were made for it if they are empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()  # last: after an earlier close another run could take the lock, and then lose its folder
        for parent in self._made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()

    def close(self) -> None:
        """Releases the lock; the files stay."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _folder_of(output: Path) -> Path:
    return output.parent / f".{output.name}.unfinished"


def recorded_fingerprint(output: Path) -> dict[str, Any]:
    """The fingerprint of an unfinished run; empty without one, and where its state is damaged (to resume it is then
    refused by :class:`Workspace`)."""
    try:
        return dict(json.loads((_folder_of(output) / "state.json").read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, KeyError, TypeError, ValueError):
        return {}


class Workspace(UnfinishedRun):
    """The folder of one unfinished pruning run: the engine's :class:`ace_ext.engine.protocols.Journal`. :meth:`finish`
    moves the model to its output folder.

    Args:
        output: the output folder.
        fingerprint: everything that the output depends on, as plain values. Only a run with the same one is resumed.
        resume: go on with what an earlier run left, if anything. Without it, that is removed.
        writes: whether this process writes the model and the state; other ranks only store hidden states.
        rank: of this process; part of the names of its hidden states.

    Raises:
        InputError: another run holds the folder, or ``resume`` finds a run with another fingerprint.
    """

    def __init__(
        self, output: Path, fingerprint: dict[str, Any], resume: bool = False, writes: bool = True, rank: int = 0
    ) -> None:
        super().__init__(output, fingerprint)
        self.writes, self.rank = writes, rank
        self.finished = 0
        self.blocks: list[BlockReport] = []
        self.notes: dict[str, Any] = {}
        """Plain values that the walk computed and a resumed run needs again."""
        self._hidden: dict[str, Any] = {}
        self.writer: OutputWriter | None = None
        """Writes the blocks; must be set before the first block is done."""
        self.resident_hidden = True
        """Whether hidden states stay in memory in addition to their files."""
        if writes:
            self._open(resume)
        elif resume and self._has_state():
            self._read_state()

    def _take_state(self, state: dict[str, Any]) -> None:
        finished, hidden = int(state["finished"]), dict(state["hidden"])
        notes, blocks = dict(state["notes"]), [BlockReport.from_dict(block) for block in state["blocks"]]
        if len(blocks) != finished:
            raise ValueError(f"{finished} blocks done, {len(blocks)} reported")
        self.finished, self.blocks, self.notes, self._hidden = finished, blocks, notes, hidden

    # The journal of the walk

    def open_hidden(self, states: Iterable[Tensor], device: torch.device) -> HiddenStates:
        """The inputs of the first unfinished block: those of the earlier run, or ``states`` if there is none.

        Raises:
            InputError: the earlier run had no hidden states for this rank.
        """
        name, resident = f"hidden-{self.rank}", self.resident_hidden
        if self.finished:
            kept = self._hidden.get(str(self.rank))
            if kept is None:
                raise InputError(f"resume: no hidden states of rank {self.rank}; use as many processes as before")
            layout = Layout(kept["shapes"], kept["dtype"])
            return HiddenStates.reopen(layout, self.finished % 2, self.folder, resident, name, device)
        return HiddenStates(states, self.folder, resident, name, device)

    def block_done(self, block: Block, report: BlockReport, layouts: dict[int, Any]) -> None:
        """Writes a pruned block and, once it is on the disk, the state that records it as done."""
        blocks = [*self.blocks, report]
        if self.writes:
            assert self.writer is not None  # set before the walk starts
            self.writer.write(block)
            values = {"finished": len(blocks), "hidden": layouts, "notes": self.notes}
            self._write_state({**values, "blocks": [asdict(block) for block in blocks]})
        self.finished, self.blocks = len(blocks), blocks


def recover(output: Path) -> None:
    """Completes or undoes the move of a run that was killed during :meth:`Workspace.finish`, so that the output is the
    older folder or the new one, and never missing.

    Raises:
        InputError: another run holds the folder, or both an older and a newer output exist: the user must choose.
    """
    folder = _folder_of(output)
    old, model = folder / "old", folder / "model"
    in_place = (folder / "state.json").is_file() and output.is_dir() and not model.is_dir()
    if not old.is_dir() and not in_place:
        return
    with _locked(folder, output) or contextlib.nullcontext():
        if not model.is_dir() and output.is_dir():
            shutil.rmtree(folder, ignore_errors=True)  # the model was moved; only this folder was left
        elif old.is_dir() and not output.exists():
            os.replace(old, output)
        elif old.is_dir():
            raise InputError(f"output {str(output)!r} is there twice, also as {str(old)!r}: remove or move one of them")


def _locked(folder: Path, output: Path) -> TextIO | None:
    """The folder's lock file, locked, so that two runs cannot write one folder. The lock is held until the file is
    closed or the process ends, also by a crash. None if the folder was removed meanwhile.

    Raises:
        InputError: another run holds it.
    """
    try:
        lock = (folder / "lock").open("w")
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


def _open_to_others(folder: Path) -> None:
    """Gives the files the permissions of any new file; safetensors makes its files readable only by their owner."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)
