"""The calibration batches' hidden states on their way from block to block: in memory, or in files of a bounded run."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.models.safetensors_files import flush


@dataclass(frozen=True)
class Layout:
    """Where each batch's states lie in a file: raw, one after the other."""

    shapes: list[list[int]]
    dtype: str  # as torch names it, without "torch."

    @property
    def offsets(self) -> list[int]:
        """Byte offsets; the last is the file's size."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape) * getattr(torch, self.dtype).itemsize)
        return ends


class HiddenStates:
    """``[batch, seqlen, d_model]`` for each calibration batch. A block reads all batches by ``states[i]``, hands in
    what it made of them by :meth:`put`, and :meth:`commit` ends it.

    Args:
        states: the batches' first hidden states, one after the other; none is kept once it is in a file.
        folder: where two files take turns, so that the states that entered a block are whole until it is done: what a
            resumed run starts from. None: no file.
        resident: keep the states in memory too, and write a file only when a block is done.
        name: what the files' names start with.
        device: where ``states[i]`` are put that come from a file.
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
        self._kept: list[Tensor] | None = [] if resident or folder is None else None
        shapes, dtype = [], torch.float32
        for state in states:
            shapes.append(list(state.shape))
            dtype = state.dtype
            if self._kept is not None:
                self._kept.append(state)
            if self._files:
                with self._files[0].open("ab" if len(shapes) > 1 else "wb") as file:
                    file.write(_bytes(state))
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
        """The states that a run left in its files."""
        states = cls((), folder, False, name, device)
        states.layout, states.side = layout, side
        if resident:
            states._kept = [states._read(i).to(device) for i in range(len(states))]
        return states

    def fork(self, name: str) -> "HiddenStates":
        """A second walk from the same states, kept in the same way."""
        states = (self[i] for i in range(len(self)))
        return HiddenStates(states, self._folder, self._kept is not None, name, self._device)

    def sibling(self, name: str) -> "HiddenStates":
        """States of another name that an earlier run left beside these, of the same shapes and the same turn."""
        resident = self._kept is not None
        assert self._folder is not None  # a run in memory alone leaves nothing behind
        return self.reopen(self.layout, self.side, self._folder, resident, name, self._device)

    def remove(self) -> None:
        """Forgets the states, their files too."""
        self._kept = []
        for file in self._files:
            file.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.layout.shapes)

    def __getitem__(self, i: int) -> Tensor:
        return self._read(i).to(self._device) if self._kept is None else self._kept[i]

    def put(self, i: int, state: Tensor) -> None:
        """Batch ``i``'s states behind the block; in a file, the ones before it stay until :meth:`commit`."""
        if self._kept is not None:
            self._kept[i] = state
            return
        self._write(i, state)

    def commit(self) -> None:
        """Swaps read and write buffers: the next block reads what was put, on the disk too where there are files."""
        if not self._files:
            return
        if self._kept is not None:
            for i, state in enumerate(self._kept):
                self._write(i, state)
        flush(self._files[1 - self.side])
        self.side = 1 - self.side

    @property
    def nbytes(self) -> int:
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

    def _write(self, i: int, state: Tensor) -> None:
        path = self._files[1 - self.side]
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(self.layout.offsets[i])
            file.write(_bytes(state))


def _bytes(state: Tensor) -> memoryview:
    return memoryview(state.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
