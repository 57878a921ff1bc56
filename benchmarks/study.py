"""Tables of ``docs/results.md`` from the results of ``ace-prune compare``.

    python benchmarks/study.py record DIR ...      # adds the runs of these folders to docs/figures/study.json
    python benchmarks/study.py tables              # prints the tables of the page

A row of the file is a method, a share of zeros and a calibration of one model, with the perplexity of each seed by
text. A run that is recorded again replaces the old one. Rows are sorted. ``draw_overview.py`` draws pictures from the
file.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ace_ext.compare.tables import Spread, amount_name
from ace_ext.errors import InputError
from ace_ext.whole_files import write_whole

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import existing_folder, one_line_errors

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "figures" / "study.json"
TEXTS = ("wiki-mini", "news-mini", "code-mini")
MODELS = ("SmolLM2-135M", "gemma-3-270m", "Qwen2.5-Coder-0.5B")
WANDA = "published-wanda"
BOS = " with BOS"
DENSE = "dense"
BUNDLED = "bundled 64x128"
ARTICLES = "wiki-mini 64x128"
"""The calibrations of the tables of three models."""
METHODS = (DENSE, WANDA, "published-sparsegpt", "published-admm", "fast", "balanced", "better", "best")
ZEROS = ("0", "0.5", "0.6", "0.7", "2:4", "4:8")
"""The order of rows and columns; others come last, as they were recorded."""
LENGTHS = ("512x16", "128x64", "64x128", "16x512", "4x2048")
"""Calibration samples x tokens of each; all have as many tokens."""


@dataclass(frozen=True)
class Figures:
    """One method with one share of zeros on one model.

    Args:
        seeds: the perplexity of each seed, by seed, then by text.
        seconds: the least time of pruning; 0 if it is not known.
    """

    model: str
    method: str
    zeros: str
    calibration: str
    seeds: dict[str, dict[str, float]]
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, ...]:
        """What is the same for all seeds."""
        return self.model, self.method, self.zeros, self.calibration

    def spread(self, text: str) -> Spread:
        """The perplexity on a text, over seeds."""
        return Spread.of([each[text] for each in self.seeds.values()])

    @property
    def means(self) -> list[float]:
        """The geometric mean of the texts for each seed."""
        return [statistics.geometric_mean(each.values()) for each in self.seeds.values()]

    @property
    def mean(self) -> float:
        """The mean of :attr:`means`."""
        return statistics.fmean(self.means)

    @property
    def shown(self) -> str:
        """The mean, and the standard deviation over seeds if there are several."""
        return f"{self.mean:.2f}" + (f" ± {statistics.stdev(self.means):.2f}" if len(self.seeds) > 1 else "")


def load() -> list[Figures]:
    """The rows of the file."""
    return [Figures(**row) for row in json.loads(FILE.read_text(encoding="utf-8"))] if FILE.exists() else []


def model_name(path: str) -> str:
    """The model's name in the tables, from its file's or folder's name."""
    return next((name for name in (*MODELS, "Qwen2.5-Coder-1.5B") if Path(path).name.startswith(name)), Path(path).name)


def recorded(folder: Path) -> Iterable[Figures]:
    """The rows of a folder that ``ace-prune compare`` wrote, one for each run."""
    file = folder / "results.json"
    try:
        yield from figures_of(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError) as error:
        texts = ", ".join(TEXTS)
        raise InputError(f"{str(file)!r} is not of ace-prune compare with the texts {texts} ({error!r})") from error


def figures_of(data: dict[str, Any]) -> Iterator[Figures]:
    """The rows of what a ``results.json`` holds."""
    model = model_name(data["settings"]["model"])
    dense = {text: round(data["dense"][text]["perplexity"], 3) for text in TEXTS}
    yield Figures(model, DENSE, "0", "", {"0": dense})
    for run in data["runs"]:
        cell = run["cell"]
        length = f"{cell['nsamples']}x{cell['seqlen']}"
        seeds = {str(cell["seed"]): {text: round(run["perplexity"][text]["perplexity"], 3) for text in TEXTS}}
        source = f"{cell['calibration']} {length}"
        yield Figures(model, cell["method"], cell["amount"], source, seeds, round(run["seconds"], 1))


def place(row: Figures) -> tuple[int | bool, ...]:
    """The place of a row in the file, as a key to sort by."""

    def rank(value: str, order: tuple[str, ...]) -> int:
        return order.index(value) if value in order else len(order)

    return (
        row.calibration not in ("", BUNDLED),
        rank(row.model, MODELS),
        rank(row.method.removesuffix(BOS), METHODS),
        row.method.endswith(BOS),
        rank(row.zeros, ZEROS),
        rank(row.calibration.split(" ")[-1], LENGTHS),
    )


def record(folders: Iterable[Path]) -> None:
    """Adds the runs of folders to the file."""
    rows = {row.key: row for row in load()}
    for row in (row for folder in folders for row in recorded(folder)):
        old = rows.get(row.key, row)
        seeds = dict(sorted({**old.seeds, **row.seeds}.items()))
        seconds = min((each.seconds for each in (old, row) if each.seconds), default=0.0)
        rows[row.key] = Figures(*row.key, seeds, seconds)
    lines = ",\n".join(json.dumps(vars(row), ensure_ascii=False) for row in sorted(rows.values(), key=place))
    write_whole(FILE, f"[\n{lines}\n]\n".encode())


