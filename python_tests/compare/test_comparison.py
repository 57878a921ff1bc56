"""Comparisons on a tiny model, from command-line arguments: the grid, the journal, continuing, and the tables."""

import argparse
import dataclasses
import json
import math
import statistics

import pytest
import torch
from folders import full_disk
from tiny_models import make_model, make_tokenizer

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.cli import compare as verb
from ace_ext.cli.compare import study_from
from ace_ext.compare import bench, grid, runner
from ace_ext.compare.bench import restore
from ace_ext.compare.grid import Grid
from ace_ext.compare.journal import RUNS_NAME, Journal, Results, read_results
from ace_ext.compare.tables import Spread, short_names
from ace_ext.data.bos import BosChoice
from ace_ext.data.perplexity import perplexity
from ace_ext.data.windows import evaluation_tokens, load_windows
from ace_ext.models.loading import load_model
from ace_ext.pruning.method import PRESETS, method_of
from ace_ext.reporting import plots

WORDS = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dense model and two texts."""
    path = tmp_path_factory.mktemp("study")
    make_model("llama-tied", torch.bfloat16).save_pretrained(path / "dense")
    make_tokenizer().save_pretrained(path / "dense")
    (path / "text.txt").write_text(f"{WORDS} " * 40)
    (path / "other.txt").write_text(" ".join(reversed(WORDS.split())) * 40)
    return path


def parse(place, *arguments, **changed):
    parser = argparse.ArgumentParser()
    verb.add(parser.add_subparsers())
    options = {"model": place / "dense", "calibration": place / "text.txt", "texts": place / "text.txt"}
    options = {**options, "device": "cpu", "methods": "wanda; ace", "lengths": "4x16", "eval-seqlen": 16, **changed}
    typed = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return parser.parse_args(["compare", *typed, *arguments])


def compare(place, *arguments, **changed):
    args = parse(place, *arguments, **changed)
    return args.action(args)


def lines(folder):
    return [json.loads(line) for line in (folder / RUNS_NAME).read_text().splitlines()]


def test_figures_are_those_of_single_runs(place, capsys):
    """Each run of the grid equals a run on a freshly loaded model that is pruned and evaluated directly."""
    text = str(place / "text.txt")
    assert compare(place, "--json", sparsities="0.5", patterns="2:4", seeds="0,1") == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["runs"]) == 2 * 2 * 2
    for run in data["runs"]:
        cell = run["cell"]
        loaded = load_model(str(place / "dense"))
        tokens = load_windows(text, loaded.tokenizer, 4, 16, cell["seed"]).tokens
        amount = {"pattern": "2:4"} if cell["amount"] == "2:4" else {"sparsity": 0.5}
        report = prune_model(loaded.model, tokens, PruneConfig(cell["method"], **amount))
        by_hand = perplexity(loaded.model, evaluation_tokens(text, loaded.tokenizer), 16, 16 * 24)
        assert run["perplexity"][text] == by_hand.to_dict()
        assert run["sparsity"] == report.sparsity
        assert [block["name"] for block in run["blocks"]] == [block.name for block in report.blocks]
        assert 0 < min(block["cosine"] for block in run["blocks"]) < 1
        assert run["seconds"] > 0
        assert run["peak_memory_bytes"] > 0


def test_rows_are_mean_deviation_and_count_over_seeds(place, capsys):
    text = str(place / "text.txt")
    compare(place, "--json", methods="ace", seeds="0,1,2")
    data = json.loads(capsys.readouterr().out)
    values = [run["perplexity"][text]["perplexity"] for run in data["runs"]]
    assert len(set(values)) > 1
    (row,) = data["rows"]
    expected = {"mean": statistics.fmean(values), "deviation": statistics.stdev(values), "count": 3}
    assert row["perplexity"][text] == pytest.approx(expected)


def test_a_method_that_only_quantizes_runs_once():
    methods = tuple(map(method_of, ("wanda", "quantize(bits=8)", "admm + quantize")))
    cells = [(cell.method, cell.amount) for cell, _ in Grid(methods, ("0.5", "2:4")).cells()]
    assert cells == [
        ("quantize(bits=8)", "0"),
        ("wanda", "0.5"),
        ("admm + quantize", "0.5"),
        ("wanda", "2:4"),
        ("admm + quantize", "2:4"),
    ]


def test_grid_of_everything(place, tmp_path, capsys):
    changed = {"calibration": f"{place / 'text.txt'},self", "texts": f"{place / 'text.txt'},{place / 'other.txt'}"}
    compare(place, sparsities="0.25,0.5", patterns="2:4", lengths="2x8,4x16", **changed)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["method", "zeros", "calibration", "length"]
    body = out[1 : out.index("")]
    assert len(body) == 1 + 2 * 3 * 2 * 2
    assert body[0].split()[:3] == ["dense", "0", "%"]
    assert len({len(line) for line in out[: out.index("")][1:]}) == 2  # the dense line ends early, all others align


def test_a_methods_label_is_what_was_written(place, capsys):
    compare(place, "--json", methods="balanced( iterations=2 ); wanda+swaps;  published-sparsegpt", patterns="2:4")
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["cell"]["method"], run["config"]["method"], run["config"]["preset"]) for run in runs] == [
        ("balanced(iterations=2)", "admm(iterations=2)", None),
        ("wanda + swaps", "wanda + swaps", None),
        ("published-sparsegpt", "collect(order=block) + obs(gram=plain)", "published-sparsegpt"),
    ]


def test_a_text_of_calibration_and_evaluation_is_named(place, capsys):
    compare(place, methods="magnitude", texts=f"{place / 'text.txt'},{place / 'other.txt'}")
    compare(place, methods="magnitude", texts=place / "other.txt")
    seen = [line for line in capsys.readouterr().out.splitlines() if "was not held out" in line]
    assert len(seen) == 1
    assert seen[0].startswith(str(place / "text.txt"))


def test_markdown(place, capsys):
    compare(place, "--markdown", methods="magnitude")
    head, line, dense, row = [line.split("|") for line in capsys.readouterr().out.splitlines()[:4]]
    assert all(len(cells) == 8 and cells[0] == cells[-1] == "" for cells in (head, line, dense, row))
    assert [set(cell) for cell in line[1:-1]] == [set(":-")] * 6
    assert [cell.strip() for cell in dense[1:3]] == ["dense", "0 %"]
    assert [cell.strip() for cell in row[1:3]] == ["magnitude", "50 %"]


def test_a_repeated_command_does_only_what_is_missing(place, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    compare(place, output=folder, methods="wanda")
    first = lines(folder)
    compare(place, output=folder, methods="wanda; ace", seeds="0,1")
    second = lines(folder)
    assert second[: len(first)] == first
    added = [line["run"]["cell"] for line in second[len(first) :]]
    assert sorted((cell["method"], cell["seed"]) for cell in added) == [("ace", 0), ("ace", 1), ("wanda", 1)]

    def no_load(*_):
        raise AssertionError("nothing is missing, so no model is needed")

    monkeypatch.setattr(runner, "load_model", no_load)
    capsys.readouterr()
    compare(place, "--json", output=folder, methods="wanda")
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 4


def test_a_crash_loses_no_finished_run(place, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    done = []

    def crash_at_the_second(*args, **kwargs):
        if done:
            raise RuntimeError("power cut")
        done.append(1)
        return prune_model(*args, **kwargs)

    monkeypatch.setattr(bench, "prune_model", crash_at_the_second)
    with pytest.raises(RuntimeError, match="power cut"):
        compare(place, output=folder)
    monkeypatch.undo()
    with (folder / RUNS_NAME).open("a") as file:
        file.write('{"run": {"cell": {"meth')  # a line cut off in the middle
    before = lines_until_cut(folder)
    compare(place, output=folder)
    after = lines(folder)
    assert after[: len(before)] == before
    assert [line["run"]["cell"]["method"] for line in after if "run" in line] == ["wanda", "ace"]


@pytest.mark.parametrize(("line", "remedy"), [(0, "use another folder"), (2, "remove that line to run it again")])
def test_changed_bytes_are_named(line, remedy, place, tmp_path):
    folder = tmp_path / "out"
    compare(place, output=folder)
    whole = (folder / RUNS_NAME).read_text()
    text = whole.splitlines()
    changed = text[line].replace("0", "1", 1)
    (folder / RUNS_NAME).write_text("\n".join([*text[:line], changed, *text[line + 1 :], ""]))
    with pytest.raises(InputError, match=rf"line {line + 1} of .*runs\.jsonl has changed .*checksum differs.*{remedy}"):
        compare(place, output=folder)
    if line:
        (folder / RUNS_NAME).write_text("\n".join([*text[:line], *text[line + 1 :], ""]))
        compare(place, output=folder)
        again = [run["run"]["perplexity"] for run in lines(folder) if "run" in run]
        assert sorted(map(str, again)) == sorted(
            str(json.loads(run)["run"]["perplexity"]) for run in text if '"run"' in run
        )


def test_a_record_of_an_earlier_version_is_continued(place, tmp_path):
    """The old format has no checksums, and none are added."""
    folder = tmp_path / "out"
    compare(place, output=folder, methods="wanda")
    old = [{key: value for key, value in line.items() if key != "sha256"} for line in lines(folder)]
    old[0]["format"] = 1
    (folder / RUNS_NAME).write_text("".join(json.dumps(line) + "\n" for line in old))
    compare(place, output=folder)
    assert [line.keys() for line in lines(folder)][-1] == {"run"}
    assert lines(folder)[: len(old)] == old


def lines_until_cut(folder):
    return [json.loads(line) for line in (folder / RUNS_NAME).read_text().splitlines()[:-1]]


def test_output_holds_report_and_plots(place, tmp_path):
    folder = tmp_path / "out"
    compare(place, output=folder, seeds="0,1")
    files = {
        "runs.jsonl",
        "results.json",
        "report.html",
        "sparsity.png",
        "calibration.png",
        "seconds.png",
        "blocks.png",
    }
    assert {file.name for file in folder.iterdir()} == files
    data = json.loads((folder / "results.json").read_text())
    assert [run["cell"] for run in data["runs"]] == [line["run"]["cell"] for line in lines(folder) if "run" in line]


def test_without_matplotlib_nothing_is_begun(place, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", None)
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install matplotlib"):
        compare(place, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_by_name(place, tmp_path, monkeypatch, threads):
    folder = tmp_path / "out"
    compare(place, output=folder)
    monkeypatch.setattr(runner, "load_model", None)  # refused before anything is loaded
    before = (folder / RUNS_NAME).read_bytes()
    with pytest.raises(
        InputError, match=r"recorded with other settings: eval_seqlen was 16, now 8; use another output folder"
    ):
        compare(place, output=folder, **{"eval-seqlen": 8})
    with pytest.raises(InputError, match=r"texts\..*other.txt was null"):
        compare(place, output=folder, texts=place / "other.txt")
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        with pytest.raises(InputError, match=r"recorded with other settings: instructions was .*, now \"another\""):
            compare(place, output=folder)
    threads(torch.get_num_threads() + 1)
    with pytest.raises(InputError, match=r"recorded with other settings: threads was \d+, now \d+"):
        compare(place, output=folder)
    assert (folder / RUNS_NAME).read_bytes() == before


def test_other_contents_under_the_same_name_are_refused(place, tmp_path, monkeypatch):
    folder, text, model = tmp_path / "out", tmp_path / "text.txt", tmp_path / "model"
    text.write_text(WORDS * 20)
    make_model("llama", seed=1).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    monkeypatch.setitem(PRESETS, "fast", "ace")
    compare(place, output=folder, calibration=text, model=model, methods="fast; ace")
    monkeypatch.setitem(PRESETS, "fast", "admm")
    with pytest.raises(
        InputError, match=r"recorded with other settings of fast: method was \"ace\", now \"admm\"; use"
    ):
        compare(place, output=folder, calibration=text, model=model, methods="fast")
    monkeypatch.undo()
    make_model("llama", seed=2).save_pretrained(model)
    for missing in (0, 1):  # also if no run is missing, so that no model is loaded
        with pytest.raises(
            InputError, match=r"recorded with other settings: files\.model\.safetensors was .*; use another output"
        ):
            compare(place, output=folder, calibration=text, model=model, methods="ace", seeds=missing)
    with monkeypatch.context() as patch:
        patch.setattr(grid, "_model_files", lambda _: read_results(folder / RUNS_NAME).settings["files"])
        with pytest.raises(InputError, match=r"has different weights than the recorded runs in .*; use another output"):
            compare(place, output=folder, calibration=text, model=model, methods="ace", seeds=5)
    make_model("llama", seed=1).save_pretrained(model)
    text.write_text(WORDS * 21)
    with pytest.raises(InputError, match=r"recorded with a different text in .*text\.txt; use"):
        compare(place, output=folder, calibration=text, model=model)


def test_a_comparison_that_ended_in_its_first_line_starts_again(place, tmp_path):
    whole, full, killed = tmp_path / "whole", tmp_path / "full", tmp_path / "killed"
    compare(place, output=whole)
    with full_disk(), pytest.raises(InputError, match="No space"):
        compare(place, output=full)
    assert list(full.iterdir()) == []
    killed.mkdir()
    (killed / f".{RUNS_NAME}.part").write_bytes((whole / RUNS_NAME).read_bytes()[:9])
    expected = read_results(whole / RUNS_NAME)
    for folder in (full, killed):
        compare(place, output=folder)
        again = read_results(folder / RUNS_NAME)
        assert (again.settings, again.dense) == (expected.settings, expected.dense)
        assert [run.perplexity for run in again.runs] == [run.perplexity for run in expected.runs]
        assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}


def test_a_journal_without_results_is_begun_again(tmp_path):
    """It is left by a comparison that was refused before it measured anything."""
    for seqlen in (4096, 64):
        Journal(tmp_path / "begun", {"seqlen": seqlen}).close()
    assert read_results(tmp_path / "begun" / RUNS_NAME) == Results({"seqlen": 64})


def test_a_comparison_that_another_one_replaced_writes_nothing(tmp_path):
    first = Journal(tmp_path / "begun", {"seqlen": 64})
    first.close()  # as on a file system without locks
    Journal(tmp_path / "begun", {"seqlen": 128}).close()
    before = (tmp_path / "begun" / RUNS_NAME).read_bytes()
    with pytest.raises(InputError, match="was begun again by another comparison"):
        first.add_dense({}, "", BosChoice("never", None, "as set"), {})
    assert (tmp_path / "begun" / RUNS_NAME).read_bytes() == before


def test_a_second_comparison_is_refused_while_one_writes(place, tmp_path, monkeypatch):
    """Both would record the same runs, and no comparison reads a journal that has a run twice."""
    whole, folder, refused = tmp_path / "whole", tmp_path / "out", []
    compare(place, output=whole)

    def meanwhile(*arguments, **named):
        with pytest.raises(InputError, match=r"out' is being written by another comparison; wait for it, or give"):
            compare(place, output=folder)
        refused.append(None)
        return prune_model(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(bench, "prune_model", meanwhile)
        compare(place, output=folder)
    assert len(refused) == 2
    compare(place, output=folder)  # nothing is missing, and nothing is recorded twice
    expected, found = (read_results(path / RUNS_NAME) for path in (whole, folder))
    assert [run.perplexity for run in found.runs] == [run.perplexity for run in expected.runs]


def test_a_run_that_is_recorded_twice_is_no_second_seed(place, tmp_path):
    compare(place, output=tmp_path / "twice")
    path = tmp_path / "twice" / RUNS_NAME
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    with pytest.raises(InputError, match=r"is not a journal .*: it has two lines of .*, seed \d"):
        read_results(path)


def test_a_strange_folder_is_left_alone(place, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="exists and does not hold a comparison"):
        compare(place, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    (tmp_path / "letter.txt").rename(tmp_path / RUNS_NAME)
    with pytest.raises(InputError, match="is not a journal of ace-prune compare"):
        compare(place, output=tmp_path)
    assert (tmp_path / RUNS_NAME).read_text() == "dear"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": "wonda"}, "method must be made of .*; did you mean wanda?"),
        ({"methods": "wanda,ace"}, "method must be made of .*; separate methods by ;"),
        ({"methods": "wanda; ace; wanda"}, "methods must each be given once"),
        ({"methods": " ; "}, "methods must name at least one of"),
        (
            {"methods": "wanda(iterations=30)"},
            "wanda has no option iterations: iterations is an option of admm and alps",
        ),
        ({"methods": "allocate + wanda", "patterns": "2:4"}, "method 'allocate \\+ wanda': allocate cannot move"),
        ({"sparsities": "half"}, r"sparsities must be numbers from 0 to 1 \(got 'half'\)"),
        ({"sparsities": "1.5"}, "method 'wanda': sparsity must be a share from 0 to 1"),
        ({"sparsities": "0.5,0.5"}, "amounts must be at least one, each given once"),
        ({"patterns": "5:4"}, "pattern must be N:M"),
        ({"lengths": "128"}, "lengths must be nsamples x seqlen"),
        ({"lengths": "4x1"}, "at least 1 sample of at least 2 tokens"),
        ({"lengths": "axb"}, r"lengths must be whole numbers from 0 \(got 'a'\)"),
        ({"lengths": ""}, "lengths must be at least one"),
        ({"seeds": "-1"}, "seeds must be whole numbers from 0"),
        ({"eval-windows": "0"}, "at least 1 window"),
        ({"texts": "self"}, "neither a file nor a known name"),
        ({"calibration": "no-such.txt"}, "no-such.txt"),
        ({"methods": "collect(batch_tokens=0) + ace"}, "batch_tokens must be a whole number of at least 1"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_the_model_is_loaded(place, tmp_path, changed, message, monkeypatch):
    monkeypatch.setattr(runner, "load_model", None)
    folder = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        compare(place, output=folder, **changed)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patterns": "2:4,5:11"}, "pattern 5:11 needs columns in whole groups of 11"),
        ({"lengths": "4x16,4x129"}, "seqlen: 129 found, but the model has 128 positions"),
        ({"skip": "no-such"}, "skip 'no-such' matches no weight"),
    ],
    ids=str,
)
def test_what_the_model_refuses_is_found_before_the_first_run(place, tmp_path, changed, message):
    folder = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        compare(place, output=folder, **changed)
    assert len(lines(folder)) == 1  # the settings alone


def test_json_and_markdown_exclude_each_other(place):
    with pytest.raises(InputError, match="exclude each other"):
        compare(place, "--json", "--markdown")


def test_defaults(place):
    defaults = study_from(parse(place))
    assert defaults.grid.amounts == ("0.5",)
    assert (defaults.evaluation.windows, defaults.grid.seeds) == (24, (0,))


def test_two_names_of_a_method_are_two_rows(place):
    grid = study_from(parse(place, methods="published-wanda; collect(order=block) + wanda")).grid
    assert [cell.method for cell, _ in grid.cells()] == ["published-wanda", "collect(order=block) + wanda"]
    assert [grid.bos_mode(method, cell) for cell, method in grid.cells()] == ["never", "auto"]
    grid = dataclasses.replace(grid, bos="both", calibrations=("text", "self"))
    assert [(cell.calibration, cell.method) for cell, _ in grid.cells()] == [
        ("text", "published-wanda"),
        ("text", "published-wanda with BOS"),
        ("text", "collect(order=block) + wanda"),
        ("self", "published-wanda"),
        ("self", "collect(order=block) + wanda"),
    ]
    assert [grid.bos_mode(method, cell) for cell, method in grid.cells()] == ["never", *["auto"] * 4]
    with pytest.raises(InputError, match=r"^methods must be at least one, each given once \(got balanced, balanced\)$"):
        Grid((method_of("balanced"), method_of("balanced")))


def test_restore_gives_back_every_bit():
    model = make_model("llama-tied", torch.bfloat16)
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2)
    restore(model, dense)
    assert all(torch.equal(value, dense[name]) for name, value in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_each_run_has_its_own_peak():
    from ace_ext.process_memory import peak_memory_bytes, reset_peak

    device = torch.device("cpu")
    block = torch.ones(2**29, dtype=torch.uint8)
    high = peak_memory_bytes(device)
    del block
    if not reset_peak(device):
        pytest.skip("this system does not let a process reset its peak")
    assert peak_memory_bytes(device) < high - 2**28


def test_paths_are_shortened_where_that_is_clear():
    assert short_names(["c4", "/a/x.txt", "/b/y.txt"]) == {"c4": "c4", "/a/x.txt": "x.txt", "/b/y.txt": "y.txt"}
    assert short_names(["/a/x.txt", "/b/x.txt"]) == {"/a/x.txt": "/a/x.txt", "/b/x.txt": "/b/x.txt"}


def test_spread():
    assert Spread.of([2.0]) == Spread(2.0, None, 1)
    assert str(Spread.of([2.0])) == "2.00"
    assert str(Spread.of([1.0, 3.0])) == "2.00 ± 1.41"
    broken = Spread.of([1.0, math.nan])
    assert math.isnan(broken.mean)
    assert broken.deviation is None
