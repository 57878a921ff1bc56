"""The folder of an unfinished pruning run. It records finished blocks. A crash loses only the last ones: the block that
is being pruned, the one that is being written, and those since hidden states were last written."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.formats import OutputWriter
from ace_ext.models.block_store import BlockSource, OffloadedBlocks
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates, Layout
from ace_ext.models.safetensors_files import Shards
from ace_ext.records import BlockReport, PruneReport
from ace_ext.runs.unfinished import UnfinishedRun, check_written

LEAST_COST = 0.5
"""Seconds. Hidden states that take less time to write are written after each block."""
LEAST_WORK = 4.0
"""Others are written once this multiple of their writing time has passed since the last write."""


class Workspace(UnfinishedRun):
    """The folder of one unfinished pruning run: the engine's :class:`ace_ext.engine.protocols.Journal`. :meth:`finish`
    moves the model to its output folder.

    Args:
        output: the output folder.
        fingerprint: everything that the output depends on, as plain values. Only a run with the same one is resumed.
        resume: continue an earlier run, if there is one. Otherwise its files are removed.
        writes: whether this process writes the model and the state; other ranks only store hidden states.
        rank: of this process; part of the names of its hidden states.

    Raises:
        InputError: another run has locked the folder, or ``resume`` finds a run with another fingerprint.
    """

    def __init__(
        self, output: Path, fingerprint: dict[str, Any], resume: bool = False, writes: bool = True, rank: int = 0
    ) -> None:
        super().__init__(output, fingerprint)
        self.writes, self.rank = writes, rank
        self.finished = 0
        """How many blocks are recorded as done."""
        self.blocks: list[BlockReport] = []
        """The reports of all blocks that are done."""
        self.notes: dict[str, Any] = {}
        """Plain values that the walk computed and a resumed run needs again."""
        self._hidden: dict[str, Any] = {}
        self._side = 0
        self._cost, self._since = 0.0, time.monotonic()
        self._sums: dict[str, dict[str, str]] = {"rest": {}, "blocks": {}}
        self.writer: OutputWriter | None = None
        """Writes the blocks; must be set before the first block is done."""
        self.resident_hidden = True
        """Whether hidden states stay in memory in addition to their files."""
        self.writes_behind = True
        """Whether a block is written while the next one is pruned; it stays in memory for that long."""
        self._read: Shards | None = None
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "write-behind")
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
        self._side = int(state["side"])
        self._sums = {"rest": dict(state["sums"]["rest"]), "blocks": dict(state["sums"]["blocks"])}

    def check_output(self, blocks: list[Block]) -> None:
        """Records checksums of the output, or compares it with those of the earlier run. Call it once the writer is
        set. ``blocks``: all blocks of the model.

        Raises:
            InputError: it has changed.
        """
        assert self.writer is not None
        if self.finished:
            check_written(self.model, self.writer, blocks, self._sums)
        else:
            self._sums = {"rest": self.writer.rest(blocks) or {}, "blocks": {}}

    def finish(self, report: PruneReport, report_name: str) -> Path:
        """Completes the model's files, and then does what :meth:`UnfinishedRun.finish` does."""
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
            return HiddenStates.reopen(layout, self._side, self.folder, resident, name, device)
        return HiddenStates(states, self.folder, resident, name, device)

    def restore_(self, model: nn.Module, store: BlockSource) -> None:
        """Gives the blocks of ``model`` that are finished their pruned weights, also those that an earlier run
        finished. Blocks that are read from files are read from the output's from now on, once they are written."""
        done = {report.name for report in self.blocks}
        if isinstance(store, OffloadedBlocks):
            store.read_pruned_from(lambda block: self._output(model) if self._is_done(block) else None)
            return
        for block in store.blocks:
            for name, parameter in block.module.named_parameters() if block.name in done else ():
                parameter.data.copy_(self._output(model).read(f"{block.name}.{name}"))

    def _is_done(self, block: Block) -> bool:
        return any(report.name == block.name for report in self.blocks)

    def _output(self, model: nn.Module) -> Shards:
        """The files that the run writes, which only one of its processes has opened to write."""
        if self.writer is not None:
            return self.writer.shards
        if self._read is None:
            self._read = Shards(self.model).adopt(model)
        return self._read

    def open_part(self, states: Iterable[Tensor], device: torch.device, resumed: bool) -> HiddenStates:
        """The inputs of a part of a model; ``resumed``: those that the earlier run left before a block within the part.

        Raises:
            InputError: as :meth:`open_hidden`.
        """
        if resumed:
            return self.open_hidden(states, device)
        self.settle()
        self._side = 0
        return HiddenStates(states, self.folder, self.resident_hidden, f"hidden-{self.rank}", device)

    def wants_states(self) -> bool:
        """Whether hidden states are written after this block. States in files always are;
        :data:`LEAST_COST` and :data:`LEAST_WORK` decide for others."""
        waited = time.monotonic() - self._since
        return not self.resident_hidden or self._cost < LEAST_COST or waited >= LEAST_WORK * self._cost

    def block_done(
        self,
        block: Block,
        report: BlockReport,
        layouts: dict[int, Any],
        commits: Sequence[Callable[[], None]] | None,
    ) -> None:
        """Writes a pruned block, calls ``commits``, and then writes the state that records the block as done. A thread
        does this while the caller continues. Without ``commits`` the state is not written."""
        self.settle()
        self.blocks = [*self.blocks, report]
        kept = block.as_it_is() if self.writes else block
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

        def write() -> None:
            with _beside(ready):
                if self.writes:
                    assert self.writer is not None  # set before the walk starts
                    self.writer.write(kept)
                    self._sums["blocks"][kept.name] = self.writer.written(kept)
                if commits is not None:
                    self._record(layouts, commits)

        if self.writes_behind:
            self._writing = self._thread.submit(write)
        else:
            write()

    def _record(self, layouts: dict[int, Any], commits: Sequence[Callable[[], None]]) -> None:
        """Records all blocks that were written as done, with the hidden states after them."""
        start = time.monotonic()
        for commit in commits:
            commit()
        side, finished = 1 - self._side, len(self.blocks)
        if self.writes:
            values = {"finished": finished, "side": side, "hidden": layouts, "notes": self.notes}
            values["sums"] = self._sums
            self._write_state({**values, "blocks": [asdict(block) for block in self.blocks]})
        self.finished, self._side, self._since = finished, side, time.monotonic()
        self._cost = self._since - start

    def settle(self) -> None:
        """Waits until the last finished block is recorded, and raises the error of its thread, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def stop_writing(self) -> None:
        """Waits for the thread that writes. If it failed, the block is not recorded as done."""
        self._thread.shutdown()

    def close(self) -> None:
        """Waits for the thread that writes, and releases the lock; the files stay."""
        self.stop_writing()
        super().close()


@contextmanager
def _beside(ready: "torch.cuda.Event | None") -> Iterator[None]:
    """On a GPU, copies run in a separate stream. It waits only for the work before ``ready`` (not tested on a GPU)."""
    if ready is None:
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().wait_event(ready)
        yield
