"""The progress of a distillation: a bar on a terminal, and JSON lines for programs."""

import json
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from ace_ext.process_memory import resident_bytes
from ace_ext.records import Healing, finite


class HealProgress:
    """Shows steps, loss, memory and the time left.

    Args:
        show: show a bar on stderr.
        log: where to write JSON lines, each flushed. Their keys: ``event`` (``teacher``, ``start``, ``step``,
            ``check``, ``end``), ``time`` (seconds since the epoch), and those that ``docs/file-formats.md`` lists.
    """

    def __init__(self, show: bool = False, log: TextIO | None = None) -> None:
        self.shown, self._log = show, log
        self._bar: Any = None
        self._steps = self._first = 0
        self._held_out, self._began = "", 0.0

    def teacher(self, done: int, blocks: int) -> None:
        """Advances a bar over the dense model's blocks."""
        if self._bar is None:
            self._bar = self._open(blocks, "dense model", "block")
        self._bar.update(done - self._bar.n)
        self._write("teacher", done=done, blocks=blocks)

    def start(self, done: int, steps: int, step_tokens: int) -> None:
        """Opens the bar over the steps."""
        self.close()
        self._steps, self._first, self._began = steps, done, time.perf_counter()
        self._bar = self._open(steps, "distilling", "step", done)
        self._write("start", done=done, steps=steps, step_tokens=step_tokens)

    def step(self, step: int, loss: float) -> None:
        """Advances the bar and writes a ``step`` line."""
        memory, elapsed = resident_bytes(), time.perf_counter() - self._began
        self._bar.set_postfix_str(f"loss {loss:.4f}{self._held_out}, {memory / 2**30:.2f} GiB", refresh=False)
        self._bar.update(step - self._bar.n)
        left = (self._steps - step) * elapsed / (step - self._first)
        self._write("step", step=step, loss=finite(loss), memory_bytes=memory, seconds_left=round(left, 2))

    def check(self, step: int, loss: float) -> None:
        """Writes a ``check`` line."""
        self._held_out = f", held out {loss:.4f}"
        self._write("check", step=step, loss=finite(loss))

    def end(self, healing: Healing) -> None:
        """Writes the ``end`` line."""
        self._write("end", seconds=round(healing.seconds, 4), loss=healing.loss_after)

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self, total: int, title: str, unit: str, done: int = 0) -> Any:
        return tqdm(total=total, initial=done, desc=title, unit=unit, disable=not self.shown, file=sys.stderr)

    def _write(self, event: str, **values: Any) -> None:
        if self._log is not None:
            print(json.dumps({"event": event, "time": round(time.time(), 3), **values}), file=self._log, flush=True)
