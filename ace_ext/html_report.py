"""Reports as one HTML file that needs nothing else: plots inside it, no script, no outside address."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import InputError
from .plots import blocks_plot, require_matplotlib, study_plots
from .report import PruneReport
from .results import BlockFigures, Results
from .tables import amount_name, cells, header, names, notes, results_json, short_names

RESULTS_NAME, REPORT_NAME = "results.json", "report.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ccc; --soft: #f3f3f3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; --line: #444; --soft: #22252a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; overflow-wrap: normal; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { background: var(--soft); } .number { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
th:first-child { background: var(--soft); }
td:first-child { max-width: 10rem; white-space: normal; overflow-wrap: break-word; }
.words td:nth-child(2) { white-space: normal; overflow-wrap: anywhere; width: 100%; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .875rem; }
img { display: block; width: 100%; max-width: 32rem; height: auto; background: #fff; border-radius: 4px; }
summary { cursor: pointer; padding: .6rem 0; }
"""


def check_report(path: str | Path) -> None:
    """Asked before the work, not after it: can :func:`write_run_report` write there?

    Raises:
        InputError: matplotlib is not installed, or ``path`` is a folder or in a folder that is not there.
    """
    require_matplotlib()
    path = Path(path).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"report must be a file name in a folder that is there (got {str(path)!r}); e.g. report.html")


def write_run_report(report: PruneReport, path: str | Path) -> Path:
    """Writes what a pruning run did: settings, each kind of matrix, each block, each matrix.

    Raises:
        InputError: as :func:`check_report`, or where the file cannot be written.
    """
    check_report(path)
    blocks = [BlockFigures.of(block) for block in report.blocks]
    by_block = [[b.name, f"{b.sparsity:.4f}", f"{b.relative_error:.4f}", f"{b.cosine:.4f}"] for b in blocks]
    matrices = [
        [
            m.name,
            "×".join(map(str, m.shape)),
            f"{m.sparsity:.4f}",
            f"{m.relative_error:.4f}",
            f"{m.cosine:.4f}",
            str(m.tokens),
        ]
        for m in report.matrices
    ]
    amount = amount_name(report.config["pattern"] or str(report.config["sparsity"]))
    figures = ["sparsity", "rel. error", "cosine"]
    memory = f"peak memory {report.peak_memory_bytes / 2**30:.2f} GiB on {report.device}"
    body = [
        f"<p>{len(report.blocks)} blocks, {len(report.matrices)} matrices, sparsity {report.sparsity:.4f}, "
        f"{report.seconds:.1f} s, {html.escape(memory)}.</p>",
        "<p>Relative error and cosine compare each matrix's output, dense against pruned, on calibration tokens.</p>",
        "<h2>Blocks</h2>",
        _plot(blocks_plot({("pruned", ""): blocks}), "Share of zeros and output cosine by block."),
        _details("Figures by block", _table(["block", *figures], by_block, 1)),
        _details("Figures by matrix", _table(["matrix", "shape", *figures, "tokens"], matrices, 1)),
        "<h2>Settings</h2>",
        _settings({**report.config, **report.extra, "dtype": report.dtype, "versions": report.versions}),
    ]
    title = f"Pruned with {report.config['metric']}, {amount} zeros"
    return _write(Path(path).expanduser(), _page(title, body))


def write_study_report(results: Results, folder: Path) -> Path:
    """Writes ``results.json``, a PNG for each plot and ``report.html`` into a folder that is there.

    Raises:
        InputError: matplotlib is not installed, or a file cannot be written.
    """
    require_matplotlib()
    plots = study_plots(results)
    body = [
        *[f"<p>{html.escape(note)}</p>" for note in notes(results)],
        _table(header(results), cells(results), len(names(results))),
        "<h2>Plots</h2>",
        f'<div class="plots">{"".join(_plot(png, caption) for png, caption in plots.values())}</div>',
        "<h2>Runs</h2>",
        _details("Every run", _runs_table(results)),
        _details("What the methods stand for", _configs(results)),
        "<h2>Settings</h2>",
        _settings(results.settings),
    ]
    for name, (png, _) in plots.items():
        _write(folder / f"{name}.png", png)
    _write(folder / RESULTS_NAME, results_json(results))
    model = short_names([results.settings["model"]])[results.settings["model"]]
    return _write(folder / REPORT_NAME, _page(f"Pruning methods compared on {model}", body))


def _runs_table(results: Results) -> str:
    texts = short_names(results.settings["texts"])
    sources = short_names(run.cell.calibration for run in results.runs)
    lines = []
    for run in results.runs:
        cell = run.cell
        place = [cell.method, amount_name(cell.amount), sources[cell.calibration], cell.length, str(cell.seed)]
        figures = [f"{run.perplexity[text].perplexity:.3f}" for text in texts]
        memory = f"{run.peak_memory_bytes / 2**30:.2f}"
        lines.append([*place, *figures, f"{run.sparsity:.4f}", f"{run.seconds:.1f}", memory, run.tokens_sha256[:12]])
    head = ["method", "zeros", "calibration", "length", "seed", *texts.values(), "sparsity", "seconds", "peak GiB"]
    return _table([*head, "tokens' hash"], lines, 4)


def _configs(results: Results) -> str:
    """Each method's configuration once, without sparsity and pattern: those are the grid's."""
    configs = {run.cell.method: run.config for run in results.runs}
    fields = [name for name in next(iter(configs.values())) if name not in ("sparsity", "pattern")]
    lines = [[method, *[_plain(config[name]) for name in fields]] for method, config in configs.items()]
    return _table(["method", *fields], lines, 1)


# --- pieces of a page -------------------------------------------------------------------------------------------------


def _page(title: str, body: Iterable[str]) -> str:
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
    )
    return f"{head}\n<body>\n<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], numbers_from: int) -> str:
    """A table that scrolls inside itself. Columns from ``numbers_from`` on stand to the right."""

    def row(tag: str, values: Sequence[str]) -> str:
        marks = ["" if index < numbers_from else ' class="number"' for index in range(len(values))]
        return "".join(f"<{tag}{mark}>{html.escape(value)}</{tag}>" for mark, value in zip(marks, values, strict=True))

    body = "\n".join(f"<tr>{row('td', line)}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n<tr>{row("th", head)}</tr>\n{body}\n</table></div>'


def _settings(values: dict) -> str:
    table = _table(["setting", "value"], [[name, _plain(value)] for name, value in values.items()], 2)
    return f'<div class="words">{table}</div>'


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(name if element is None else f"{name} {_plain(element)}" for name, element in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)


def _plot(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _write(path: Path, content: str | bytes) -> Path:
    try:
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(f"report {str(path)!r} cannot be written: {error.strerror}; give another name") from error
    return path
