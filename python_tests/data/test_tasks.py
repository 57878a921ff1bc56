"""Downstream tasks: ``compare --tasks``, and lm-eval on dense and packed output folders, on a task in a local file.

What needs lm-eval is in ``make nightly``, which installs it: it brings sixty packages.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from folders import call, prune, save_dense

from ace_ext import InputError, load_packed
from ace_ext.cli.main import build_parser
from ace_ext.compare.journal import RUNS_NAME
from ace_ext.data import tasks as tasks_module
from ace_ext.data.tasks import Tasks, TaskScore
from ace_ext.models.loading import load_model
from ace_ext.packed.packing import pack

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
TASK = """
task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``dense``, ``out`` pruned from it, ``packed``, and ``tasks`` with a task of twelve questions."""
    place = tmp_path_factory.mktemp("tasks")
    prune(save_dense(place / "dense"), place / "out")
    pack(place / "out", place / "packed", "bitmap")
    (place / "tasks").mkdir()
    lines = (
        {"question": " ".join(WORDS[i % 5 : i % 5 + 4]), "choices": [WORDS[(i + 4) % 9], WORDS[(i + 2) % 9]]}
        for i in range(12)
    )
    text = "".join(json.dumps({**line, "answer": number % 2}) + "\n" for number, line in enumerate(lines))
    (place / "tasks" / "next.jsonl").write_text(text)
    (place / "tasks" / "next.yaml").write_text(TASK.format(file=place / "tasks" / "next.jsonl"))
    return place


def options(place, *more):
    text = place / "text.txt"
    start = ["compare", "--model", place / "dense", "--device", "cpu", "--calibration", text, "--texts", text]
    return [*start, "--nsamples", 4, "--seqlen", 16, "--eval-seqlen", 16, "--methods", "wanda; magnitude", *more]


# Without lm-eval


class Fake:
    """lm-eval's place is taken: accuracy is the number of calls, over ten."""

    def __init__(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr(tasks_module, "_harness", lambda: SimpleNamespace(__version__="0"))
        monkeypatch.setattr(Tasks, "check", lambda tasks: None)
        monkeypatch.setattr(Tasks, "scores", lambda tasks, model, tokenizer: self.score(tasks))

    def score(self, tasks):
        self.calls += 1
        return {name: TaskScore("acc", self.calls / 10, 12, 0.05) for name in tasks.names}


def test_scores_stand_beside_perplexity(place, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    fake = Fake(monkeypatch)
    output = tmp_path / "results"
    arguments = options(place, "--tasks", "one,two", "--seeds", "0,1", "--output", output)
    status, out, error = call(capsys, *arguments)
    assert status == 0, error
    head, dense, wanda, magnitude, *notes = out.splitlines()
    assert head.split("  ")[-1].strip() == "peak GiB"
    assert "one (acc)" in head
    assert "two (acc)" in head
    assert dense.split()[3:] == [dense.split()[3], "0.100", "(0.050)", "0.100", "(0.050)"]
    assert "0.300 ± 0.141 (0.050)" in wanda  # of 0.2 and 0.4
    assert "0.400 ± 0.141 (0.050)" in magnitude  # of 0.3 and 0.5
    assert "Scores of tasks by lm-eval 0, with as many samples: 12 of one, 12 of two. In paren" in " ".join(notes)
    data = json.loads((output / "results.json").read_text())
    assert data["dense_tasks"]["one"] == {"metric": "acc", "value": 0.1, "samples": 12, "stderr": 0.05}
    assert data["rows"][0]["tasks"]["two"]["mean"] == pytest.approx(0.3)
    assert [run["tasks"]["one"]["value"] for run in data["runs"]] == [0.2, 0.3, 0.4, 0.5]
    page = (output / "report.html").read_text()
    assert '<th class="number">one (acc)</th>' in page
    # a second call reads all from the record
    status, again, error = call(capsys, *arguments)
    assert (status, again, fake.calls) == (0, out, 5)
    status, _, error = call(capsys, *options(place, "--output", output, "--tasks", "one"))
    assert status == 2
    assert "was recorded with other settings: tasks was" in error


def test_a_comparison_without_tasks_has_no_settings_of_them(place, tmp_path, capsys):
    """So records of earlier versions are continued."""
    pytest.importorskip("matplotlib")
    assert call(capsys, *options(place, "--output", tmp_path / "r"))[0] == 0
    first, dense, *_ = (json.loads(line) for line in (tmp_path / "r" / RUNS_NAME).read_text().splitlines())
    assert not [name for name in first["settings"] if "task" in name or name == "lm_eval"]
    assert dense["tasks"] == {}


def test_without_lm_eval_it_says_what_to_install(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, error = call(capsys, *options(place, "--tasks", "arc_easy"))
    assert status == 2
    assert "tasks need lm-eval: pip install 'lm-eval[hf]'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "a,a"), "tasks must each be given once"),
        (("--tasks", "a", "--task-limit", "0"), "task-limit must be at least 1"),
        (("--tasks", "a", "--task-path", "nowhere"), "task-path must be a folder"),
        (("--task-limit", "3"), "give --tasks too"),
        (("--task-path", "."), "give --tasks too"),
    ],
)
def test_bad_arguments(arguments, message, place, capsys):
    status, _, error = call(capsys, *options(place, *arguments))
    assert status == 2
    assert message in error


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.7}, TaskScore("acc", 0.5, 3, 0.1)),
        ({"acc_norm,none": 0.7, "acc_norm_stderr,none": "N/A"}, TaskScore("acc_norm", 0.7, 3)),
        ({"alias": "x", "word_perplexity,none": 20.5, "sample_len": 3}, TaskScore("word_perplexity", 20.5, 3)),
        (
            {"exact_match,strict-match": 0.2, "exact_match,flexible-extract": 0.3},
            TaskScore("exact_match", 0.2, 3),
        ),
    ],
)
def test_the_figure_of_a_task(values, expected):
    found = {"results": {"x": values}, "n-samples": {"x": {"original": 9, "effective": 3}}}
    assert tasks_module._score("x", found) == expected


