"""The journal of a comparison: one JSON line for each finished run, written at once, so that a crash loses no run.

The first line holds the settings that all runs share. A later comparison with the same settings continues in the same
folder. With other settings it is refused: figures that cannot be compared never share a table.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ace_ext.compare.journal_lines import LINES, ChangedLineError, format_of, whole_lines, with_sum
from ace_ext.data.bos import BosChoice
from ace_ext.data.corpora import SELF
from ace_ext.data.perplexity import Perplexity
from ace_ext.data.tasks import TaskScore
from ace_ext.errors import InputError, one_line
from ace_ext.fingerprint import differences
from ace_ext.records import BlockReport
from ace_ext.whole_files import part_of, write_whole

RUNS_NAME = "runs.jsonl"
FORMAT = 1
"""The format of ``results.json``."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid. ``amount`` is a share of zeros like ``"0.5"``, or a pattern like ``"2:4"``. ``seqlen`` is 0
    for images and sound."""

    method: str
    amount: str
    calibration: str
    nsamples: int
    seqlen: int
    seed: int

    @property
    def length(self) -> str:
        """``"128x2048"``: samples x tokens of each; ``"128"`` for samples that are no text."""
        return f"{self.nsamples}x{self.seqlen}" if self.seqlen else str(self.nsamples)


@dataclass(frozen=True)
class BlockFigures:
    """A pruned block: its share of zeros, and the mean output error and mean output cosine of its matrices."""

    name: str
    sparsity: float
    relative_error: float
    cosine: float

    @classmethod
    def of(cls, block: BlockReport) -> "BlockFigures":
        """The figures of a block's report."""
        size = sum(matrix.size for matrix in block.matrices)
        nonzero = sum(matrix.nonzero for matrix in block.matrices)
        count = max(1, len(block.matrices))
        error = sum(matrix.relative_error for matrix in block.matrices) / count
        cosine = sum(matrix.cosine for matrix in block.matrices) / count
        return cls(block.name, 1 - nonzero / size if size else 0.0, error, cosine)


