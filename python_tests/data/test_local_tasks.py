"""Tasks for lm-eval that are made from the bundled text: what their samples are, and scores of a tiny model."""

import json
import re

import pytest
from folders import TEXT, call, save_dense

from ace_ext import InputError
from ace_ext.data import local_tasks
from ace_ext.data.bundled import bundled_text
from ace_ext.data.local_tasks import CHOICES, SAMPLES, TASKS, samples_sha256
from ace_ext.data.tasks import Tasks


@pytest.fixture(scope="module")
def samples():
    return {name.removeprefix("local_"): make() for name, make in TASKS.items()}


def true_of(sample: dict) -> str:
    return sample["choices"][sample["answer"]]


def test_there_are_enough_and_they_are_always_the_same(samples):
    for name, found in samples.items():
        assert 100 < len(found) <= SAMPLES, name
        assert len({json.dumps(sample) for sample in found}) == len(found), name
        assert found == TASKS[f"local_{name}"](), name
    assert len({samples_sha256(name) for name in TASKS}) == len(TASKS)


def test_choices_differ_and_the_true_one_has_no_fixed_place(samples):
    for name in ("article", "function", "arithmetic", "recall"):
        places = [sample["answer"] for sample in samples[name]]
        assert all(len(set(sample["choices"])) == CHOICES for sample in samples[name]), name
        assert all(places.count(place) > len(places) / 8 for place in range(CHOICES)), name


def test_the_last_word_is_in_the_passage(samples):
    text = " ".join(" ".join(bundled_text("held-out")).split())
    for sample in samples["last_word"]:
        assert sample["target"].strip() in re.findall("[A-Za-z]+", sample["context"])
        assert sample["context"] + sample["target"] in text


def test_the_true_continuation_follows(samples):
    prose = [" ".join(document.split()) for document in bundled_text("held-out", "encyclopedia", "news", "dialogue")]
    for sample in samples["article"]:
        homes = [document for document in prose if sample["context"] in document]
        follows = [[sample["context"] + choice in document for choice in sample["choices"]] for document in homes]
        assert all(found.index(True) == sample["answer"] and sum(found) == 1 for found in follows)
        assert follows
    code = [
        "\n".join(line for line in document.splitlines() if line.strip() and not line.lstrip().startswith("#"))
        for document in bundled_text("held-out", "code")
    ]
    assert all(any(s["context"] + true_of(s) in document for document in code) for s in samples["function"])


def test_results_are_right(samples):
    for sample in samples["arithmetic"]:
        for line in (sample["context"] + true_of(sample)).splitlines():
            left, right = line.split(" = ")
            first, sign, second = left.split()
            results = {"+": int(first) + int(second), "-": int(first) - int(second), "*": int(first) * int(second)}
            assert results[sign] == int(right) >= 0


def test_values_belong_to_their_keys(samples):
    for sample in samples["recall"]:
        *pairs, question = sample["context"].splitlines()
        values = dict(line.rstrip(".").rsplit(" ", 1) for line in pairs)
        assert len(values) == 16
        assert values[question] == true_of(sample).strip()
        assert {choice.strip() for choice in sample["choices"]} <= set(values.values())


def test_one_name_stands_for_all():
    assert Tasks(("local",)).names == tuple(TASKS)
    assert Tasks(("a", "local")).names == ("a", *TASKS)
    with pytest.raises(InputError, match="must each be given once"):
        Tasks(("local", "local_recall"))


def test_a_change_of_the_samples_is_another_setting(monkeypatch):
    before = samples_sha256("local_recall")
    monkeypatch.setattr(local_tasks, "_THINGS", ("bag", *local_tasks._THINGS[1:]))
    assert samples_sha256("local_recall") != before


@pytest.mark.nightly
def test_compare_by_lm_eval(tmp_path, capsys):
    dense, text = save_dense(tmp_path / "dense"), tmp_path / "text.txt"
    text.write_text(TEXT)
    start = ("compare", "--model", dense, "--calibration", text, "--texts", text, "--nsamples", 4, "--seqlen", 16)
    command = (*start, "--eval-seqlen", 16, "--methods", "magnitude", "--tasks", "local", "--task-limit", 8)
    status, printed, error = call(capsys, *command)
    assert status == 0, error
    head, *lines = printed.splitlines()
    assert all(f"{name} (acc)" in head for name in TASKS)
    assert all(len(re.findall(r"\d\.\d{3} \(\d\.\d{3}\)", line)) == len(TASKS) for line in lines[:2])
    scores = json.loads(call(capsys, *command, "--json")[1])["dense_tasks"]
    assert {name: score["samples"] for name, score in scores.items()} == dict.fromkeys(TASKS, 8)
    assert all(0 <= score["value"] <= 1 for score in scores.values())
