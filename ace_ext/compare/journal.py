"""The record of a comparison: one JSON line a finished run, written at once, so that a crash loses nothing.

The first line holds the settings that all runs share. A later comparison into the same folder goes on from what is
there if its settings are the same, and is refused if they differ: figures that cannot be compared never share a table.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ace_ext.data.perplexity import Perplexity
from ace_ext.errors import InputError
from ace_ext.fingerprint import differences
from ace_ext.records import BlockReport

RUNS_NAME = "runs.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """One place of the grid. ``amount`` is a share of zeros like ``"0.5"``, or a pattern like ``"2:4"``."""

    method: str
    amount: str
    calibration: str
    nsamples: int
    seqlen: int
    seed: int

    @property
    def length(self) -> str:
        return f"{self.nsamples}x{self.seqlen}"


@dataclass(frozen=True)
class BlockFigures:
    """A block after pruning: its share of zeros, and error and cosine of its matrices' outputs, averaged."""

    name: str
    sparsity: float
    relative_error: float
    cosine: float

    @classmethod
    def of(cls, block: BlockReport) -> "BlockFigures":
        size = sum(matrix.size for matrix in block.matrices)
        nonzero = sum(matrix.nonzero for matrix in block.matrices)
        count = max(1, len(block.matrices))
        error = sum(matrix.relative_error for matrix in block.matrices) / count
        cosine = sum(matrix.cosine for matrix in block.matrices) / count
        return cls(block.name, 1 - nonzero / size if size else 0.0, error, cosine)


@dataclass(frozen=True)
class Run:
    """A finished run. ``perplexity`` is by evaluation text."""

    cell: Cell
    config: dict
    """Of :meth:`ace_ext.PruneConfig.to_dict`: what the method's label stood for."""
    source_sha256: str | None
    """Of the calibration file; None for a text that its name fixes."""
    tokens_sha256: str
    dtype: str
    sparsity: float
    seconds: float
    """Of pruning, without loading and evaluating."""
    peak_memory_bytes: int
    own_peak: bool
    """Whether the peak is this run's alone; else the process's so far."""
    perplexity: dict[str, Perplexity]
    blocks: list[BlockFigures]

    @classmethod
    def from_dict(cls, data: dict) -> "Run":
        texts = {text: Perplexity(**figures) for text, figures in data["perplexity"].items()}
        blocks = [BlockFigures(**block) for block in data["blocks"]]
        return cls(**{**data, "cell": Cell(**data["cell"]), "perplexity": texts, "blocks": blocks})


@dataclass
class Results:
    """A comparison: what all runs share, the dense model's perplexity by text and a hash of its weights, the runs."""

    settings: dict
    dense: dict[str, Perplexity] = field(default_factory=dict)
    weights_sha256: str = ""
    runs: list[Run] = field(default_factory=list)

    def find(self, cell: Cell) -> Run | None:
        return next((run for run in self.runs if run.cell == cell), None)


class Journal:
    """``runs.jsonl`` in a folder, or nothing but the results in memory where no folder is given.

    Args:
        folder: made if it is not there; None keeps everything in memory.
        settings: plain values that every run of the folder shares.

    Raises:
        InputError: the folder holds runs under other settings, something that is no comparison, or cannot be written.
    """

    def __init__(self, folder: Path | None, settings: dict) -> None:
        self.path = None if folder is None else folder / RUNS_NAME
        self.results = Results(settings)
        if self.path is None:
            return
        if self.path.is_file():
            self.results = read_results(self.path)
            _refuse_other_settings(self.path, self.results.settings, settings)
        else:
            _make_folder(folder)
            self._append({"format": FORMAT, "settings": settings})

    def add_dense(self, dense: dict[str, Perplexity], weights_sha256: str) -> None:
        figures = {text: asdict(perplexity) for text, perplexity in dense.items()}
        self._append({"dense": figures, "weights_sha256": weights_sha256})
        self.results.dense, self.results.weights_sha256 = dense, weights_sha256

    def add(self, run: Run) -> None:
        self._append({"run": asdict(run)})
        self.results.runs.append(run)

    def refuse_changed(self, cell: Cell, config: dict, source_sha256: str | None) -> None:
        """A label or a file may stand for something else today than in the recorded run; that must not go unseen.

        Raises:
            InputError: the cell is recorded with another configuration or another text.
        """
        run = self.results.find(cell)
        if run is None:
            return
        differing = differences(run.config, config)
        if differing:
            raise _changed(self.path, f"otherwise, in {cell.method}: {'; '.join(differing)}")
        if run.source_sha256 != source_sha256:
            raise _changed(self.path, f"with another text in {cell.calibration}")

    def _append(self, line: dict) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"output {str(self.path)!r} cannot be written: {error.strerror}") from error


def read_results(path: Path) -> Results:
    """What a ``runs.jsonl`` holds. A last line that a crash cut off is taken off the file.

    Raises:
        InputError: it is not there, or no record of a comparison.
    """
    try:
        first, *lines = _whole_lines(path)
        results = Results(first["settings"])
        for line in lines:
            if "dense" in line:
                results.dense = {text: Perplexity(**figures) for text, figures in line["dense"].items()}
                results.weights_sha256 = line["weights_sha256"]
            else:
                results.runs.append(Run.from_dict(line["run"]))
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be read: {error.strerror}; give a folder of ace-prune compare"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no record of ace-prune compare: {error!r}; use another folder") from error
    return results


def _make_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output {str(folder)!r} exists and holds no comparison; give a new or an empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {str(folder)!r} cannot be written: {error.strerror}; give another folder") from error


def _whole_lines(path: Path) -> Iterator[dict]:
    data = path.read_bytes()
    if not data.startswith(b'{"format"'):
        raise ValueError("its first line has no format")
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return map(json.loads, whole.decode("utf-8").splitlines())


def _refuse_other_settings(path: Path, recorded: dict, wanted: dict) -> None:
    differing = differences(recorded, wanted)
    if differing:
        raise _changed(path, f"otherwise: {'; '.join(differing)}")


def _changed(path: Path, how: str) -> InputError:
    return InputError(f"{path} was recorded {how}; use another output folder")
