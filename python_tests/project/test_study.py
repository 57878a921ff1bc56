"""The tables and pictures of ``docs/results.md`` (``benchmarks/study.py``, ``benchmarks/draw_overview.py``)."""

import json
import re

import pytest
from helpers import ROOT, script

study = script("benchmarks/study.py")


def test_the_page_has_the_tables_of_the_recorded_runs():
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for title, table in study.tables(study.load()).items():
        assert table in page, f"{title}: run 'python benchmarks/study.py tables' and copy the table into the page"


def test_the_readme_has_the_means_and_times_of_the_recorded_runs():
    readme, runs = (ROOT / "README.md").read_text(encoding="utf-8"), study.Study(study.load())
    found = dict(re.findall(r"^\| `([\w-]+)`[^|]*\| `[^`]+` \| (.+) \|$", readme, re.M))
    assert len(found) == 7
    wanda = runs.rows[study.MODELS[0], study.WANDA, "0.5"].seconds
    for method, cells in found.items():
        *means, time = cells.split(" | ")
        assert means == [f"{runs.least(model, method, '0.5'):.2f}" for model in study.MODELS], method
        assert time == f"{runs.rows[study.MODELS[0], method, '0.5'].seconds / wanda:.1f}", method
    dense = " | ".join(f"{runs.rows[model, study.DENSE, '0'].mean:.2f}" for model in study.MODELS)
    assert f"| (dense) | | {dense} | |" in readme


def compared(folder, model="gemma-3-270m.gguf", **perplexity):
    """A folder with what ``ace-prune compare`` writes, as far as the program reads it."""
    folder.mkdir()
    figures = {text: {"perplexity": 20.0} for text in study.TEXTS}
    runs = [
        {
            "cell": {
                "method": method.replace("_", "-").replace("-with-BOS", " with BOS"),
                "amount": "0.5",
                "calibration": "bundled",
                "nsamples": 64,
                "seqlen": 128,
                "seed": seed,
            },
            "seconds": 10.0 - seed,
            "perplexity": {text: {"perplexity": value} for text in study.TEXTS},
        }
        for method, values in perplexity.items()
        for seed, value in enumerate(values)
    ]
    data = {"settings": {"model": f"/models/{model}"}, "dense": figures, "runs": runs}
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Two folders, recorded into a new file."""
    monkeypatch.setattr(study, "FILE", tmp_path / "study.json")
    first = compared(tmp_path / "a", published_wanda=[40.0], published_wanda_with_BOS=[36.0], fast=[30.0, 34.0])
    second = compared(tmp_path / "b", fast=[27.0])
    study.record([second])
    study.record([first, second])
    return study.load()


def test_seeds_form_a_row_and_a_later_run_replaces_an_earlier_one(recorded):
    assert [row.method for row in recorded] == ["dense", "published-wanda", "published-wanda with BOS", "fast"]
    fast = recorded[-1]
    assert (fast.model, fast.zeros, fast.calibration) == ("gemma-3-270m", "0.5", "bundled 64x128")
    assert {seed: set(texts.values()) for seed, texts in fast.seeds.items()} == {"0": {27.0}, "1": {34.0}}
    assert fast.mean == pytest.approx(30.5)
    assert fast.shown == "30.50 ± 4.95"
    assert fast.seconds == 9.0


def test_ratios_are_to_the_better_of_wanda_with_and_without_the_token(recorded):
    table = study.Study(recorded).relative(("0.5",))
    assert "| `fast` | – / 0.85 / – |" in table  # 30.5 / 36
    assert "published-wanda" not in table


def test_a_text_is_a_column(recorded):
    lines = study.Study(recorded).per_text("gemma-3-270m", ("0.5",)).splitlines()
    assert lines[0] == "| method | 50 %: articles | 50 %: news | 50 %: code | 50 %: mean | seeds |"
    assert lines[2] == "| dense | 20.00 | 20.00 | 20.00 | 20.00 |  |"
    assert lines[4] == "| `published-wanda` with BOS | 36.00 | 36.00 | 36.00 | 36.00 | 1 |"


def test_the_same_figures_give_the_same_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = script("benchmarks/draw_overview.py")
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        pictures.draw_all(folder)
    for name in ("overview.png", "study.png", "price.png"):
        picture = (tmp_path / "a" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert picture == (tmp_path / "b" / name).read_bytes()
