"""The paper's experiments by name: the list, the tables without a run, and one experiment run on a tiny model."""

import pytest
import torch
from helpers import script
from tiny_models import make_model, make_tokenizer

from ace_ext.compare.journal import RUNS_NAME, read_results
from ace_ext.compare.tables import rows
from ace_ext.pruning.method import parse_list

SCRIPT = "benchmarks/paper_tables.py"


@pytest.fixture(scope="module")
def paper():
    return script(SCRIPT)


def lines_of(table):
    """Cells of a markdown table's body by method and zeros."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return cells[0], {tuple(line[:2]): line[2:] for line in cells[2:]}


def test_list_names_every_experiment(paper, capsys):
    assert paper.main(["--list"]) == 0
    out = capsys.readouterr().out
    sizes = [f"opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b")]
    names = [
        f"{model}-ctx2048" for model in ("llama-7b", "llama-13b", "llama-2-7b", "llama-2-13b", "llama-3-8b", *sizes)
    ]
    assert set(names) | {"llama-2-7b-ctx4096", "llama-2-13b-ctx4096", "llama-3-8b-ctx4096"} == set(paper.EXPERIMENTS)
    assert all(f"\n{name} " in f"\n{out}" for name in paper.EXPERIMENTS)


def test_methods_and_published_figures_have_known_names(paper):
    labels = {method.label for method in parse_list(paper.METHODS)}
    assert paper.GROUPS.keys() <= labels
    for name, published in paper.PUBLISHED.items():
        assert name in paper.EXPERIMENTS
        assert {method for method, _ in published.figures} <= labels | {"dense"}
        assert {amount for method, amount in published.figures if method != "dense"} <= set(paper.AMOUNTS)


def test_tables_without_a_run_hold_published_figures_only(paper, tmp_path, capsys):
    assert paper.main(["--table", str(tmp_path)]) == 0
    parts = capsys.readouterr().out.split("### ")[1:]
    assert [part.partition(":")[0] for part in parts] == list(paper.EXPERIMENTS)
    filled = {part.partition(":")[0]: lines_of(part)[1] for part in parts}
    assert filled["llama-2-7b-ctx4096"][("published-wanda", "2:4")] == ["11.02", "", "", "", ""]
    assert filled["llama-3-8b-ctx2048"][("dense", "0 %")] == ["6.14", "", "", "", ""]
    assert filled["opt-125m-ctx2048"] == {("dense", "0 %"): ["", "", "", "", ""]}


def test_an_experiment_runs_on_a_tiny_model(paper, tmp_path, capsys):
    make_model("llama", torch.bfloat16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    folder = tmp_path / "results" / "llama-2-7b-ctx4096"
    typed = ["--run", "llama-2-7b-ctx4096", "--model", tmp_path / "model", "--output", folder, "--device", "cpu"]
    typed += ["--calibration", text, "--text", text, "--dtype", "auto", "--context", 16]
    typed += [
        "--lengths",
        "4x8,4x16",
        "--amounts",
        "0.5,2:4",
        "--methods",
        "magnitude; published-wanda; ace",
    ]
    assert paper.main(list(map(str, typed))) == 0
    table = capsys.readouterr().out
    head, body = lines_of(table)
    assert head == ["method", "zeros", "published", "measured, 4x8", "measured, 4x16"]
    results = read_results(folder / RUNS_NAME)
    measured = {(row.method, row.amount_name, row.length): row.perplexity[str(text)].mean for row in rows(results)}
    assert len(measured) == 3 * 2 * 2
    for (method, zeros, length), value in measured.items():
        assert body[(method, zeros)][1 + ["4x8", "4x16"].index(length)] == f"{value:.2f}"
    assert body[("published-wanda", "50 %")][0] == "6.42"
    assert body[("ace", "50 %")][0] == ""
    assert body[("published-sparsegpt", "4:8")] == ["8.12", "", ""]
    assert (folder / "report.html").is_file()
    paper.main(["--table", str(tmp_path / "results")])
    assert table in capsys.readouterr().out


def test_a_run_needs_a_model(paper, capsys):
    assert paper.main(["--run", "llama-7b-ctx2048"]) == 2
    assert "--run needs --model: a folder with huggyllama/llama-7b" in capsys.readouterr().err


def test_tables_of_a_folder_that_is_not_there(paper, tmp_path, capsys):
    assert paper.main(["--table", str(tmp_path / "nowhere")]) == 2
    assert "nowhere' is not a folder" in capsys.readouterr().err
