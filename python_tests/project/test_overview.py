"""What packing gives in the README's picture (``benchmarks/draw_overview.py``) is what ``docs/payoff.md`` says."""

import json
import re

import pytest
from helpers import ROOT

FIGURES = json.loads((ROOT / "docs/figures/overview.json").read_text(encoding="utf-8"))


def section(page: str, start: str, end: str) -> list[list[str]]:
    """Cells of the table rows between two texts of a page, without back ticks and spaces around them."""
    part = (ROOT / page).read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows]


@pytest.mark.parametrize(
    ("number", "start"),
    [(0, "A Llama of 1.03 billion random weights"), (1, "The same Llama on a processor with AVX2 alone")],
)
def test_ratios_of_packing_are_those_of_payoff(number, start):
    rows = section("docs/payoff.md", start, "\n\nThe ")
    found = {row[0].split(" (")[0]: row[1] for row in rows}
    shown = [row for row in FIGURES["rows"] if len(row["ratios"]) > number]
    assert len(shown) >= 5
    for row in shown:
        value = float(re.match(r"[\d.]+", found[row["name"].replace("`", "")])[0])
        assert value == row["ratios"][number], row["name"]
