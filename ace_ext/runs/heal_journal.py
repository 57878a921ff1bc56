"""The folder of an unfinished distillation: its state and its tensors.

Beside the files of every unfinished run, ``.NAME.unfinished/`` holds ``teacher-*.bin`` and ``student-*.bin`` (hidden
states) and ``training-N/`` (weights in float32, Adam's moments and the best weights so far, one file for each block).
"""

import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.formats import OutputWriter
from ace_ext.models.blocks import Block
from ace_ext.models.checksums import file_sha256
from ace_ext.models.safetensors_files import flush
from ace_ext.runs.unfinished import UnfinishedRun, check_written

SAVE_SECONDS = 300
"""The shortest time between two saved states. A crash loses the work since the last one."""
SAVE_SHARE = 20
"""Saving takes at most about 1 / ``SAVE_SHARE`` of the time."""


class HealJournal(UnfinishedRun):
    """The folder of one unfinished distillation: a :class:`ace_ext.healing.protocols.Journal`.

    Args:
        output: the output folder.
        fingerprint: everything that the output depends on, as plain values. Only a run with the same one is resumed.
        resume: continue an earlier run, if there is one. Otherwise its files are removed.

    Raises:
        InputError: another run has locked the folder, or ``resume`` finds a run with another fingerprint.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        super().__init__(output, fingerprint)
        self.notes: dict[str, Any] = {}
        self.writer: OutputWriter | None = None
        """Writes the blocks; must be set before training starts."""
        self._training: str | None = None
        self._sums: dict[str, str] = {}  # of the files of the last save
        self._saved, self._cost = time.perf_counter(), 0.0
        self._open(resume)

    def _take_state(self, state: dict[str, Any]) -> None:
        self.notes, self._training, self._sums = dict(state["notes"]), state["training"], dict(state["sums"])

    @property
    def trained(self) -> dict[str, str]:
        """The checksums of the blocks that are trained and written, by name."""
        found: dict[str, str] = self.notes["output"]["blocks"]
        return found

    def check_output(self, blocks: list[Block]) -> None:
        """Records checksums of the output, or compares it with those of the earlier run. Call it once the writer is
        set. ``blocks``: all blocks of the model.

        Raises:
            InputError: it has changed.
        """
        assert self.writer is not None
        if self.notes.get("laid_out"):
            check_written(self.model, self.writer, blocks, self.notes["output"])
            return
        self.notes |= {"laid_out": True, "output": {"rest": self.writer.rest(blocks) or {}, "blocks": {}}}
        self.save()

    def due(self) -> bool:
        """Whether ``SAVE_SECONDS``, and ``SAVE_SHARE`` times what the last save took, have passed since that save."""
        return time.perf_counter() - self._saved >= max(SAVE_SECONDS, SAVE_SHARE * self._cost)

    def save(self, tensors: Iterable[tuple[str, Mapping[str, Tensor]]] = ()) -> None:
        """Stores notes and tensors together. Tensors of earlier calls are removed once this is done."""
        start = time.perf_counter()
        name: str | None = None
        sums = {}
        for group, values in tensors:
            name = name or self._new_folder()
            file = self.folder / name / f"{group}.safetensors"
            save_file({key: value.cpu().contiguous() for key, value in values.items()}, file)
            flush(file)
            sums[group] = file_sha256(file)
        self._write_state({"notes": self.notes, "training": name, "sums": sums})
        self._training, self._sums = name, sums
        for old in self.folder.glob("training-*"):
            if old.name != name:
                shutil.rmtree(old)
        self._saved = time.perf_counter()
        self._cost = self._saved - start

    def _new_folder(self) -> str:
        number = 0 if self._training is None else int(self._training.rpartition("-")[2]) + 1
        name = f"training-{number}"
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of a run that was killed while it saved
        (self.folder / name).mkdir()
        return name

    def tensors(self, group: str) -> dict[str, Tensor]:
        """A group of tensors of the last save.

        Raises:
            InputError: its file has changed since it was saved.
        """
        assert self._training is not None  # the notes say that there are any
        file = self.folder / self._training / f"{group}.safetensors"
        if not file.is_file() or file_sha256(file) != self._sums.get(group):
            raise InputError(
                f"resume: {file} has changed since the run wrote it (its checksum differs); start over without --resume"
            )
        return dict(load_file(file))

    def write(self, block: Block) -> None:
        """Writes a trained block to the output."""
        assert self.writer is not None  # set before training starts
        self.writer.write(block)
        self.trained[block.name] = self.writer.written(block)
