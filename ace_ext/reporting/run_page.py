"""The page of one pruning run: a summary of its cost, plots, figures by block and by matrix, and the settings."""

from pathlib import Path
from typing import Any

from ace_ext.cards import mask_words
from ace_ext.compare.journal import BlockFigures
from ace_ext.compare.tables import amount_name, short_names
from ace_ext.data.bos import BosChoice
from ace_ext.records import GoneExperts, Healing, MatrixReport, PruneReport, figure_text
from ace_ext.reporting import run_plots
from ace_ext.reporting.html import Plot, Table, check_report, render, write_file
from ace_ext.reporting.plots import blocks_plot, healing_plot

_FIGURES = ["sparsity", "rel. error", "cosine"]


def write_run_report(report: PruneReport, path: str | Path, folder: str | Path | None = None) -> Path:
    """Writes the page of a run to ``path``, and returns it as a path. ``folder``: the folder of the pruned model, for a
    histogram of its weights.

    Raises:
        InputError: as :func:`ace_ext.reporting.html.check_report`, or the file cannot be written.
    """
    check_report(path)
    blocks = [BlockFigures.of(block) for block in report.blocks]
    by_block = [[b.name, *_figures(b)] for b in blocks]
    by_matrix = [[m.name, "×".join(map(str, m.shape)), *_figures(m), str(m.tokens)] for m in report.matrices]
    if report.only_removed:
        return write_file(Path(path).expanduser(), _removal_page(report))
    amount = amount_name(report.config["pattern"] or str(report.config["sparsity"]))
    settings = {**report.config, **_extra(report), "dtype": report.dtype, "versions": report.versions}
    page = render(
        "run",
        f"{_model_name(report)}pruned by {_method(report)}, {amount} zeros",
        removed=_removed(report),
        glance=_glance(report),
        measured=report.measured(),
        advice=report.advice(),
        method=report.method,
        mask=mask_words(str(report.config["method"])),
        device=report.device,
        healing=None if report.healing is None else _Healing(report.healing),
        plots=_plots(report, blocks, folder),
        blocks=Table(["block", *_FIGURES], by_block, 1),
        matrices=Table(["matrix", "shape", *_FIGURES, "tokens"], by_matrix, 1),
        settings=Table.of_settings(settings),
    )
    return write_file(Path(path).expanduser(), page)


def _removal_page(report: PruneReport) -> str:
    """The page of a run that only removed structures."""
    taken = ", ".join(f"{record.before - record.after} of {record.before} {record.kind}" for record in report.removed)
    return render(
        "removal",
        f"{_model_name(report)}{taken} removed",
        glance=[*_perplexity(report), *_glance(report)[-2:]],
        measured=report.measured(),
        advice=report.advice(),
        device=report.device,
        removed=_removed(report),
        settings=Table.of_settings(
            {**report.config, **_extra(report), "dtype": report.dtype, "versions": report.versions}
        ),
    )


def _removed(report: PruneReport) -> list[tuple[str, Table]]:
    """For each kind of removed structures a sentence and the figures of blocks."""
    found = []
    for record in report.removed:
        head = ["block", "error, dense weights", "error, fitted weights", "ridge"]
        ridges = ["none" if block.ridge is None else f"{block.ridge:g}" for block in record.cut]
        lines = [
            [block.name, f"{block.error_before:.4f}", f"{block.error:.4f}", ridge]
            for block, ridge in zip(record.cut, ridges, strict=True)
        ]
        if record.dropped:
            head = ["removed block", "influence"]
            lines = [[block.name, f"{block.influence:.4f}"] for block in record.dropped]
        if record.gone:
            head = ["block", "removed experts", "lowest score that stays", "highest score that goes"]
            lines = [_of_experts(block) for block in record.gone]
        found.append((record.summary(), Table(head, lines, 1)))
        if record.tried:
            lines = [
                [one.part, f"{one.parameters_after:,}", "" if one.divergence is None else f"{one.divergence:.4f}"]
                for one in record.tried
            ]
            compared = Table(["candidate", "parameters", "KL on held-out samples"], lines, 1)
            found.append(("What was compared", compared))
    return found


def _of_experts(block: GoneExperts) -> list[str]:
    gone = [score for expert, score in enumerate(block.scores) if expert in block.experts]
    left = [score for expert, score in enumerate(block.scores) if expert not in block.experts]
    return [block.name, ", ".join(map(str, block.experts)), f"{min(left):.4g}", f"{max(gone):.4g}"]


def _model_name(report: PruneReport) -> str:
    model = str(report.extra.get("model") or "")
    return f"{short_names([model])[model]}: " if model else ""


def _method(report: PruneReport) -> str:
    """The method of the run, and of a distillation after it."""
    method = str(report.config.get("preset") or report.config["method"])
    later = report.healing is not None and "distill" not in str(report.config["method"])
    return f"{method} + distill" if later else method


def _glance(report: PruneReport) -> list[tuple[str, str]]:
    """Names and values of the main figures."""
    errors = [matrix.relative_error for matrix in report.matrices if matrix.tokens]
    return [
        *_perplexity(report),
        *_agreement(report),
        ("share of zeros", f"{report.sparsity:.4f}"),
        ("mean relative error", f"{sum(errors) / max(1, len(errors)):.3f}"),
        ("seconds of pruning", f"{report.seconds:,.1f}"),
        ("peak memory", f"{report.peak_memory_bytes / 2**30:.2f} GiB"),
    ]


def _perplexity(report: PruneReport) -> list[tuple[str, str]]:
    """The name and the value of perplexity before and after, if it was measured."""
    measured = report.perplexity
    if measured is None:
        return []
    after = measured.pruned if report.healing is None else measured.healed
    return [("perplexity, dense → pruned", " → ".join(map(figure_text, (measured.dense, after))))]


def _agreement(report: PruneReport) -> list[tuple[str, str]]:
    """The names and the values of the agreement with the dense model, if it was measured."""
    found = report.agreement
    return [] if found is None else [(name, f"{value:.3f}") for name, value in found.figures.items()]


def _plots(report: PruneReport, blocks: list[BlockFigures], folder: str | Path | None) -> list[Plot]:
    found = [Plot(run_plots.errors_plot(report.blocks), "Relative error of each matrix's output, by kind and block.")]
    found.append(Plot(*blocks_plot({("pruned", ""): blocks})))
    found.append(Plot(run_plots.seconds_plot(report.blocks), "Seconds of each block."))
    kept = None if folder is None else run_plots.kept_weights(folder, report.blocks)
    if kept is not None and len(kept):
        found.append(Plot(run_plots.weights_plot(kept), "Kept weights; zeros are left out. A sample of each matrix."))
    return found


def _extra(report: PruneReport) -> dict[str, Any]:
    """The report's description of model and calibration, with the choice about the BOS token as a separate entry."""
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
            healing_plot(healing), "Loss over the steps of the distillation, on training and held-out text."
        )
        lines = [[str(step), "not finite" if loss is None else f"{loss:.4f}"] for step, loss in healing.checks]
        self.checks = Table(["steps", f"{healing.loss_of}, held out"], lines, 0)
        counted = {"zeros, checked": healing.zeros, "windows of blocks": healing.parts}
        self.settings = Table.of_settings({**healing.settings, **counted})


def _figures(found: BlockFigures | MatrixReport) -> list[str]:
    return [f"{found.sparsity:.4f}", f"{found.relative_error:.4f}", f"{found.cosine:.4f}"]
