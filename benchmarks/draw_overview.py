"""Draws the pictures of the README, of ``docs/results.md`` and of ``docs/payoff.md``.

    python benchmarks/draw_overview.py [--folder docs/figures]

``overview.png`` has perplexity against pruning time, and what packing gives; ``study.png`` has perplexity against the
share of zeros and against the length of calibration samples. Perplexities are those of ``docs/figures/study.json``,
which ``study.py`` records. What packing gives is in ``docs/figures/overview.json``, from tables of ``docs/payoff.md``,
where the commands are. ``price.png`` has perplexity against speed for each way to make a model smaller, from the table
in ``docs/payoff.md``. With the same release of matplotlib a picture has the same bytes.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import existing_folder, one_line_errors
from study import ARTICLES, BUNDLED, DENSE, FILE, LENGTHS, MODELS, WANDA, Figures, Study, load

FOLDER = FILE.parent
OURS, PUBLISHED, INK = "#00796b", "#9e5a00", "#333333"
LABEL_SIDE = {
    "fast": "left below",
    "better": "left below",
    "balanced": "left below",
    "published-admm": "above",
    "best": "left below",
}
"""Where a point's name stands, so that names do not overlap; right of the point by default."""
PLACES = {
    "right": (8, 0, "left"),
    "above": (0, 12, "left"),
    "left below": (-4, -14, "center"),
}
SHARES = ("0.5", "0.6", "0.7")
DASHES = {WANDA: "-", "fast": "-", "balanced": "--"}
MEAN = "Geometric mean of held-out articles, news and code, 12 windows of 512 tokens each"
NOTES = {
    "quality": f"{MEAN}; calibrated on 64 × 128 tokens of the bundled text. One thread of an Intel Xeon with AVX-512 "
    "and AMX. docs/results.md",
    "price": f"{MEAN}; calibrated on 64 × 128 tokens of the bundled text, not distilled. Two threads of an Intel Xeon "
    "with AVX-512 and AMX; llama.cpp's wheel uses AVX2 alone. docs/payoff.md",
    "study": f"{MEAN}; calibrated on 8,192 tokens of articles; 50 % zeros below. docs/results.md",
}
ENGINES = {"torch": OURS, "llama.cpp": PUBLISHED}
MARKERS = {"all weights": "o", "neurons removed": "s", "50 % zeros, packed": "^", "50 % zeros, embeddings too": "v"}


@dataclass(frozen=True)
class Price:
    """A row of the table of ``docs/payoff.md``."""

    engine: str
    family: str
    name: str
    speed: float
    mean: float


