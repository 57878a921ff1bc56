"""The pages of ``docs/`` can be found: the index and the navigation lead to each, and the README is short."""

import re
from pathlib import Path

import pytest

from ace_ext.pruning.method import PRESETS, PUBLISHED, parse

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md")


@pytest.mark.parametrize("page", PAGES)
def test_index_and_navigation_lead_to_each_page(page):
    assert f"({page})" in (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert re.search(rf": {re.escape(page)}$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)


def test_readme_has_at_most_900_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert len(targets) > 10
    for target in targets:
        assert (ROOT / target).is_file(), target


def test_anchors_of_the_readme_exist():
    """Each ``page.md#anchor`` of the README is a heading of that page."""
    for page, anchor in re.findall(r"\]\(([\w/.-]+\.md)#([\w-]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
        slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
        assert anchor in slugs, f"{page}#{anchor}"


METHOD = re.compile(r'--methods?\s+(?:"([^"]+)"|([a-z][\w-]*))')


def methods(text: str) -> list[str]:
    """The texts of methods after ``--method`` and ``--methods``, and in columns of tables with this title."""
    found = [text for quoted, name in METHOD.findall(text) for text in (quoted or name).split(";")]
    column = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            column = None
        elif column is not None:
            found += re.findall(r"^`([^`]+)`", cells[column])
        elif "method" in cells:
            column = cells.index("method")
    return [" ".join(method.replace("\\", " ").split()) for method in found if "…" not in method]


def test_methods_are_found():
    pages = ["README.md", *(f"docs/{name}" for name in PAGES)]
    assert sum(len(methods((ROOT / page).read_text(encoding="utf-8"))) for page in pages) > 200


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in PAGES)])
def test_methods_are_accepted(page):
    for method in methods((ROOT / page).read_text(encoding="utf-8")):
        parse(method)


def test_presets_of_the_readme_stand_for_these_texts():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)`(?: \(default\))? \| `([^`]+)` \|", text, re.M)
    assert len(dict(rows)) == len(rows) > len(PRESETS)
    assert dict(rows).items() <= (PRESETS | PUBLISHED).items()  # not all baselines: those of the three models
    assert dict(rows).keys() >= PRESETS.keys()
