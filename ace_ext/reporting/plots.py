"""Plots of comparisons as PNG bytes. Small figures with large type, readable at a phone's width.

The colour of a line shows its method; marker and dash show whatever else varies in the plot. matplotlib is optional
(``pip install matplotlib``), and only the functions that draw import it.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from ace_ext.compare.journal import BlockFigures, Results
from ace_ext.compare.tables import Row, agrees, rows, short_names, text_of
from ace_ext.errors import InputError
from ace_ext.records import LOWER_IS_BETTER, Healing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.7  # inches; about 50 characters fit into a line
FONT = 9  # points: 12 pixels on a phone 390 pixels wide, where a plot is 358 pixels wide
DPI = 230
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")  # distinct if colour-blind
_MARKERS = ("o", "^", "s", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
_SHARES_DIFFER = 0.001
_LOG_FROM = 4  # figures that differ by more than this factor are drawn on a logarithmic axis

Key: TypeAlias = tuple[str, str]
"""A method, and as text whatever else distinguishes its line (empty if nothing else varies)."""

_Style: TypeAlias = dict[str, Any]
"""Keyword arguments of matplotlib's functions that draw lines."""


def require_matplotlib() -> None:
    """Checks that plots can be drawn. Call it before the work.

    Raises:
        InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("a report needs matplotlib, which is not installed; pip install matplotlib")


def study_plots(results: Results) -> dict[str, tuple[bytes, str]]:
    """The plots of a comparison with at least one run: PNG and caption by name."""
    table = rows(results)
    source = short_names([table[0].calibration])[table[0].calibration]
    what = "Agreement with the dense model" if agrees(results) else "Perplexity"
    captions = {
        "sparsity": f"{what} against the share of zeros.",
        "calibration": f"{what} against calibration: samples × tokens of each.",
        "seconds": f"{what} against seconds of pruning. Grey: the best figure within a time, by share of zeros.",
    }
    dotted = " Dotted: the dense model. Bars: one standard deviation over seeds."
    blocks, caption = _study_blocks_plot(table)
    return {
        "sparsity": (_sparsity_plot(results, table), captions["sparsity"] + dotted),
        "calibration": (_calibration_plot(results, table), captions["calibration"] + dotted),
        "seconds": (_seconds_plot(results, table), captions["seconds"] + dotted),
        "blocks": (blocks, f"{caption} Calibrated on {source}, {table[0].length}."),
    }


def blocks_plot(series: dict[Key, list[BlockFigures]]) -> tuple[bytes, str]:
    """The PNG of a plot with a line for each of ``series``, and its caption. It shows the mean output cosine by block.
    It also shows the share of zeros, unless this is the same in all blocks."""
    shares = [block.sparsity for blocks in series.values() for block in blocks]
    differ = max(shares) - min(shares) > _SHARES_DIFFER
    figure, axes = figure_with(1 + differ)
    styles = _styles(series)
    for key, blocks in series.items():
        style = {**styles[key], "markersize": 3, "linewidth": 1.2}
        axes[0].plot([block.cosine for block in blocks], **style)
        if differ:
            axes[1].plot([block.sparsity for block in blocks], **style)
            axes[1].set_ylabel("share of zeros", fontsize=FONT)
    axes[0].set_ylabel("output cosine", fontsize=FONT)
    axes[-1].set_xlabel("block", fontsize=FONT)
    for one in axes:
        at_whole_numbers(one)
        one.ticklabel_format(axis="y", useOffset=False)
    shown = "Output cosine and share of zeros" if differ else "Output cosine"
    return png_of(figure, styles), f"{shown} by block."


def healing_plot(healing: Healing) -> bytes:
    """The PNG of a plot of a distillation's loss over its steps, on training text and on held-out text."""
    figure, (axes,) = figure_with(1)
    named = {("training text", ""): healing.losses, ("held-out text", ""): healing.checks}
    styles = _styles(named)
    for key, points in named.items():
        steps, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, losses, **{**styles[key], "markersize": 3, "linewidth": 1.2})
    axes.set_ylabel(f"{healing.loss_of}, per token", fontsize=FONT)
    axes.set_xlabel("step", fontsize=FONT)
    at_whole_numbers(axes)
    return png_of(figure, styles)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points ``(x, y)`` for which no other has both a smaller or equal ``x`` and a smaller or equal ``y``, by
    increasing ``x``. Equal points appear once."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


