"""The figures of the README's picture (``benchmarks/draw_overview.py``) are those of the pages that it names."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
FIGURES = json.loads((ROOT / "docs/figures/overview.json").read_text(encoding="utf-8"))


def section(page: str, start: str, end: str) -> list[list[str]]:
    """Cells of the table rows between two texts of a page, without back ticks and spaces around them."""
    part = (ROOT / page).read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows]


def test_perplexities_are_those_of_the_results():
    quality = FIGURES["quality"]
    rows = section("docs/results.md", "## Three models", "\n## ")
    found = {
        row[2]: float(row[3].split()[0])
        for row in rows
        if row[:2] == [quality["model"], quality["zeros"]] and len(row) == 7
    }
    for method in quality["methods"]:
        assert found[method["name"]] == method["perplexity"], method["name"]
    dense = [float(row[3]) for row in rows if row[0] == quality["model"] and row[2] == "dense"]
    assert dense == [quality["dense"]]


def test_times_are_those_of_the_results():
    quality = FIGURES["quality"]
    found = {row[0]: row[1:] for row in section("docs/results.md", "## Time of the presets", "\n## ")}
    assert found["method"][0] == f"time relative to Wanda's {quality['wanda_seconds']} s"
    for method in quality["methods"]:
        assert float(found[method["name"]][0]) == method["time"], method["name"]


@pytest.mark.parametrize(
    ("number", "start"),
    [(0, "A Llama of 1.03 billion random weights"), (1, "The same Llama on a processor with AVX2 alone")],
)
def test_ratios_of_packing_are_those_of_payoff(number, start):
    rows = section("docs/payoff.md", start, "\n\nThe ")
    found = {row[0].split(" (")[0]: row[1] for row in rows}
    shown = [row for row in FIGURES["packing"]["rows"] if len(row["ratios"]) > number]
    assert len(shown) >= 5
    for row in shown:
        value = float(re.match(r"[\d.]+", found[row["name"].replace("`", "")])[0])
        assert value == row["ratios"][number], row["name"]


def test_the_same_figures_give_the_same_picture(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_overview", ROOT / "benchmarks/draw_overview.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("a.png", "b.png"):
        module.draw(FIGURES, tmp_path / name)
    picture = (tmp_path / "a.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture == (tmp_path / "b.png").read_bytes()
