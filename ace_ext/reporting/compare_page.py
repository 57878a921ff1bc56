"""Reports as one HTML file that needs nothing else: plots inside it, no script, no outside address."""

import html
from pathlib import Path

from ace_ext.compare.journal import Results
from ace_ext.compare.tables import amount_name, cells, header, names, notes, results_json, short_names
from ace_ext.reporting.html import REPORT_NAME, RESULTS_NAME, _details, _page, _plain, _plot, _settings, _table, _write
from ace_ext.reporting.plots import require_matplotlib, study_plots


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