class Study:
    """The rows with one calibration, by model, method and zeros."""

    def __init__(self, rows: Iterable[Figures], calibration: str = BUNDLED) -> None:
        self.rows = {row.key[:3]: row for row in rows if row.calibration in ("", calibration)}

    def methods(self, model: str) -> list[str]:
        """The methods that were run on a model, in the order of the file."""
        return list(dict.fromkeys(method for of, method, _ in self.rows if of == model and method != DENSE))

    def least(self, model: str, method: str, zeros: str) -> float | None:
        """The mean perplexity of a method; of a published method that was calibrated with and without the BOS token,
        the lower one."""
        found = [self.rows.get((model, name, zeros)) for name in (method, method + BOS)]
        return min((row.mean for row in found if row is not None), default=None)

    def per_text(self, model: str, amounts: tuple[str, ...] = ("0.5", "2:4")) -> str:
        """A table of a model: each text and the mean, for some shares of zeros."""
        names = ["articles", "news", "code", "mean"]
        head = ["method", *(f"{amount_name(amount)}: {name}" for amount in amounts for name in names), "seeds"]
        lines = []
        for method in (DENSE, *self.methods(model)):
            found = [self.rows.get((model, method, "0" if method == DENSE else amount)) for amount in amounts]
            if not any(found):
                continue
            cells = [cell for row in found for cell in self._cells(row)]
            counts = dict.fromkeys(len(row.seeds) for row in found if row is not None)
            seeds = "" if method == DENSE else " and ".join(map(str, counts))
            lines.append([name_of(method), *cells, seeds])
        return table(head, lines, 1)

    @staticmethod
    def _cells(row: Figures | None) -> list[str]:
        return [""] * 4 if row is None else [*(f"{row.spread(text).mean:.2f}" for text in TEXTS), row.shown]

    def means(self, amounts: tuple[str, ...], models: tuple[str, ...] = MODELS) -> str:
        """A table of some models: the mean of the texts for some shares of zeros."""
        head = ["method", *(f"{model}, {amount_name(amount)}" for model in models for amount in amounts)]
        methods = dict.fromkeys(method for model in models for method in self.methods(model))
        lines = []
        for method in methods:
            found = [self.rows.get((model, method, amount)) for model in models for amount in amounts]
            if any(found):
                lines.append([name_of(method), *("" if row is None else f"{row.mean:.1f}" for row in found)])
        return table(head, lines, 1)

    def relative(self, amounts: tuple[str, ...]) -> str:
        """A table of ratios to Wanda's mean perplexity: the models side by side in each cell."""
        head = ["method", *map(amount_name, amounts)]
        methods = dict.fromkeys(method.removesuffix(BOS) for model in MODELS for method in self.methods(model))
        lines = []
        for method in (method for method in methods if method != WANDA):
            cells = []
            for amount in amounts:
                pairs = [(self.least(model, method, amount), self.least(model, WANDA, amount)) for model in MODELS]
                cells.append(" / ".join(f"{a / b:.2f}" if a and b else "–" for a, b in pairs))
            if any(cell.strip("– /") for cell in cells):
                lines.append([name_of(method), *cells])
        return table(head, lines, 1)

    def times(self, model: str, amount: str) -> str:
        """A table of the seconds of pruning a model, of the methods that were timed."""
        rows = [self.rows.get((model, method, amount)) for method in self.methods(model)]
        wanda = self.rows[model, WANDA, amount].seconds
        lines = [
            [name_of(row.method), f"{row.seconds:.0f}", f"{row.seconds / wanda:.1f}"]
            for row in sorted((row for row in rows if row is not None and row.seconds), key=lambda row: row.seconds)
        ]
        return table(["method", "seconds", "relative to Wanda"], lines, 1)


def lengths(rows: list[Figures]) -> str:
    """A table of all models: the mean of the texts at 50 %, by the number and length of the calibration samples."""
    methods = (WANDA, "fast")
    head = ["samples × tokens", *(f"{model}: {name_of(method)}" for model in MODELS for method in methods)]
    lines = []
    for length in LENGTHS:
        found = Study(rows, f"wiki-mini {length}").rows
        means = [f"{found[model, method, '0.5'].mean:.2f}" for model in MODELS for method in methods]
        lines.append([length.replace("x", " × "), *means])
    return table(head, lines, 1)


def name_of(method: str) -> str:
    """A method as the tables write it."""
    return method if method == DENSE else f"`{method.removesuffix(BOS)}`" + (BOS if method.endswith(BOS) else "")


def table(head: list[str], lines: list[list[str]], left: int) -> str:
    """A table in markdown; the first ``left`` columns hold text."""
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def tables(rows: Iterable[Figures]) -> dict[str, str]:
    """The page's tables by title."""
    rows = list(rows)
    study = Study(rows)
    found = {f"{model}, 50 % and 2:4": study.per_text(model) for model in MODELS}
    found["relative to Wanda"] = study.relative(("0.5", "2:4"))
    found["60 %, 70 % and 4:8"] = study.means(("0.6", "0.7", "4:8"))
    found["60 %, 70 % and 4:8, calibrated on articles"] = Study(rows, ARTICLES).means(("0.6", "0.7", "4:8"))
    found["time"] = study.times(MODELS[0], "0.5")
    found["length of the samples"] = lengths(rows)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "tables"))
    parser.add_argument("folders", nargs="*", type=existing_folder, help="folders of ace-prune compare --output")
    arguments = parser.parse_args(argv)
    if arguments.action == "record":
        if not arguments.folders:
            parser.error("record needs folders of ace-prune compare --output")
        with one_line_errors(parser):
            record(arguments.folders)
    elif arguments.folders:
        parser.error("tables prints what was recorded; leave out the folders, or record them first")
    else:
        with one_line_errors(parser):
            print("\n\n".join(f"{title}\n\n{text}" for title, text in tables(load()).items()))


if __name__ == "__main__":
    main()