def test_the_samples_of_a_group_are_those_of_its_tasks():
    counts = {"a": {"effective": 3}, "b": {"effective": 4}}
    found = {"results": {"x": {"acc,none": 1.0}}, "n-samples": counts, "group_subtasks": {"x": ["a", "b"]}}
    assert tasks_module._score("x", found).samples == 7
    with pytest.raises(InputError, match="reports no score for 'y'"):
        tasks_module._score("y", found)


def test_a_change_of_a_task_is_another_setting(place, monkeypatch):
    Fake(monkeypatch)
    tasks = Tasks(("next_word",), place / "tasks")
    before = tasks.settings()
    assert sorted(before["task_files"]) == ["next.jsonl", "next.yaml"]
    text = (place / "tasks" / "next.jsonl").read_text()
    (place / "tasks" / "next.jsonl").write_text(text + "\n")
    assert tasks.settings() != before
    (place / "tasks" / "next.jsonl").write_text(text)
    assert tasks.settings() == before


def test_child_processes_of_lm_eval_are_silent(capfd):
    """lm-eval calls git, which prints ``fatal: not a git repository`` outside of one."""
    child = [sys.executable, "-c", "import os; os.write(2, b'fatal')"]
    with tasks_module._quiet():
        subprocess.run(child, check=True)
    assert capfd.readouterr().err == ""
    subprocess.run(child, check=True)
    assert capfd.readouterr().err == "fatal"


def test_help_names_the_tasks(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["compare", "--help"])
    assert "--task-path" in capsys.readouterr().out


# With lm-eval


@pytest.mark.nightly
def test_compare_by_lm_eval(place, tmp_path, capsys):
    arguments = options(place, "--tasks", "next_word", "--task-path", place / "tasks", "--task-limit", 8, "--json")
    status, out, error = call(capsys, *arguments)
    assert status == 0, error
    data = json.loads(out)
    assert data["dense_tasks"]["next_word"]["samples"] == 8
    by_hand = Tasks(("next_word",), place / "tasks", 8)
    loaded = load_model(str(place / "dense"))
    assert (
        by_hand.scores(loaded.model, loaded.tokenizer)["next_word"].value == data["dense_tasks"]["next_word"]["value"]
    )
    assert len(data["runs"]) == 2
    status, _, error = call(capsys, *options(place, "--tasks", "nothing", "--task-path", place / "tasks"))
    assert status == 2
    assert "lm-eval knows no task 'nothing'" in error
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "next.yaml").write_text(TASK.format(file=bad / "missing.jsonl"))
    status, _, error = call(capsys, *options(place, "--tasks", "next_word", "--task-path", bad))
    assert status == 2
    assert "tasks next_word could not be evaluated" in error


@pytest.mark.nightly
def test_dense_and_packed_folders_score_the_same(place):
    """By the commands of docs/sharing.md."""
    found = {}
    alone = {**os.environ, "HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # else datasets tells the hub of each use
    for name in ("out", "packed"):
        start = "import ace_ext; ace_ext.register(); from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
        model = ["--model", "hf", "--model_args", f"pretrained={place / name}", "--device", "cpu"]
        task = [
            "--tasks",
            "next_word",
            "--include_path",
            str(place / "tasks"),
            "--output_path",
            str(place / f"{name}.d"),
        ]
        command = [sys.executable, "-c", start, *model, *task]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=alone, check=False)
        assert done.returncode == 0, done.stderr
        (file,) = (place / f"{name}.d").rglob("results*.json")
        found[name] = json.loads(file.read_text())["results"]["next_word"]["acc,none"]
    tasks = Tasks(("next_word",), place / "tasks")
    loaded = load_model(str(place / "out"))
    found["in memory"] = tasks.scores(loaded.model, loaded.tokenizer)["next_word"].value
    found["load_packed"] = tasks.scores(load_packed(place / "packed"), loaded.tokenizer)["next_word"].value
    assert len(set(found.values())) == 1
