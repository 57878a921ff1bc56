"""Faults at counted file events: a process of its own runs ``ace-prune``, and at its n-th event is killed, gets a
signal, or meets a disk that is full or broken.

Events are what changes files below one folder: opening one to write, each write of a buffer, flushing to the disk,
renames, removals, and files that safetensors writes as a whole. Nothing outside Python is replaced.
"""

import builtins
import contextlib
import errno
import io
import os
import signal
import sys
import threading
from pathlib import Path

import safetensors.torch
import torch
import transformers.modeling_utils

from ace_ext.cli.main import main
from ace_ext.runs import heal, heal_journal, statistics_file
from ace_ext.runs.model_source import Demand

KINDS = ("kill", "interrupt", "terminate", "no space", "io error")
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
ERRORS = {"no space": errno.ENOSPC, "io error": errno.EIO}
FREEING = ("unlink", "remove", "rmdir", "replace", "rename", "chmod")
"""Events that a full disk does not refuse."""

_open = builtins.open


class Faults:
    """Counts events, and makes the fault at one of them.

    Args:
        place: the folder whose events count.
        kind: of :data:`KINDS`; None: count only.
        at: the number of the event, from 1.
    """

    def __init__(self, place: Path, kind: str | None, at: int) -> None:
        self.place, self.kind, self.at, self.count = f"{place.resolve()}{os.sep}", kind, at, 0
        self._counting = threading.Lock()  # blocks are written in a thread of their own

    def event(self, what: str, path: object, tear=None) -> None:
        """One event on a path. ``tear``: writes a part of the data, for a kill in the middle of a write."""
        if isinstance(path, str | bytes | os.PathLike) and not os.path.abspath(os.fsdecode(path)).startswith(
            self.place
        ):
            return
        with self._counting:
            self.count += 1
            number = self.count
        if self.kind == "no space" and number > self.at and what not in FREEING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if self.kind is None or number != self.at:
            return
        if self.kind in SIGNALS:
            if tear is not None and self.kind != "interrupt":  # which Python handles after the write
                tear()
            os.kill(os.getpid(), SIGNALS[self.kind])
        elif not (self.kind == "no space" and what in FREEING):
            raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]), str(path))


def install(faults: Faults) -> None:
    """Routes this process's file events through ``faults``."""

    class Counted(io.FileIO):
        def write(self, data):
            part = memoryview(data).cast("B")
            faults.event("write", self.name, lambda: super(Counted, self).write(part[: len(part) // 2]))
            return super().write(data)

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        faults.event("open", file)
        raw = Counted(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

    def counted(owner, name):
        real = getattr(owner, name)

        def call(first, *more, **named):
            faults.event(name, None if "dir_fd" in named or isinstance(first, int) else first)
            return real(first, *more, **named)

        setattr(owner, name, call)

    def saved(owner, name):
        real = getattr(owner, name)

        def save(tensors, filename, *more, **named):
            faults.event("write", filename, lambda: Path(filename).write_bytes(b"\0" * 100))
            return real(tensors, filename, *more, **named)

        setattr(owner, name, save)

    builtins.open = io.open = opened
    for name in ("replace", "rename", "mkdir", "unlink", "remove", "rmdir", "fsync", "truncate", "chmod"):
        counted(os, name)
    for owner in (safetensors.torch, statistics_file, heal_journal):
        saved(owner, "save_file")
    saved(transformers.modeling_utils, "safe_save_file")


def run_with_fault(arguments: list[str], place: str, kind: str | None, at: int, told: str) -> None:
    """``ace-prune`` with a fault; to be run in a process of its own. Hidden states are in files, heal saves its state
    after each step, and what is printed, with the number of events as a last line, goes to the file ``told``."""
    torch.set_num_threads(1)
    Demand.hidden_fits = lambda _: False
    heal_journal.SAVE_SECONDS = heal_journal.SAVE_SHARE = 0
    heal.HealDemand.divide = lambda *_: (heal.Division(2, False, False), heal.Estimate())
    faults = Faults(Path(place), kind, at)
    with _open(told, "w") as file, contextlib.redirect_stderr(file), _open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere):
            install(faults)
            status = main(arguments)
        print(f"events {faults.count}", file=file)
        file.flush()
    sys.stdout.flush()
    os._exit(status)  # what the interpreter does at its end is not part of the run