def prices(page: str) -> list[Price]:
    """The rows of the table on the page, whose columns are engine, model, its form, MB, speed and mean perplexity."""
    rows = re.findall(r"^\| (torch|llama\.cpp) \| (.+?) \| (.+?) \| [\d,]+ \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    return [Price(engine, family, name, float(speed), float(mean)) for engine, family, name, speed, mean in rows]


def colour(method: str) -> str:
    """Published methods and ours differ in colour."""
    return PUBLISHED if method.startswith("published-") else OURS


def draw_quality(axes: Axes, study: Study) -> None:
    """Perplexity of each method against its time; both axes are logarithmic."""
    model = MODELS[0]
    found = [study.rows.get((model, method, "0.5")) for method in study.methods(model)]
    rows = [row for row in found if row is not None and row.seconds]  # the others were not timed beside these
    wanda = study.rows[model, WANDA, "0.5"].seconds
    for row in rows:
        point = row.seconds / wanda, row.mean
        axes.plot(*point, "s" if row.method.startswith("published-") else "o", color=colour(row.method), markersize=8)
        right, up, side = PLACES[LABEL_SIDE.get(row.method, "right")]
        axes.annotate(
            f"{row.method}, {row.mean:.1f}",
            point,
            (right, up),
            textcoords="offset points",
            ha=side,
            va="center",
            color=INK,
            fontsize=9.5,
        )
    dense = study.rows[model, DENSE, "0"].mean
    axes.axhline(dense, color=INK, linestyle="--", linewidth=1)
    axes.annotate(f"dense, {dense:.1f}", (0.75, dense * 1.03), color=INK, fontsize=9.5)
    axes.set(xscale="log", yscale="log", xlim=(0.7, 60), ylim=(dense * 0.9, max(row.mean for row in rows) * 1.15))
    axes.set_xticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
    plain_ticks(axes, [value for value in (20, 25, 30, 40, 50, 60, 70) if dense * 0.9 < value])
    axes.set_xlabel(f"pruning time relative to Wanda's {wanda:.0f} s")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(color="#dddddd", linewidth=0.6)
    title_and_note(axes, f"{model}, 50 % zeros: quality and time", NOTES["quality"])


def draw_packing(axes: Axes, figures: dict) -> None:
    """How many times better than the dense model a packed one is; one bar for each processor that was measured."""
    rows, machines = figures["rows"], figures["machines"]
    height = 0.8 / len(machines)
    for number, (machine, shade) in enumerate(zip(machines, (OURS, "#80cbc4"), strict=True)):
        shown = [
            (row, ratios[number]) for row, ratios in enumerate(row["ratios"] for row in rows) if len(ratios) > number
        ]
        at = [row + (number - 0.5) * height for row, _ in shown]
        bars = axes.barh(at, [ratio for _, ratio in shown], height, color=shade, label=machine)
        axes.bar_label(bars, fmt="%.2f", padding=3, color=INK, fontsize=9)
    axes.axvline(1, color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), labels=[row["name"].replace("`", "") for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 7.2)
    axes.set_xlabel("dense ÷ packed: time, memory or size (1: equal; more: packed is better)")
    axes.legend(loc="lower right", frameon=False)
    title_and_note(axes, figures["title"], figures["note"])


def title_and_note(axes: Axes, title: str, note: str) -> None:
    """A title above a plot, and a note below it."""
    axes.set_title(title, color=INK, fontsize=11)
    lines = "\n".join(textwrap.wrap(note, 80))
    axes.text(0, -0.17, lines, transform=axes.transAxes, fontsize=8.5, color="#555555", va="top")


def plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at these values, and no others."""
    axes.set_yticks(values, labels=[f"{value:g}" for value in values])
    axes.minorticks_off()


def draw_lines(axes: Axes, lines: dict[str, list[Figures | None]], places: Sequence[str]) -> None:
    """A line for each method: its mean perplexity at each place."""
    for method, rows in lines.items():
        at = [(place, row.mean) for place, row in enumerate(rows) if row is not None]
        if len(at) > 1:
            look = {"marker": "o", "markersize": 4, "color": colour(method), "label": method}
            axes.plot(*zip(*at, strict=True), DASHES[method], **look)
    low, high = axes.get_ylim()
    if high > 3 * low:
        axes.set_yscale("log")
        ticks = [base * step for base in (10, 100, 1000) for step in (1, 1.5, 2, 3, 5, 7)]
        plain_ticks(axes, [value for value in ticks if low <= value <= high])
    axes.set_xticks(range(len(places)), labels=places)
    axes.set_xlim(-0.3, len(places) - 0.7)
    axes.grid(color="#dddddd", linewidth=0.6)


def draw_overview(rows: list[Figures], packing: dict, path: Path) -> None:
    """The picture of the README."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    draw_quality(axes[0], Study(rows, BUNDLED))
    draw_packing(axes[1], packing)
    figure.tight_layout(w_pad=2.5)
    save(figure, path)


def draw_study(rows: list[Figures], path: Path) -> None:
    """The picture of the results: a column for each model."""
    figure, axes = plt.subplots(2, len(MODELS), figsize=(13, 8))
    main = Study(rows, ARTICLES)
    for column, model in enumerate(MODELS):
        above = {method: [main.rows.get((model, method, share)) for share in SHARES] for method in DASHES}
        draw_lines(axes[0][column], above, ["50 %", "60 %", "70 %"])
        axes[0][column].set_title(model, color=INK, fontsize=11)
        studies = [Study(rows, f"wiki-mini {length}") for length in LENGTHS]
        below = {method: [study.rows.get((model, method, "0.5")) for study in studies] for method in DASHES}
        draw_lines(axes[1][column], below, [length.replace("x", " × ") for length in LENGTHS])
        axes[0][column].set_xlabel("zeros")
        axes[1][column].set_xlabel("calibration: samples × tokens")
    for row in axes:
        row[0].set_ylabel("perplexity (lower is better)")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.text(0.01, 0.01, NOTES["study"], fontsize=8.5, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save(figure, path)


def draw_price(rows: list[Price], path: Path) -> None:
    """Perplexity against speed. Rows of one family are joined by a line; the engine is the colour."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for engine, family in dict.fromkeys((row.engine, row.family) for row in rows):
        line = [(row.speed, row.mean) for row in rows if (row.engine, row.family) == (engine, family)]
        look = {"marker": MARKERS[family], "color": ENGINES[engine], "linewidth": 1, "linestyle": ":"}
        axes.plot(*zip(*line, strict=True), markersize=8, label=f"{engine}: {family}", **look)
    for row in rows:
        at = (row.speed, row.mean)
        beside = (6, -14) if row.name == "Q8_0" else (6, 6)  # another row is at nearly the same place
        axes.annotate(row.name, at, beside, textcoords="offset points", color=INK, fontsize=8.5)
    axes.set(xlabel="tokens a second, one sequence", ylabel="perplexity (lower is better)")
    axes.margins(0.12)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    title_and_note(axes, "Qwen2.5-Coder-0.5B: what each way to a smaller model costs, and gives", NOTES["price"])
    figure.tight_layout()
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a picture. No date or version is in it, so the same figures give the same file."""
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_all(folder: Path) -> None:
    """Writes the pictures to a folder."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False})
    rows, packing = load(), json.loads((FOLDER / "overview.json").read_text(encoding="utf-8"))
    draw_overview(rows, packing, folder / "overview.png")
    draw_study(rows, folder / "study.png")
    draw_price(prices((FOLDER.parent / "payoff.md").read_text(encoding="utf-8")), folder / "price.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = "where the .png files go (default: %(default)s)"
    parser.add_argument("--folder", type=existing_folder, default=FOLDER, help=where)
    folder = parser.parse_args(argv).folder
    with one_line_errors(parser):
        draw_all(folder)


if __name__ == "__main__":
    main()
