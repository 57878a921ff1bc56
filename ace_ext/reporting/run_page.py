"""Reports as one HTML file that needs nothing else: plots inside it, no script, no outside address."""

import html
from pathlib import Path

from ace_ext.compare.journal import BlockFigures
from ace_ext.compare.tables import amount_name
from ace_ext.records import PruneReport
from ace_ext.reporting.html import _details, _page, _plot, _settings, _table, _write, check_report
from ace_ext.reporting.plots import blocks_plot


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
