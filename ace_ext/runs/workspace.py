"""The folder of an unfinished pruning run. It records finished blocks, so that a crash loses at most one."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.formats import OutputWriter
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates, Layout
from ace_ext.records import BlockReport, PruneReport
from ace_ext.runs.unfinished import UnfinishedRun


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

    def finish(self, report: PruneReport, report_name: str) -> Path:
        """Ends the writing of the model, and then as :meth:`UnfinishedRun.finish`."""
        assert self.writer is not None  # set before the walk starts
        self.writer.finish(report)
        return super().finish(report, report_name)

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
