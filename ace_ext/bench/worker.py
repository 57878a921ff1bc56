"""A candidate's process, and the requests to it.

Each candidate has a process of its own: llama.cpp keeps its threads, and memory is that of a process. They are asked
one after the other, so they never work at the same time; a process that waits for a request uses no CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from ace_ext.bench.candidates import LLAMA, VLLM, Candidate
from ace_ext.errors import InputError, one_line
from ace_ext.models.location import remote_code_allowed
from ace_ext.process_memory import resident_bytes
from ace_ext.process_threads import without_own_waiting

_HERE = Path(__file__).parent
_FILES = {LLAMA: "_llama_engine.py", VLLM: "_vllm_engine.py"}


class Worker:
    """The process of a candidate. As a context manager it ends the process.

    Attributes:
        candidate: what is measured.
        engine: the engine's description, with its version and instruction set.
        program: resident bytes of the process before the model was loaded.
    """

    def __init__(self, candidate: Candidate, threads: int) -> None:
        self.candidate = candidate
        foreign = candidate.engine in _FILES
        file = _HERE / _FILES.get(candidate.engine, "_torch_engine.py")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", _bootstrap(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=without_own_waiting(os.environ) if foreign else None,
            start_new_session=True,  # an interruption of the terminal reaches the caller alone, who ends it
        )
        try:
            self.engine = str(
                self._ask("start", path=str(candidate.path), threads=threads, allowed=remote_code_allowed())
            )
            self.program = self.memory()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, context: int) -> None:
        """Loads the model for sequences of ``context`` tokens, and reads a token."""
        self._ask("load", path=str(self.candidate.path), context=context)

    def decode(self, prompts: list[list[int]], tokens: list[list[int]]) -> float:
        """Seconds of decoding ``[batch, new]`` tokens after prompts ``[batch, old]``."""
        return float(self._ask("decode", prompts=prompts, tokens=tokens))

    def prefill(self, prompt: list[int]) -> float:
        """Seconds of reading a prompt."""
        return float(self._ask("prefill", prompt=prompt))

    def generate(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy tokens after a prompt; llama.cpp alone."""
        return [int(token) for token in self._ask("generate", prompt=prompt, tokens=tokens)]

    def processes(self) -> list[int]:
        """The numbers of the process and of those that it started, as far as the system says."""
        return _family(self._process.pid)

    def memory(self) -> int:
        """The resident bytes of these processes now, program, libraries and mapped files included."""
        return sum(map(resident_bytes, self.processes()))

    def close(self) -> None:
        """Ends the process, and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._errors.close()

    def _ask(self, action: str, **fields: Any) -> Any:
        """The result of a request.

        Raises:
            InputError: the process answered with an error, or ended.
        """
        pipes = self._process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        try:
            pipes.stdin.write(json.dumps({"do": action, **fields}) + "\n")
            pipes.stdin.flush()
            line = pipes.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise InputError(f"{self.candidate.name} could not be measured: {self._end()}")
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(
                f"{self.candidate.name} could not be measured: {one_line(answer['error'])}{self._last_words()}"
            )
        return answer["found"]

    def _end(self) -> str:
        status = self._process.wait()
        return f"its process ended with status {status}; is there enough memory for all candidates?{self._last_words()}"

    def _last_words(self) -> str:
        """The last line that the process wrote to stderr."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" (it wrote: {last[:300]})" if last else ""


def _family(process: int) -> list[int]:
    """A process and those that it started, as far as the system says."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


def _bootstrap(file: Path) -> str:
    """Code for ``python -c`` that serves an engine, with this process's search path."""
    arguments = [str(_HERE / "_serve.py"), str(file)]
    return (
        f"import runpy, sys; sys.path[:] = {sys.path!r}; sys.argv = {arguments!r}; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