# --- the plots of a comparison ----------------------------------------------------------------------------------------


def _sparsity_plot(results: Results, table: list[Row]) -> bytes:
    """Unstructured sparsities are joined by a line; an N:M pattern is a single point at its share of zeros."""

    def kind(row: Row) -> str:
        return row.amount if ":" in row.amount else ""

    lines = _lines(table, ("calibration", "length"), kind)
    for found in lines.values():
        found.sort(key=lambda row: row.sparsity)
    return _draw(results, lines, lambda row: row.sparsity, "share of zeros")


def _calibration_plot(results: Results, table: list[Row]) -> bytes:
    """One place on the axis for each length, ordered by number of tokens; two lengths may have the same number."""
    lengths = sorted({(row.tokens, row.cell.seqlen, row.cell.nsamples) for row in table})

    def place(row: Row) -> int:
        return lengths.index((row.tokens, row.cell.seqlen, row.cell.nsamples))

    def name_places(axes: Axes, _: str) -> None:
        names = [
            f"{nsamples}×{seqlen}\n{tokens:,}" if seqlen else str(nsamples) for tokens, seqlen, nsamples in lengths
        ]
        axes.set_xticks(range(len(names)), names, fontsize=FONT, rotation=60 if len(names) > 4 else 0)
        axes.set_xlim(-0.5, len(names) - 0.5)

    lines = _lines(table, ("amount_name", "calibration"))
    for found in lines.values():
        found.sort(key=place)
    return _draw(results, lines, place, "samples × tokens of each, and tokens in all", name_places)


def _seconds_plot(results: Results, table: list[Row]) -> bytes:
    amounts: dict[str, list[Row]] = {}
    for row in table:
        amounts.setdefault(row.amount, []).append(row)
    seconds, rises = [row.seconds for row in table], agrees(results)

    def draw_fronts(axes: Axes, text: str) -> None:
        for found in amounts.values():
            sign = -1 if rises and results.dense_tasks[text].metric not in LOWER_IS_BETTER else 1
            front = pareto_front([(row.seconds, sign * row.figures[text].mean) for row in found])
            x, y = zip(*((seconds, sign * figure) for seconds, figure in front), strict=True)
            axes.step(x, y, where="post", color="#bbbbbb", linewidth=1, zorder=0)
        if max(seconds) > _LOG_FROM * min(seconds):
            log_axis(axes, "x")

    lines = _lines(table, ("amount_name", "calibration", "length"))
    return _draw(results, lines, lambda row: row.seconds, "seconds of pruning", draw_fronts, joined=False)


def _study_blocks_plot(table: list[Row]) -> tuple[bytes, str]:
    """Shows only the first calibration, because the lines of others are too close to it. Averaged over seeds."""
    first = table[0]
    same = [row for row in table if (row.calibration, row.length) == (first.calibration, first.length)]
    return blocks_plot({key: _mean_blocks(row) for key, (row,) in _lines(same, ("amount_name",)).items()})


def _mean_blocks(row: Row) -> list[BlockFigures]:
    means = []
    for same in zip(*(run.blocks for run in row.runs), strict=True):
        figures = [(block.sparsity, block.relative_error, block.cosine) for block in same]
        means.append(BlockFigures(same[0].name, *(sum(values) / len(same) for values in zip(*figures, strict=True))))
    return means


# --- shared steps -----------------------------------------------------------------------------------------------------


def _lines(table: list[Row], names: tuple[str, ...], kind: Callable[[Row], str] = lambda _: "") -> dict[Key, list[Row]]:
    """The lines of a plot: rows of one method with the same values of the named properties and of ``kind``."""
    varying = [name for name in names if len({getattr(row, name) for row in table}) > 1]
    sources = short_names(row.calibration for row in table)
    lines: dict[Key, list[Row]] = {}
    for row in table:
        values = [getattr(row, name) for name in varying] + [kind(row)]
        lines.setdefault((row.method, ", ".join(sources.get(v, v) for v in values if v)), []).append(row)
    return lines


