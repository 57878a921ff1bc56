"""The page of a comparison: its table, plots, runs, methods and settings."""

from pathlib import Path

from ace_ext.compare.journal import Results
from ace_ext.compare.tables import amount_name, cells, header, names, notes, results_json, score_titles, short_names
from ace_ext.reporting.html import REPORT_NAME, RESULTS_NAME, Plot, Table, plain, render, write_file
from ace_ext.reporting.plots import require_matplotlib, study_plots


def write_study_report(results: Results, folder: Path) -> Path:
    """Writes ``results.json``, a PNG for each plot and ``report.html`` into a folder; returns the path of the page.

    Raises:
        InputError: matplotlib is not installed, or a file cannot be written.
    """
    require_matplotlib()
    plots = {name: Plot(png, caption) for name, (png, caption) in study_plots(results).items()}
    model = short_names([results.settings["model"]])[results.settings["model"]]
    page = render(
        "compare",
        f"Pruning methods compared on {model}",
        notes=notes(results),
        table=Table(header(results), cells(results), len(names(results))),
        plots=list(plots.values()),
        runs=_runs_table(results),
        methods=_methods_table(results),
        settings=Table.of_settings(results.settings),
    )
    for name, plot in plots.items():
        write_file(folder / f"{name}.png", plot.png)
    write_file(folder / RESULTS_NAME, results_json(results))
    return write_file(folder / REPORT_NAME, page)


def _runs_table(results: Results) -> Table:
    texts = short_names(results.dense)
    sources = short_names(run.cell.calibration for run in results.runs)
    lines = []
    for run in results.runs:
        cell = run.cell
        place = [cell.method, amount_name(cell.amount), sources[cell.calibration], cell.length, str(cell.seed)]
        figures = [f"{run.perplexity[text].perplexity:.3f}" for text in texts]
        figures += [f"{run.tasks[task].value:.3f}" for task in results.dense_tasks]
        memory = f"{run.peak_memory_bytes / 2**30:.2f}"
        lines.append([*place, *figures, f"{run.sparsity:.4f}", f"{run.seconds:.1f}", memory, run.tokens_sha256[:12]])
    head = ["method", "zeros", "calibration", "length", "seed", *texts.values(), *score_titles(results).values()]
    head += ["sparsity", "seconds", "peak GiB"]
    return Table([*head, "tokens' hash"], lines, 4)


def _methods_table(results: Results) -> Table:
    """Each method's configuration without sparsity and pattern: the grid gives those."""
    configs = {run.cell.method: run.config for run in results.runs}
    fields = [name for name in next(iter(configs.values())) if name not in ("sparsity", "pattern")]
    lines = [[method, *[plain(config[name]) for name in fields]] for method, config in configs.items()]
    return Table(["method", *fields], lines, 1)
