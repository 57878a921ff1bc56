"""The progress of a run: a bar on a terminal, and JSON lines for programs."""

import json
import sys
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from ace_ext.process_memory import resident_bytes
from ace_ext.records import BlockReport, PruneReport

if TYPE_CHECKING:
    from ace_ext.healing.progress import HealProgress


class Progress:
    """Shows finished blocks, calibration tokens per second, sparsity so far, memory and the time left.

    Args:
        show: show a bar on stderr.
        log: where to write JSON lines, one per block, each flushed. Their keys: ``event`` (``start``, ``block``,
            ``end``; ``remove`` for a step of a removal, with ``kind``, ``done`` and ``of``),
            ``time`` (seconds since the epoch), ``tokens`` (calibration tokens of all processes, at the
            start), ``block``, ``done``, ``blocks``, ``seconds`` (of the block; at the end, of the run),
            ``tokens_per_second``, ``sparsity`` (so far), ``memory_bytes`` (resident), ``seconds_left``. A distillation
            writes the lines of :class:`ace_ext.healing.progress.HealProgress`, with a ``start`` and an ``end`` too.
        notes: write :meth:`note` to stderr, unless ``log`` is there.
    """

    def __init__(self, show: bool = False, log: TextIO | None = None, notes: bool = False) -> None:
        self.shown, self._log = show, log
        """Whether bars are shown."""
        self._notes = notes and log is not sys.stderr
        self._bar: Any = None
        self._tokens = self._blocks = self._done = self._here = 0
        self._began = 0.0

    @cached_property
    def healing(self) -> "HealProgress":
        """The display of a distillation, if the method has one."""
        from ace_ext.healing.progress import HealProgress  # imported here: most methods do not distil

        return HealProgress(self.shown, self._log)

    def note(self, text: str) -> None:
        """Says something about the run that a user should know, in one line. To be called before :meth:`start`."""
        if self._notes:
            print(f"ace-prune: {text}", file=sys.stderr)

    def step(self, text: str) -> None:
        """Says, where bars are shown, what is being done now; for work that may take seconds and has no bar."""
        if self.shown:
            print(f"ace-prune: {text}", file=sys.stderr)

    def removing(self, kind: str, done: int, of: int) -> None:
        """Advances a bar of the removal of structures, and writes a ``remove`` line. ``kind``: of structures."""
        if done == 1:
            self.close()
            self._bar = tqdm(total=of, desc=f"removing {kind}", unit="step", disable=not self.shown, file=sys.stderr)
        self._bar.update()
        self._write("remove", kind=kind, done=done, of=of, memory_bytes=resident_bytes())

    def start(self, blocks: int, done: int, tokens: int) -> None:
        """``done`` of ``blocks`` were finished by an earlier run; ``tokens`` calibration tokens go through each."""
        self._tokens, self._blocks, self._done, self._began = tokens, blocks, done, time.perf_counter()
        self._bar = tqdm(
            total=blocks, initial=done, desc="pruning", unit="block", disable=not self.shown, file=sys.stderr
        )
        self._write("start", blocks=blocks, done=done, tokens=tokens)

    def block(self, block: BlockReport, report: PruneReport) -> None:
        """Advances the bar and writes a ``block`` line; ``report`` holds all blocks so far."""
        self._done += 1
        self._here += 1
        elapsed = time.perf_counter() - self._began
        speed = self._here * self._tokens / max(elapsed, 1e-9)
        memory = resident_bytes()
        self._bar.set_postfix_str(
            f"{speed:,.0f} tokens/s, sparsity {report.sparsity:.3f}, {memory / 2**30:.2f} GiB", refresh=False
        )
        self._bar.update()
        self._write(
            "block",
            block=block.name,
            done=self._done,
            blocks=self._blocks,
            seconds=round(block.seconds, 4),
            tokens_per_second=round(speed, 1),
            sparsity=round(report.sparsity, 6),
            memory_bytes=memory,
            seconds_left=round((self._blocks - self._done) * elapsed / self._here, 2),
        )

    def end(self, report: PruneReport) -> None:
        """Writes the ``end`` line."""
        self._write("end", seconds=round(report.seconds, 4), sparsity=round(report.sparsity, 6))

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, event: str, **values: Any) -> None:
        if self._log is not None:
            print(json.dumps({"event": event, "time": round(time.time(), 3), **values}), file=self._log, flush=True)
