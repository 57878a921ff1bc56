"""Tables of a comparison, as text, markdown or JSON. Runs that differ only in their seed form one row."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ace_ext.compare.journal import FORMAT, Cell, Results, Run
from ace_ext.data.bos import BosChoice
from ace_ext.data.mixture import without_folders
from ace_ext.data.tasks import TaskScore
from ace_ext.records import finite


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of ``count`` values. ``deviation`` is the sample deviation (n - 1); None for one
    value, or if a value is not finite."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        finite = all(map(math.isfinite, values))
        if len(values) == 1 or not finite:
            return cls(sum(values) / len(values), None, len(values))
        return cls(statistics.fmean(values), statistics.stdev(values), len(values))

    def text(self, digits: int) -> str:
        """``"0.123 ± 0.004"`` with ``digits`` after the point; the mean alone if there is no deviation."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.{digits}f}"

    def __str__(self) -> str:
        return self.text(2)


@dataclass(frozen=True)
class Row:
    """Runs, at least one, that differ only in their seed."""

    runs: list[Run]

    @property
    def cell(self) -> Cell:
        """The first run's place in the grid."""
        return self.runs[0].cell

    @property
    def method(self) -> str:
        """The method's label."""
        return self.cell.method

    @property
    def amount(self) -> str:
        """A share of zeros like ``"0.5"``, or a pattern like ``"2:4"``."""
        return self.cell.amount

    @property
    def amount_name(self) -> str:
        """``"50 %"`` or ``"2:4"``."""
        return amount_name(self.amount)

    @property
    def calibration(self) -> str:
        """The source of the calibration samples."""
        return self.cell.calibration

    @property
    def length(self) -> str:
        """``"128x2048"``: samples x tokens of each."""
        return self.cell.length

    @property
    def tokens(self) -> int:
        """The number of calibration tokens."""
        return self.cell.nsamples * self.cell.seqlen

    @property
    def sparsity(self) -> float:
        """The share of zeros, mean over runs."""
        return statistics.fmean(run.sparsity for run in self.runs)

    @property
    def perplexity(self) -> dict[str, Spread]:
        """The perplexity by evaluation text."""
        texts = self.runs[0].perplexity
        return {text: Spread.of([run.perplexity[text].perplexity for run in self.runs]) for text in texts}

    @property
    def figures(self) -> dict[str, Spread]:
        """What plots show: the perplexity by text, or the scores of a model without perplexity."""
        return self.perplexity or self.tasks

    @property
    def tasks(self) -> dict[str, Spread]:
        """The scores by downstream task."""
        return {task: Spread.of([run.tasks[task].value for run in self.runs]) for task in self.runs[0].tasks}

    @property
    def seconds(self) -> float:
        """The time of pruning, mean over runs."""
        return statistics.fmean(run.seconds for run in self.runs)

    @property
    def peak_memory_bytes(self) -> int:
        """The largest peak of the runs."""
        return max(run.peak_memory_bytes for run in self.runs)

    @property
    def own_peak(self) -> bool:
        """Whether each run's peak is its own."""
        return all(run.own_peak for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON values, without its runs."""
        return {
            "method": self.method,
            "amount": self.amount,
            "calibration": self.calibration,
            "nsamples": self.cell.nsamples,
            "seqlen": self.cell.seqlen,
            "sparsity": self.sparsity,
            "perplexity": {text: asdict(spread) for text, spread in self.perplexity.items()},
            "tasks": {task: asdict(spread) for task, spread in self.tasks.items()},
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "own_peak": self.own_peak,
        }


def amount_name(amount: str) -> str:
    """``"50 %"`` for ``"0.5"``; a pattern stays as it is."""
    return amount if ":" in amount else f"{float(amount) * 100:g} %"


def rows(results: Results) -> list[Row]:
    """One row for each method, amount, calibration source and length, in the order in which they were first run."""
    groups: dict[Cell, list[Run]] = {}
    for run in results.runs:
        groups.setdefault(replace(run.cell, seed=0), []).append(run)
    return [Row(runs) for runs in groups.values()]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The last part of each path, or the whole path if two have the same last part."""
    whole = list(dict.fromkeys(names))
    last = [without_folders(name) for name in whole]
    return {name: part if last.count(part) == 1 else name for name, part in zip(whole, last, strict=True)}


def names(results: Results) -> list[str]:
    """The first columns of the table, which identify a row. Calibration and length are there only if they vary."""
    table = rows(results)
    varying = [name for name in ("calibration", "length") if len({getattr(row, name) for row in table}) > 1]
    return ["method", "zeros", *varying]


def header(results: Results) -> list[str]:
    """The titles of all columns: :func:`names`, one for each text, one for each task, seeds, time and memory."""
    texts = short_names(results.dense).values()
    tasks = score_titles(results).values()
    return [*names(results), *texts, *tasks, "seeds", "seconds", "peak GiB"]


def score_titles(results: Results) -> dict[str, str]:
    """The titles of the columns of scores, by the scores' names: the text and the figure for agreement."""
    if not agrees(results):
        return {task: f"{task} ({score.metric})" for task, score in results.dense_tasks.items()}
    texts = short_names(results.settings["texts"])
    one = len(texts) == 1
    return {
        name: score.metric if one else f"{texts[text_of(name)]}: {score.metric}"
        for name, score in results.dense_tasks.items()
    }


def text_of(name: str) -> str:
    """The evaluation text in the name of a figure of agreement, ``"TEXT: FIGURE"``."""
    return name.rpartition(": ")[0]


def agrees(results: Results) -> bool:
    """Whether the model is no causal language model, so that its scores are figures of agreement."""
    return not results.dense and bool(results.dense_tasks)


def cells(results: Results) -> list[list[str]]:
    """The lines of the table, the dense model first. Perplexities are mean ± standard deviation over seeds."""
    texts = list(results.dense)
    columns = names(results)
    dense = [f"{results.dense[text].perplexity:.2f}" for text in texts]
    dense += [f"{score.value:.3f}{_error([score])}" for score in results.dense_tasks.values()]
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
        figures += [
            f"{row.tasks[task].text(3)}{_error([run.tasks[task] for run in row.runs])}" for task in results.dense_tasks
        ]
        memory = f"{row.peak_memory_bytes / 2**30:.2f}{'' if row.own_peak else '*'}"
        last = [str(len(row.runs)), f"{row.seconds:.1f}", memory]
        body.append([*[named[column] for column in columns], *figures, *last])
    return body


def _error(scores: list[TaskScore]) -> str:
    """The standard error of a task's scores, in parentheses: the mean of those over several seeds."""
    errors = [score.stderr for score in scores if score.stderr is not None]
    return f" ({sum(errors) / len(errors):.3f})" if errors else ""


def notes(results: Results) -> list[str]:
    """What a reader must know about the figures, one note in each line."""
    settings = results.settings
    windows = {text: figures.windows for text, figures in results.dense.items()}
    counts = ", ".join(f"{count} on {text}" for text, count in windows.items())
    sources = ", ".join(dict.fromkeys(run.cell.calibration for run in results.runs))
    lengths = ", ".join(dict.fromkeys(run.cell.length for run in results.runs))
    kinds = (
        "device memory" if settings["device"] == "cuda" else "resident memory (it includes a copy of the dense weights)"
    )
    each = " (samples x tokens of each)" if any(run.cell.seqlen for run in results.runs) else " samples at most"
    lines = [
        f"{settings['model']}, {', '.join(sorted({run.dtype for run in results.runs}))}, on {settings['device']}.",
        f"Calibrated on {sources}: {lengths}{each}.",
        *_measures(results, counts),
        *_scored(results),
        *_beginnings(results),
        f"Seconds are those of pruning (mean); peak GiB is the largest {kinds}, while pruning.",
    ]
    if not all(run.own_peak for run in results.runs):
        lines.append("* The peak of the whole process so far: this system does not let a process reset its peak.")
    # Only files: the other texts have a calibration and a held-out part.
    files = {text for text, sha256 in settings["texts"].items() if sha256 is not None}
    for text in sorted(files & {run.cell.calibration for run in results.runs}):
        lines.append(f"{text} was used whole for calibration and for evaluation: the evaluation text was not held out.")
    return lines


def _measures(results: Results, counts: str) -> list[str]:
    """A note on perplexity and its windows, or on figures of agreement."""
    spread = "Over several seeds: mean ± standard deviation."
    if not agrees(results):
        windows = f"over windows of {results.settings['eval_seqlen']} tokens: {counts}."
        return [f"Perplexity (lower is better) {windows} {spread}"]
    samples = {text_of(name): score.samples for name, score in results.dense_tasks.items()}
    counts = ", ".join(f"{samples[text]} of {short}" for text, short in short_names(samples).items())
    return [
        f"Agreement with the dense model on samples of the evaluation texts: {counts}. Cosine: mean, of embeddings. "
        "Rank correlation: of the cosines of all pairs of samples. Changed words: word error rate with the dense "
        f"model's transcripts as references. {spread}"
    ]


def _scored(results: Results) -> list[str]:
    """A note on the scores of tasks, if there are any."""
    if not results.dense_tasks or agrees(results):
        return []
    counts = ", ".join(f"{score.samples} of {task}" for task, score in results.dense_tasks.items())
    return [
        f"Scores of tasks by lm-eval {results.settings['lm_eval']}, with as many samples: {counts}. "
        "In parentheses: the standard error over samples."
    ]


def _beginnings(results: Results) -> list[str]:
    """Whether windows begin with the BOS token: a line for evaluation, and one for each choice for calibration samples
    with its methods. None for images and sound."""
    if results.bos is None or (results.runs and agrees(results) and all(run.bos is None for run in results.runs)):
        return []
    methods: dict[BosChoice, dict[str, None]] = {}
    for run in results.runs:
        if run.bos is not None:
            methods.setdefault(run.bos, {})[run.cell.method] = None
    lines = [f"Evaluation: {results.bos}."]
    return lines + [f"Calibration of {', '.join(names)}: {choice}." for choice, names in methods.items()]


def text_table(results: Results) -> str:
    """The table as aligned text, and the notes below it."""
    from tabulate import tabulate  # imported here: only tables need it

    lines = [header(results), *cells(results)]
    table: str = tabulate(lines, tablefmt="plain", colalign=_alignment(results), disable_numparse=True)
    return "\n".join([table, "", *notes(results)])


def markdown_table(results: Results) -> str:
    """The table in markdown, and the notes below it."""
    from tabulate import tabulate

    head, *body = [[value.replace("|", "\\|") for value in line] for line in (header(results), *cells(results))]
    table: str = tabulate(body, head, tablefmt="pipe", colalign=_alignment(results), disable_numparse=True)
    return "\n".join([table, "", *notes(results)])


def _alignment(results: Results) -> list[str]:
    """The alignment of the columns: names to the left, figures to the right."""
    count = len(names(results))
    return ["left"] * count + ["right"] * (len(header(results)) - count)


def results_json(results: Results) -> str:
    """All results as JSON: settings, dense figures, rows and runs. A figure that is not finite is null."""
    data = {
        "format": FORMAT,
        "settings": results.settings,
        "weights_sha256": results.weights_sha256,
        "bos": None if results.bos is None else results.bos.to_dict(),
        "dense": {text: asdict(figures) for text, figures in results.dense.items()},
        "dense_tasks": {task: asdict(score) for task, score in results.dense_tasks.items()},
        "rows": [row.to_dict() for row in rows(results)],
        "runs": [asdict(run) for run in results.runs],
    }
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(element) for element in value]
    return finite(value) if isinstance(value, float) else value
