"""Draws the README's picture: perplexity against pruning time, and what packing gives.

    python benchmarks/draw_overview.py [--output docs/figures/overview.png]

The figures are those of ``docs/figures/overview.json``. They stand in tables of ``docs/results.md`` and
``docs/payoff.md``, where their commands are; ``python_tests/project/test_overview.py`` compares them. With the same
release of matplotlib the picture has the same bytes.
"""

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures" / "overview.json"
PICTURE = FIGURES.with_suffix(".png")
OURS, PUBLISHED, INK = "#00796b", "#9e5a00", "#333333"
LABEL_SIDE = {"published-sparsegpt": "right", "published-admm": "right", "balanced": "below", "fast": "left below"}
"""Where a point's name stands, so that names do not overlap; "right" of the point by default."""


def draw_quality(axes: Axes, figures: dict) -> None:
    """Perplexity of each method against its time; both axes are logarithmic."""
    places = {"right": (8, 0, "left"), "below": (0, -14, "center"), "left below": (-4, -14, "center")}
    for method in figures["methods"]:
        published = method["name"].startswith("published-")
        point = method["time"], method["perplexity"]
        axes.plot(*point, "s" if published else "o", color=PUBLISHED if published else OURS, markersize=8)
        right, up, side = places[LABEL_SIDE.get(method["name"], "right")]
        label = f"{method['name']}, {method['perplexity']:.2f}"
        axes.annotate(
            label, point, (right, up), textcoords="offset points", ha=side, va="center", color=INK, fontsize=9.5
        )
    axes.axhline(figures["dense"], color=INK, linestyle="--", linewidth=1)
    axes.annotate(f"dense, {figures['dense']:.2f}", (0.75, figures["dense"] * 1.03), color=INK, fontsize=9.5)
    axes.set(xscale="log", yscale="log", xlim=(0.7, 60), ylim=(26, 85))
    axes.set_xticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
    axes.set_yticks([30, 40, 50, 60, 70, 80], labels=["30", "40", "50", "60", "70", "80"])
    axes.minorticks_off()
    axes.set_xlabel(f"pruning time relative to Wanda's {figures['wanda_seconds']} s")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(color="#dddddd", linewidth=0.6)


def draw_packing(axes: Axes, figures: dict) -> None:
    """How many times better than the dense model a packed one is; one bar for each processor that was measured."""
    rows, machines = figures["rows"], figures["machines"]
    height = 0.8 / len(machines)
    for number, (machine, color) in enumerate(zip(machines, (OURS, "#80cbc4"), strict=True)):
        shown = [
            (row, ratios[number]) for row, ratios in enumerate(row["ratios"] for row in rows) if len(ratios) > number
        ]
        at = [row + (number - 0.5) * height for row, _ in shown]
        bars = axes.barh(at, [ratio for _, ratio in shown], height, color=color, label=machine)
        axes.bar_label(bars, fmt="%.2f", padding=3, color=INK, fontsize=9)
    axes.axvline(1, color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), labels=[row["name"].replace("`", "") for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 7.2)
    axes.set_xlabel("dense ÷ packed: time, memory or size (1: equal; more: packed is better)")
    axes.legend(loc="lower right", frameon=False)


def draw(figures: dict, path: Path) -> None:
    """Writes the picture. No date or version is in it, so the same figures give the same file."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    for part, name, function in zip(axes, ("quality", "packing"), (draw_quality, draw_packing), strict=True):
        function(part, figures[name])
        part.set_title(figures[name]["title"], color=INK, fontsize=11)
        note = "\n".join(textwrap.wrap(figures[name]["note"], 80))
        part.text(0, -0.17, note, transform=part.transAxes, fontsize=8.5, color="#555555", va="top")
    figure.tight_layout(w_pad=2.5)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURE, help="the .png file (default: %(default)s)")
    draw(json.loads(FIGURES.read_text(encoding="utf-8")), parser.parse_args().output)


if __name__ == "__main__":
    main()
