"""HTML reports: the page needs no other file, escapes its text and has the figures; plots show their data."""

import re
from html.parser import HTMLParser

import matplotlib.image
import pytest
from tiny_models import make_model, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.bench.pair import BenchResult, Pair
from ace_ext.compare.journal import BlockFigures, Cell, Results, Run
from ace_ext.data.perplexity import Perplexity
from ace_ext.records import Healing, HeldOutPerplexity
from ace_ext.reporting import plots
from ace_ext.reporting.bench_plot import pair_plot
from ace_ext.reporting.compare_page import write_study_report
from ace_ext.reporting.html import Table, check_report
from ace_ext.reporting.plots import blocks_plot, pareto_front, study_plots
from ace_ext.reporting.run_page import write_run_report

NASTY = '<script>alert("x")</script>&'


class Page(HTMLParser):
    """Parses a page: tags, attributes, text of cells; fails on tags that are not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, path):
        super().__init__()
        self.tags, self.cells, self.addresses, self._open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data


def make_run(method, amount, seed, value, **changed):
    cell = Cell(method, amount, changed.pop("calibration", "c4"), changed.pop("nsamples", 4), 16, seed)
    share = 0.5 if ":" in amount else float(amount)
    blocks = [BlockFigures(f"layers.{index}", share, 0.1, 0.9 + index / 100) for index in range(3)]
    texts = {text: Perplexity(value, 1.0, 8, 16, 120) for text in ("wiki-mini", NASTY)}
    config = {"method": method, "sparsity": share, "pattern": None, "skip": [NASTY]}
    return Run(cell, config, None, "0" * 64, "bfloat16", share, 2.0 + seed, 2**30, True, texts, blocks)


@pytest.fixture
def results():
    settings = {"model": f"org/{NASTY}", "device": "cpu", "eval_seqlen": 16, "texts": {"wiki-mini": None, NASTY: None}}
    dense = {text: Perplexity(10.0, 1.0, 8, 16, 120) for text in ("wiki-mini", NASTY)}
    runs = [
        make_run(method, amount, seed, 20.0 + seed)
        for method in ("wanda", NASTY)
        for amount in ("0.5", "0.6", "2:4")
        for seed in (0, 1)
    ]
    return Results(settings, dense, "", runs)


def assert_stands_alone(page):
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.addresses
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert names.count("table") == sum(attributes.get("class") == "scroll" for _, attributes in page.tags)
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_study_report(results, tmp_path):
    path = write_study_report(results, tmp_path)
    files = {"report.html", "results.json", "sparsity.png", "calibration.png", "seconds.png", "blocks.png"}
    assert {file.name for file in tmp_path.iterdir()} == files
    page = Page(path)
    assert_stands_alone(page)
    assert not re.search(r"https?://|url\(|@import", path.read_text())
    assert {NASTY, "wanda", "60 %", "2:4", "20.50 ± 0.71"} <= set(page.cells)
    first = page.cells.index("wanda")
    assert page.cells[first : first + 7] == ["wanda", "50 %", "20.50 ± 0.71", "20.50 ± 0.71", "2", "2.5", "1.00"]


def test_run_report(tmp_path):
    report = prune_model(make_model("llama"), make_tokens(), PruneConfig("wanda", pattern="2:4"))
    report.extra = {"model": NASTY, "calibration": {"source": "self", "seed": 3}}
    page = Page(write_run_report(report, tmp_path / "page.html"))
    assert_stands_alone(page)
    assert {NASTY, "source self, seed 3", "32×32"} <= set(page.cells)
    text = (tmp_path / "page.html").read_text()
    assert "Method <code>wanda</code>; the mask was chosen by wanda scores; the paper&#39;s scores were" in text
    assert "Large loss" not in text
    report.perplexity = HeldOutPerplexity("a text", 4, 128, 20.0, 50.0)
    write_run_report(report, tmp_path / "page.html")
    assert "Large loss: perplexity is 2.5 times the dense model&#39;s; try" in (tmp_path / "page.html").read_text()
    assert all(matrix.name in page.cells for matrix in report.matrices)
    assert all(f"{matrix.cosine:.4f}" in page.cells for matrix in report.matrices)


@pytest.mark.parametrize(
    "changes",
    [{}, {"calibration": "/some/where/text.txt"}, {"nsamples": 8}],
    ids=["plain", "two-sources", "two-lengths"],
)
def test_plots_are_pictures(results, changes, tmp_path):
    results.runs.append(make_run("wanda", "0.5", 0, 600.0, **changes) if changes else make_run("ace", "2:4", 0, 30.0))
    for name, (png, caption) in study_plots(results).items():
        file = tmp_path / f"{name}.png"
        file.write_bytes(png)
        picture = matplotlib.image.imread(file)
        height, width = picture.shape[:2]
        assert width == round(plots.WIDTH * plots.DPI)
        assert height > width / 2
        assert picture[..., :3].std() > 0.01  # not an empty sheet
        assert caption


PHONE = 358
"""Pixels that a page has for a plot on a phone of 390."""


def sizes_of_text(figure):
    """The sizes in points of the texts that a figure shows."""
    from matplotlib.text import Text

    return {text.get_fontsize() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()}


def runs_out(figure):
    """Whether something that the figure draws is cut at its edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()  # which also lays it out
    drawn, whole = figure.get_tightbbox(), figure.bbox_inches
    return not (drawn.min >= whole.min - 0.01).all() or not (drawn.max <= whole.max + 0.01).all()


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written while a test runs."""
    from matplotlib.figure import Figure

    found, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        found.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def test_the_text_of_plots_can_be_read_on_a_phone(results, figures, tmp_path):
    """No text is smaller than 12 pixels there, and none runs out of the picture."""
    for nsamples in (5, 8, 16, 64, 128):
        results.runs.append(make_run("wanda", "0.5", 0, 20.0, nsamples=nsamples))
    study_plots(results)
    report = prune_model(make_model("llama"), make_tokens(), PruneConfig("wanda", pattern="2:4"))
    losses, checks = [(1, 0.2), (2, 0.1)], [(0, 0.3), (1, None), (2, 0.2)]
    report.healing = Healing({"learning_rate": 0.01}, 64, 2, 1, 16, 0.3, 0.2, 3, 0.1, losses, checks, [1])
    write_run_report(report, tmp_path / "page.html")
    ratios = {1: Pair(1.0, 12.0, 12.0), 16: Pair(1.0, 0.2, 0.2)}
    pair_plot(BenchResult("dense", "packed", "bfloat16", 1, "AVX512", 1, ratios, 20, Pair(1.0, 1.0, 1.0)))
    assert len(figures) >= 9
    for figure in figures:
        assert min(sizes_of_text(figure)) / 72 * PHONE / figure.get_figwidth() >= 12
        assert not runs_out(figure), [axes.get_xlabel() for axes in figure.axes]


def test_blocks_are_counted_in_whole_numbers(figures, tmp_path):
    write_run_report(prune_model(make_model("llama"), make_tokens(), PruneConfig("wanda")), tmp_path / "page.html")
    by_block = [axes for figure in figures for axes in figure.axes if axes.get_xlabel() == "block"]
    assert len(by_block) == 3
    assert all(tick == int(tick) for axes in by_block for tick in axes.get_xticks())


def test_an_equal_share_of_zeros_has_no_plot():
    def shown(*shares):
        return blocks_plot({("ace", ""): [BlockFigures(str(i), share, 0.1, 0.9) for i, share in enumerate(shares)]})[1]

    assert shown(0.5, 0.5) == "Output cosine by block."
    assert shown(0.5, 0.6) == "Output cosine and share of zeros by block."


def test_a_plot_shows_its_figures():
    """Different data give different images, the same data the same image."""

    def course(*cosines):
        return {("ace", ""): [BlockFigures(str(index), 0.5, 0.1, cosine) for index, cosine in enumerate(cosines)]}

    assert blocks_plot(course(0.9, 0.8)) == blocks_plot(course(0.9, 0.8))
    assert blocks_plot(course(0.9, 0.8, 0.7)) != blocks_plot(course(0.9, 0.7, 0.8))


def test_settings_in_settings_have_lines_of_their_own():
    table = Table.of_settings({"versions": {"torch": "2"}, "healing": {"text": {"source": "self"}, "tokens": 8}})
    assert table.lines == [["versions", "torch 2"], ["healing: text", "source self"], ["healing: tokens", "8"]]


def test_pareto_front():
    points = [(3, 5.0), (1, 9.0), (2, 9.5), (4, 5.0), (5, 1.0), (1, 10.0)]
    assert pareto_front(points) == [(1, 9.0), (3, 5.0), (5, 1.0)]


def test_without_matplotlib(monkeypatch, tmp_path, results):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install matplotlib"):
        check_report(tmp_path / "page.html")
    with pytest.raises(InputError, match="needs matplotlib"):
        write_study_report(results, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "no/such/folder/page.html"])
def test_a_report_that_cannot_be_written(tmp_path, name):
    with pytest.raises(InputError, match="report must be a file"):
        check_report(tmp_path / name)
