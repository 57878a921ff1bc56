"""The page of one pruning run: a plot and figures by block and by matrix, and the settings."""

from pathlib import Path
from typing import Any

from ace_ext.compare.journal import BlockFigures
from ace_ext.compare.tables import amount_name
from ace_ext.data.bos import BosChoice
from ace_ext.records import Healing, MatrixReport, PruneReport
from ace_ext.reporting.html import Plot, Table, check_report, render, write_file
from ace_ext.reporting.plots import blocks_plot, healing_plot

_FIGURES = ["sparsity", "rel. error", "cosine"]


def write_run_report(report: PruneReport, path: str | Path) -> Path:
    """Writes the page of a run to ``path``, and returns it as a path.

    Raises:
        InputError: as :func:`ace_ext.reporting.html.check_report`, or the file cannot be written.
    """
    check_report(path)
    blocks = [BlockFigures.of(block) for block in report.blocks]
    by_block = [[b.name, *_figures(b)] for b in blocks]
    by_matrix = [[m.name, "×".join(map(str, m.shape)), *_figures(m), str(m.tokens)] for m in report.matrices]
    amount = amount_name(report.config["pattern"] or str(report.config["sparsity"]))
    settings = {**report.config, **_extra(report), "dtype": report.dtype, "versions": report.versions}
    page = render(
        "run",
        f"Pruned with {report.config['metric']}, {amount} zeros",
        sparsity=report.sparsity,
        seconds=report.seconds,
        peak_gib=report.peak_memory_bytes / 2**30,
        device=report.device,
        healing=None if report.healing is None else _Healing(report.healing),
        plot=Plot(blocks_plot({("pruned", ""): blocks}), "Share of zeros and output cosine by block."),
        blocks=Table(["block", *_FIGURES], by_block, 1),
        matrices=Table(["matrix", "shape", *_FIGURES, "tokens"], by_matrix, 1),
        settings=Table.of_settings(settings),
    )
    return write_file(Path(path).expanduser(), page)


def _extra(report: PruneReport) -> dict[str, Any]:
    """What the report says of model and calibration, with the choice about the BOS token as a line of its own."""
    calibration = report.extra.get("calibration")
    if not isinstance(calibration, dict) or "bos" not in calibration:
        return report.extra
    rest = {name: value for name, value in calibration.items() if name != "bos"}
    return {**report.extra, "calibration": rest, "beginning of samples": str(BosChoice(**calibration["bos"]))}


class _Healing:
    """What the page shows of a distillation."""

    def __init__(self, healing: Healing) -> None:
        self.summary = healing.summary()
        self.plot = Plot(
            healing_plot(healing), "Loss over the steps of the distillation, on training and held-back text."
        )
        lines = [[str(step), f"{loss:.4f}"] for step, loss in healing.checks]
        self.checks = Table(["steps", "KL on held-back text"], lines, 0)
        counted = {"zeros, checked": healing.zeros, "windows of blocks": healing.parts}
        self.settings = Table.of_settings({**healing.settings, **counted})


def _figures(found: BlockFigures | MatrixReport) -> list[str]:
    return [f"{found.sparsity:.4f}", f"{found.relative_error:.4f}", f"{found.cosine:.4f}"]
