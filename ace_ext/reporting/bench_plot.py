"""The plots of ``ace-prune bench``: how much better packed models are than the dense one, figure by figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ace_ext.bench.contest import ContestResult
from ace_ext.bench.pair import BenchResult, Pair
from ace_ext.errors import InputError, counted
from ace_ext.reporting.plots import DPI, FONT, WIDTH, log_axis, require_matplotlib
from ace_ext.runs.own_files import check_replaceable
from ace_ext.whole_files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARK = "ace-prune bench"
"""Marks the file as one of this program."""


def check_plot(path: Path) -> None:
    """Checks that the plot can be written. Call it before the work.

    Raises:
        InputError: matplotlib is not installed, the folder of ``path`` does not exist, or ``path`` is a file of another
            kind or does not end in ``.png``.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"plot must end in .png, the form in which it is written (got {str(path)!r})")
    require_matplotlib()
    check_replaceable("plot", path, "plot of ace-prune bench", _is_plot)


def write_plot(image: bytes, path: Path) -> None:
    """Writes the PNG of a plot."""
    with written_whole(path) as part:
        part.write_bytes(image)


def pair_plot(result: BenchResult) -> bytes:
    """The PNG: a bar for each figure. It starts at 1 (as good as dense) and goes right if packed is better."""
    from matplotlib.figure import Figure

    pairs = _pairs(result)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, {name: pair.ratio for name, pair in pairs.items()})
    axes.set_xlabel("packed is better by", fontsize=FONT)
    axes.set_title(f"{result.dtype}, {counted(result.threads, 'thread')}, {result.capability}", fontsize=FONT)
    return _png(figure)


def contest_plot(result: ContestResult) -> bytes:
    """The PNG: a panel for each figure, with a bar for each candidate but the dense one, as in :func:`pair_plot`."""
    from matplotlib.figure import Figure

    panels = _panels(result)
    height = 0.5 + len(panels) * (0.45 + 0.3 * (len(result.figures) - 1))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    for axes, (name, ratios) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        _bars(axes, ratios)
        axes.set_title(name, fontsize=FONT, loc="left")
    axes.set_xlabel("better than dense in torch by", fontsize=FONT)
    figure.suptitle(f"dense {result.dtype}, {counted(result.threads, 'thread')}", fontsize=FONT)
    return _png(figure)


def _bars(axes: Axes, ratios: dict[str, float]) -> None:
    """A bar for each ratio, from 1."""
    colours = ["#0072b2" if ratio >= 1 else "#d55e00" for ratio in ratios.values()]
    bars = axes.barh(list(ratios), [ratio - 1 for ratio in ratios.values()], left=1, color=colours)
    axes.bar_label(bars, labels=[f"{ratio:.2f} ×" for ratio in ratios.values()], padding=3, fontsize=FONT)
    axes.invert_yaxis()
    axes.axvline(1, color="#444444", linewidth=1)
    log_axis(axes, "x")  # 2 and 0.5 are equally far from 1
    axes.margins(x=0.45)  # for the labels beside the bars
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(labelsize=FONT)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI, metadata={"Software": _MARK})
    return data.getvalue()


def _pairs(result: BenchResult) -> dict[str, Pair]:
    """The measured figures, by their names in the plot."""
    others = {
        f"prefill, {result.prefill_tokens} tokens": result.prefill,
        "time to load": result.load,
        "resident memory": result.memory,
        "weight files": result.files,
    }
    decode = {f"decode, batch {batch}": pair for batch, pair in result.decode.items()}
    return decode | {name: pair for name, pair in others.items() if pair is not None}


def _panels(result: ContestResult) -> dict[str, dict[str, float]]:
    """The ratios of every candidate but the first, by the names of the figures in the plot."""
    dense, others = result.figures[0], result.figures[1:]
    panels = {
        f"decode, batch {batch}": {own.name: own.decode_ratios[batch] for own in others} for batch in dense.decode
    }
    panels[f"prefill, {result.prefill_tokens} tokens"] = {own.name: own.prefill_ratio for own in others}
    if dense.memory_bytes:
        panels["memory of the process"] = {own.name: dense.memory_bytes / own.memory_bytes for own in others}
    panels["weight files"] = {own.name: dense.file_bytes / own.file_bytes for own in others}
    return panels


def _is_plot(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK.encode() in file.read(512)