@dataclass(frozen=True)
class Run:
    """A finished run. The keys of ``perplexity`` are evaluation texts; there are none for a network that is no causal
    language model."""

    cell: Cell
    config: dict[str, Any]
    """:meth:`ace_ext.PruneConfig.to_dict` of the configuration."""
    source_sha256: str | None
    """The SHA-256 of the calibration file; None for a source with a fixed text."""
    tokens_sha256: str
    dtype: str
    sparsity: float
    seconds: float
    """The time of pruning, without loading and evaluation."""
    peak_memory_bytes: int
    own_peak: bool
    """Whether the peak is that of this run. If not, it is that of the process so far."""
    perplexity: dict[str, Perplexity]
    blocks: list[BlockFigures]
    bos: BosChoice | None = None
    """How the calibration samples begin; None in a record of an earlier version."""
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    """The scores of the downstream tasks, by name; or figures of agreement, by text and name."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Run":
        """The inverse of ``dataclasses.asdict``."""
        texts = {text: Perplexity(**figures) for text, figures in data["perplexity"].items()}
        blocks = [BlockFigures(**block) for block in data["blocks"]]
        parts = {"cell": Cell(**data["cell"]), "perplexity": texts, "blocks": blocks, "bos": _choice(data)}
        return cls(**{**data, **parts, "tasks": _scores(data)})


def _choice(data: Mapping[str, Any]) -> BosChoice | None:
    found = data.get("bos")
    return None if found is None else BosChoice(**found)


def _scores(data: Mapping[str, Any]) -> dict[str, TaskScore]:
    return {task: TaskScore(**figures) for task, figures in data.get("tasks", {}).items()}


@dataclass
class Results:
    """The results of a comparison: the settings that all runs share, the dense model's perplexity by text, its scores
    by task, a hash of its weights, the runs, and whether evaluation windows begin with the BOS token (None before the
    dense model was evaluated)."""

    settings: dict[str, Any]
    dense: dict[str, Perplexity] = field(default_factory=dict)
    weights_sha256: str = ""
    runs: list[Run] = field(default_factory=list)
    bos: BosChoice | None = None
    dense_tasks: dict[str, TaskScore] = field(default_factory=dict)

    @property
    def choices(self) -> list[BosChoice]:
        """The recorded choices of the BOS token for text that the model did not write."""
        found = [self.bos, *(run.bos for run in self.runs if run.cell.calibration != SELF)]
        return [choice for choice in found if choice is not None]

    def find(self, cell: Cell) -> Run | None:
        """The run of a cell; None if it is not recorded."""
        return next((run for run in self.runs if run.cell == cell), None)


class Journal:
    """The results of a comparison, in memory and, if a folder is given, in its ``runs.jsonl``.

    Args:
        folder: created if it does not exist; None: nothing is written.
        settings: JSON values that all runs of the folder share.

    Another comparison cannot open the folder until :meth:`close`.

    Raises:
        InputError: the folder holds runs with other settings, or files of something else, or cannot be written; or
            another comparison has it open.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.path: Path | None = None
        self._sums, self._first = True, b""
        self._lock: int | None = None
        self.results = Results(settings)
        if folder is None:
            return
        self.path = folder / RUNS_NAME
        if not self.path.is_file():
            _make_folder(folder)
        self._lock = _locked(folder)
        try:
            self._open(self.path, settings)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, settings: dict[str, Any]) -> None:
        if path.is_file():
            self.results = read_results(path)
            self._sums = format_of(path) >= LINES
            if self.results.dense or self.results.runs:
                _refuse_other_settings(path, self.results.settings, settings)
                self._first = _first_line(path)
                return
            self.results, self._sums = Results(settings), True  # of a comparison that was refused before it measured
        with _writing(path):  # whole: a file with only a part of the first line would be refused later
            write_whole(path, f"{with_sum(json.dumps({'format': LINES, 'settings': settings}))}\n".encode())
        self._first = _first_line(path)

    def close(self) -> None:
        """Lets other comparisons open the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add_dense(
        self, dense: dict[str, Perplexity], weights_sha256: str, bos: BosChoice, tasks: dict[str, TaskScore]
    ) -> None:
        """Records the dense model: its perplexity by text, the hash of its weights, whether evaluation windows begin
        with the BOS token, and its scores by task."""
        figures = {text: asdict(perplexity) for text, perplexity in dense.items()}
        scores = {task: asdict(score) for task, score in tasks.items()}
        self._append({"dense": figures, "weights_sha256": weights_sha256, "bos": bos.to_dict(), "tasks": scores})
        self.results.dense, self.results.weights_sha256, self.results.bos = dense, weights_sha256, bos
        self.results.dense_tasks = tasks

    def add(self, run: Run) -> None:
        """Records a finished run."""
        self._append({"run": asdict(run)})
        self.results.runs.append(run)

    def refuse_changed(self, cell: Cell, config: dict[str, Any], source_sha256: str | None) -> None:
        """Refuses a cell if its configuration or its text has changed since it was recorded.

        Raises:
            InputError: the cell is recorded with a different configuration or a different text.
        """
        run = self.results.find(cell)
        if run is None:
            return
        differing = differences(run.config, config)
        if differing:
            raise _changed(self.path, f"with other settings of {cell.method}: {'; '.join(differing)}")
        if run.source_sha256 != source_sha256:
            raise _changed(self.path, f"with a different text in {cell.calibration}")

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        if _first_line(self.path) != self._first:
            raise InputError(f"{self.path} was begun again by another comparison; use another output folder")
        with _writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write((with_sum(json.dumps(line)) if self._sums else json.dumps(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_results(path: Path) -> Results:
    """The results in a ``runs.jsonl``. An incomplete last line, left by a crash, is removed from the file.

    Raises:
        InputError: the file cannot be read, or is not the journal of a comparison.
    """
    try:
        first, *lines = whole_lines(path)
        results = Results(first["settings"])
        for line in lines:
            if "dense" in line:
                results.dense = {text: Perplexity(**figures) for text, figures in line["dense"].items()}
                results.weights_sha256, results.bos = line["weights_sha256"], _choice(line)
                results.dense_tasks = _scores(line)
            else:
                run = Run.from_dict(line["run"])
                if results.find(run.cell) is not None:
                    raise ValueError(f"it has two lines of {run.cell.method}, seed {run.cell.seed}")
                results.runs.append(run)
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be read: {error.strerror}; give a folder of ace-prune compare"
        ) from error
    except ChangedLineError as error:
        remedy = "use another folder" if error.args[0] == 1 else "remove that line to run it again"
        raise InputError(
            f"line {error.args[0]} of {path} has changed since it was written (its checksum differs); {remedy}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a journal of ace-prune compare: {one_line(error)}; use another folder"
        ) from error
    return results


def _first_line(path: Path) -> bytes:
    with _writing(path), path.open("rb") as file:
        return file.readline()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"output {str(path)!r} cannot be written: {error.strerror}") from error


def _make_folder(folder: Path) -> None:
    unfinished = part_of(folder / RUNS_NAME)  # left by a comparison that was killed while it wrote the first line
    if folder.exists() and (not folder.is_dir() or any(path != unfinished for path in folder.iterdir())):
        raise InputError(f"output {str(folder)!r} exists and does not hold a comparison; give a new or an empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {str(folder)!r} cannot be written: {error.strerror}; give another folder") from error


def _locked(folder: Path) -> int:
    """The folder, opened and locked, so that two comparisons do not record the same runs twice. The lock lasts until it
    is closed or the process ends, even by a crash. A file system that cannot lock a folder has no lock."""
    with _writing(folder):
        number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(number)
        raise InputError(
            f"output {str(folder)!r} is being written by another comparison; wait for it, or give another folder"
        ) from error
    except OSError:
        pass  # no locks there
    return number


def _refuse_other_settings(path: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = differences(recorded, wanted)
    if differing:
        raise _changed(path, f"with other settings: {'; '.join(differing)}")


def _changed(path: Path | None, how: str) -> InputError:
    return InputError(f"{path} was recorded {how}; use another output folder")