def _styles(keys: Iterable[Key]) -> dict[Key, _Style]:
    """Colour, marker and dash of each line."""
    keys = list(keys)
    methods = list(dict.fromkeys(method for method, _ in keys))
    others = list(dict.fromkeys(other for _, other in keys))

    def style(method: str, other: str) -> _Style:
        index = others.index(other)
        marker, dash = _MARKERS[index % len(_MARKERS)], _DASHES[index % len(_DASHES)]
        return {"color": _COLOURS[methods.index(method) % len(_COLOURS)], "marker": marker, "linestyle": dash}

    return {(method, other): style(method, other) for method, other in keys}


def _draw(
    results: Results,
    lines: dict[Key, list[Row]],
    x: Callable[[Row], float],
    x_label: str,
    more: Callable[[Axes, str], None] = lambda axes, text: None,
    joined: bool = True,
) -> bytes:
    """A plot for each evaluation text, of perplexity, or for each figure of agreement; ``more(axes, text)`` adds to
    it."""
    agreement, texts = agrees(results), short_names(results.settings["texts"])
    names = results.dense_tasks if agreement else results.dense
    figure, axes = figure_with(len(names))
    styles = _styles(lines)
    for text, one in zip(names, axes, strict=True):
        for key, found in lines.items():
            spreads = [row.figures[text] for row in found]
            bars = [spread.deviation or 0.0 for spread in spreads]
            style = styles[key] if joined else {**styles[key], "linestyle": "none"}
            options: _Style = {"markersize": 5, "linewidth": 1.2, "capsize": 3, **style}
            one.errorbar(list(map(x, found)), [spread.mean for spread in spreads], bars, **options)
        more(one, text)
        dense = results.dense_tasks[text].value if agreement else results.dense[text].perplexity
        one.axhline(dense, color="#444444", linestyle=":", linewidth=1)
        one.set_ylabel(results.dense_tasks[text].metric if agreement else "perplexity", fontsize=FONT)
        one.set_title(f"evaluated on {texts[text_of(text) if agreement else text]}", fontsize=FONT)
        means = [row.figures[text].mean for found in lines.values() for row in found]
        if not agreement and max(filter(math.isfinite, means), default=dense) > _LOG_FROM * dense:
            log_axis(one, "y")
    axes[-1].set_xlabel(x_label, fontsize=FONT)
    return png_of(figure, styles)


def figure_with(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` plots below one another."""
    from matplotlib.figure import Figure  # not pyplot, which has global state and may ask for a display

    figure = Figure(figsize=(WIDTH, 0.4 + 2.4 * count), layout="constrained")
    axes: list[Axes] = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for one in axes:
        one.grid(alpha=0.3)
        one.tick_params(labelsize=FONT)
    return figure, axes


def at_whole_numbers(axes: Axes) -> None:
    """Puts ticks of the x axis only at whole numbers, because it counts blocks or steps."""
    from matplotlib.ticker import AutoLocator

    whole = AutoLocator()
    whole.set_params(integer=True)
    axes.xaxis.set_major_locator(whole)


def log_axis(axes: Axes, which: str) -> None:
    """Makes the axis ``"x"`` or ``"y"`` logarithmic, labelled with plain numbers: ``60`` and not ``6×10¹``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def png_of(figure: Figure, styles: Mapping[Key, _Style]) -> bytes:
    """The figure as PNG, with a legend below: methods by colour, then whatever else varies by marker and dash."""
    from matplotlib.lines import Line2D

    entries: dict[str, _Style] = {
        method: {"color": style["color"], "marker": "o"} for (method, _), style in styles.items()
    }
    others = {other: {**style, "color": "#444444"} for (_, other), style in styles.items()}
    if len(others) > 1:
        entries.update({other or "shares of zeros": style for other, style in others.items()})
    if len(styles) > 1:
        columns = 1 if max(map(len, entries)) > 24 else 2
        figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(entries) / columns))
        handles = [
            Line2D([], [], label=label, markersize=5, linewidth=1.2, **style) for label, style in entries.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=FONT, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()
