"""From the runs of a comparison to rows: mean, standard deviation and count over seeds; as text, markdown and JSON."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ace_ext.compare.journal import FORMAT, Results, Run


@dataclass(frozen=True)
class Spread:
    """Of ``count`` values; ``deviation`` is the sample's (n - 1), None for a single value."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        finite = all(map(math.isfinite, values))
        if len(values) == 1 or not finite:
            return cls(sum(values) / len(values), None, len(values))
        return cls(statistics.fmean(values), statistics.stdev(values), len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"


@dataclass(frozen=True)
class Row:
    """The runs that differ in their seed only."""

    method: str
    amount: str
    calibration: str
    nsamples: int
    seqlen: int
    sparsity: float
    perplexity: dict[str, Spread]
    """By evaluation text."""
    seconds: float
    """Of pruning: mean."""
    peak_memory_bytes: int
    """The largest of the runs."""
    own_peak: bool
    runs: list[Run]

    @property
    def length(self) -> str:
        return f"{self.nsamples}x{self.seqlen}"

    @property
    def tokens(self) -> int:
        return self.nsamples * self.seqlen

    @property
    def amount_name(self) -> str:
        """``"50 %"`` or ``"2:4"``."""
        return amount_name(self.amount)


def amount_name(amount: str) -> str:
    """``"50 %"`` for ``"0.5"``; a pattern stays as it is."""
    return amount if ":" in amount else f"{float(amount) * 100:g} %"


def rows(results: Results) -> list[Row]:
    """One row for each method, amount, calibration source and length, in the order in which they were first run."""
    groups: dict[tuple, list[Run]] = {}
    for run in results.runs:
        cell = run.cell
        key = (cell.method, cell.amount, cell.calibration, cell.nsamples, cell.seqlen)
        groups.setdefault(key, []).append(run)
    return [_row(key, runs) for key, runs in groups.items()]


def _row(key: tuple, runs: list[Run]) -> Row:
    texts = runs[0].perplexity
    return Row(
        *key,
        sparsity=statistics.fmean(run.sparsity for run in runs),
        perplexity={text: Spread.of([run.perplexity[text].perplexity for run in runs]) for text in texts},
        seconds=statistics.fmean(run.seconds for run in runs),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        own_peak=all(run.own_peak for run in runs),
        runs=runs,
    )


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The last part of each path; the whole one where two would look the same."""
    names = list(dict.fromkeys(names))
    last = [Path(name).name for name in names]
    return {name: part if last.count(part) == 1 else name for name, part in zip(names, last, strict=True)}


def names(results: Results) -> list[str]:
    """The columns that say which run a line is: calibration and length only where they vary."""
    table = rows(results)
    varying = [name for name in ("calibration", "length") if len({getattr(row, name) for row in table}) > 1]
    return ["method", "zeros", *varying]


def header(results: Results) -> list[str]:
    """Names of the columns: :func:`names`, a perplexity for each text, and what it took."""
    texts = short_names(results.settings["texts"]).values()
    return [*names(results), *texts, "seeds", "seconds", "peak GiB"]


def cells(results: Results) -> list[list[str]]:
    """The table's body as text: the dense model first. Perplexities are mean ± standard deviation over seeds."""
    texts = list(results.settings["texts"])
    columns = names(results)
    dense = [f"{results.dense[text].perplexity:.2f}" for text in texts]
    body = [["dense", "0 %", *[""] * (len(columns) - 2), *dense, "", "", ""]]
    sources = short_names(run.cell.calibration for run in results.runs)
    for row in rows(results):
        named = {
            "method": row.method,
            "zeros": row.amount_name,
            "calibration": sources[row.calibration],
            "length": row.length,
        }
        figures = [str(row.perplexity[text]) for text in texts]
        memory = f"{row.peak_memory_bytes / 2**30:.2f}{'' if row.own_peak else '*'}"
        last = [str(len(row.runs)), f"{row.seconds:.1f}", memory]
        body.append([*[named[column] for column in columns], *figures, *last])
    return body


def notes(results: Results) -> list[str]:
    """What a reader has to know beside the figures, one sentence a line."""
    settings = results.settings
    windows = {text: figures.windows for text, figures in results.dense.items()}
    counts = ", ".join(f"{count} on {text}" for text, count in windows.items())
    sources = ", ".join(dict.fromkeys(run.cell.calibration for run in results.runs))
    lengths = ", ".join(dict.fromkeys(run.cell.length for run in results.runs))
    kinds = "device memory" if settings["device"] == "cuda" else "resident memory, the copy of the dense weights in it"
    lines = [
        f"{settings['model']}, {', '.join(sorted({run.dtype for run in results.runs}))}, on {settings['device']}.",
        f"Calibrated on {sources}: {lengths} (samples x tokens of each).",
        f"Perplexity (lower is better) over windows of {settings['eval_seqlen']} tokens: {counts}. "
        "Over several seeds: mean ± standard deviation.",
        f"Seconds are those of pruning (mean); peak GiB is the largest {kinds}, while pruning.",
    ]
    if not all(run.own_peak for run in results.runs):
        lines.append("* This system does not let a process reset its mark: the peak of the whole process so far.")
    files = {text for text, sha256 in settings["texts"].items() if sha256 is not None}  # others come in two parts
    for text in sorted(files & {run.cell.calibration for run in results.runs}):
        lines.append(f"{text} was calibrated on and evaluated on, whole both times: pruning saw what it is judged by.")
    return lines


def text_table(results: Results) -> str:
    """Aligned text: names to the left, numbers to the right, and the notes."""
    table = [header(results), *cells(results)]
    count = len(names(results))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for line in table:
        left = [f"{value:<{width}}" for value, width in zip(line[:count], widths[:count], strict=True)]
        right = [f"{value:>{width}}" for value, width in zip(line[count:], widths[count:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    return "\n".join([*lines, "", *notes(results)])


def markdown_table(results: Results) -> str:
    """A table in markdown, and the notes below it."""
    head, count = header(results), len(names(results))
    lines = [head, ["---"] * count + ["--:"] * (len(head) - count), *cells(results)]
    table = ["| " + " | ".join(value.replace("|", "\\|") for value in line) + " |" for line in lines]
    return "\n".join([*table, "", *notes(results)])


def results_json(results: Results) -> str:
    """Everything: settings, dense figures, rows over seeds, each run. A figure that is not finite is null."""
    data = {
        "format": FORMAT,
        "settings": results.settings,
        "weights_sha256": results.weights_sha256,
        "dense": {text: asdict(figures) for text, figures in results.dense.items()},
        "rows": [{name: value for name, value in asdict(row).items() if name != "runs"} for row in rows(results)],
        "runs": [asdict(run) for run in results.runs],
    }
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
