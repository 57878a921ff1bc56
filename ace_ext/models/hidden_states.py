"""The hidden states of the calibration batches between two blocks: in memory, or in files."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.models.safetensors_files import flush


@dataclass(frozen=True)
class Layout:
    """The layout of a file of hidden states: each batch's raw bytes, one batch after the other. A checksum of 32 bytes
    follows when all are written."""

    shapes: list[list[int]]
    dtype: str  # as torch names it, without "torch."

    @property
    def offsets(self) -> list[int]:
        """Byte offsets; at the last, the checksum begins."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape) * getattr(torch, self.dtype).itemsize)
        return ends


class HiddenStates:
    """The hidden states of each calibration batch, ``[batch, seqlen, d_model]``.

    For each block, ``states[i]`` reads the input of batch i, :meth:`put` stores its output, and :meth:`commit` makes
    the outputs the next block's inputs.

    Args:
        states: the batches' first hidden states, one after the other. Without ``resident`` each is freed once it is in
            the file.
        folder: holds two files that are read and written in turn. A block's inputs stay complete until the block is
            done, so that a resumed run can start from them. None: no files.
        resident: keep the states in memory too, and write a file only when a block is done.
        name: prefix of the files' names.
        device: where ``states[i]`` is put if it is read from a file.
    """

    def __init__(
        self,
        states: Iterable[Tensor],
        folder: Path | None = None,
        resident: bool = True,
        name: str = "hidden",
        device: torch.device | str = "cpu",
    ) -> None:
        self._folder = folder
        self._files = [] if folder is None else [folder / f"{name}-{side}.bin" for side in (0, 1)]
        self.side = 0
        self._device = device
        self._sums: dict[int, bytes] = {}  # of the batches that were written for the next block
        self._kept: list[Tensor] | None = [] if resident or folder is None else None
        shapes, sums, dtype = [], [], torch.float32
        for state in states:
            shapes.append(list(state.shape))
            dtype = state.dtype
            if self._kept is not None:
                self._kept.append(state)
            if self._files:
                with self._files[0].open("ab" if len(shapes) > 1 else "wb") as file:
                    file.write(_bytes(state))
                sums.append(_sha256(state))
        if sums:
            with self._files[0].open("ab") as file:
                file.write(_combined(sums))
        self.layout = Layout(shapes, str(dtype).removeprefix("torch."))

    @classmethod
    def reopen(
        cls,
        layout: Layout,
        side: int,
        folder: Path,
        resident: bool,
        name: str = "hidden",
        device: torch.device | str = "cpu",
    ) -> "HiddenStates":
        """The states that an earlier run left in its files; ``side`` is the file to read, 0 or 1.

        Raises:
            InputError: the file is too short, or has changed since that run wrote it.
        """
        states = cls((), folder, False, name, device)
        states.layout, states.side = layout, side
        kept, sums = [], []
        for i in range(len(states)):
            state = states._read(i)
            sums.append(_sha256(state))
            if resident:
                kept.append(state.to(device))
        states._check(sums)
        states._kept = kept if resident else None
        return states

    def fork(self, name: str) -> "HiddenStates":
        """A copy for an extra pass, kept in the same way under another name."""
        return self.beside(name, (self[i] for i in range(len(self))))

    def beside(self, name: str, states: Iterable[Tensor], resident: bool | None = None) -> "HiddenStates":
        """Other states, kept in the same way (or, by ``resident``, in memory or files) under another name."""
        resident = self._kept is not None if resident is None else resident
        return HiddenStates(states, self._folder, resident, name, self._device)

    def sibling(self, name: str) -> "HiddenStates":
        """The states that an earlier run left under another name in the same folder, with the same layout and side."""
        resident = self._kept is not None
        assert self._folder is not None  # only a run with files can be resumed
        return self.reopen(self.layout, self.side, self._folder, resident, name, self._device)

    def remove(self) -> None:
        """Frees the states and deletes their files."""
        self._kept = []
        for file in self._files:
            file.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.layout.shapes)

    def __getitem__(self, i: int) -> Tensor:
        return self._read(i).to(self._device) if self._kept is None else self._kept[i]

    def put(self, i: int, state: Tensor) -> None:
        """Stores the output of batch ``i``. In files, its input is kept until :meth:`commit`."""
        if self._kept is not None:
            self._kept[i] = state
            return
        self._sums[i] = self._write(i, state, self._files[1 - self.side])

    def commit(self) -> None:
        """Swaps read and write buffers: the next block reads what was put. With files, the data is on the disk when
        this returns."""
        self.commit_later()()

    def commit_later(self) -> Callable[[], None]:
        """Swaps the buffers now, and returns a function that brings the data to the disk. Another thread may call it.
        Nothing may be put until it has returned."""
        if not self._files:
            return lambda: None
        path, kept, sums = self._files[1 - self.side], [*(self._kept or ())], self._sums
        self.side, self._sums = 1 - self.side, {}

        def bring() -> None:
            for i, state in enumerate(kept):
                sums[i] = self._write(i, state, path)
            kept.clear()
            with path.open("r+b") as file:
                file.seek(self.nbytes)
                file.write(_combined(sums[i] for i in range(len(self))))
                file.truncate()
            flush(path)

        return bring

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all batches."""
        return self.layout.offsets[-1]

    def _read(self, i: int) -> Tensor:
        state = torch.empty(self.layout.shapes[i], dtype=getattr(torch, self.layout.dtype))
        with self._files[self.side].open("rb", buffering=0) as file:
            file.seek(self.layout.offsets[i])
            view = memoryview(state.flatten().view(torch.uint8).numpy().data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise InputError(
                        f"{self._files[self.side]} ends before the states of batch {i}; start over without --resume"
                    )
                view = view[count:]
        return state

    def _check(self, sums: list[bytes]) -> None:
        path = self._files[self.side]
        with path.open("rb") as file:
            file.seek(self.nbytes)
            recorded = file.read()
        if recorded != _combined(sums):
            raise InputError(
                f"resume: {path} has changed since the run wrote it (its checksum differs); start over without --resume"
            )

    def _write(self, i: int, state: Tensor, path: Path) -> bytes:
        """Writes the states of batch ``i``, and returns their checksum."""
        data = _bytes(state)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(self.layout.offsets[i])
            file.write(data)
        return hashlib.sha256(data).digest()


def _sha256(state: Tensor) -> bytes:
    return hashlib.sha256(_bytes(state)).digest()


def _combined(sums: Iterable[bytes]) -> bytes:
    return hashlib.sha256(b"".join(sums)).digest()


def _bytes(state: Tensor) -> memoryview:
    return memoryview(state.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
