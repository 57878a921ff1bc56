"""The plot of ``ace-prune bench``: how much better the packed model is than the dense one, figure by figure."""

from __future__ import annotations

import io
from pathlib import Path

from ace_ext.reporting.plots import DPI, FONT, WIDTH, log_axis, require_matplotlib
from ace_ext.runs.own_files import check_replaceable
from ace_ext.runtime.bench import BenchResult, Pair
from ace_ext.whole_files import written_whole

_MARK = "ace-prune bench"
"""Marks the file as one of this program."""


def check_plot(path: Path) -> None:
    """Checks that the plot can be written. Call it before the work.

    Raises:
        InputError: matplotlib is not installed, the folder of ``path`` does not exist, or ``path`` is a file of another
            kind.
    """
    require_matplotlib()
    check_replaceable("plot", path, "plot of ace-prune bench", _is_plot)


def write_plot(result: BenchResult, path: Path) -> None:
    """Writes the plot as PNG."""
    with written_whole(path) as part:
        part.write_bytes(bench_plot(result))


def bench_plot(result: BenchResult) -> bytes:
    """The PNG: a bar for each figure. It starts at 1 (as good as dense) and goes right if packed is better."""
    from matplotlib.figure import Figure

    pairs = _pairs(result)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    ratios = [pair.ratio for pair in pairs.values()]
    colours = ["#0072b2" if ratio >= 1 else "#d55e00" for ratio in ratios]
    bars = axes.barh(list(pairs), [ratio - 1 for ratio in ratios], left=1, color=colours)
    axes.bar_label(bars, labels=[f"{ratio:.2f} ×" for ratio in ratios], padding=3, fontsize=FONT)
    axes.invert_yaxis()
    axes.axvline(1, color="#444444", linewidth=1)
    log_axis(axes, "x")  # 2 and 0.5 are equally far from 1
    axes.margins(x=0.45)  # for the labels beside the bars
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(labelsize=FONT)
    axes.set_xlabel("packed is better by", fontsize=FONT)
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    axes.set_title(f"{result.dtype}, {threads}, {result.capability}", fontsize=FONT)
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


def _is_plot(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK.encode() in file.read(512)
