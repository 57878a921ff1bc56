"""What a run may replace and what not: inputs, files of others, links and devices stay as they are."""

import json
import os
import shutil

import pytest
from folders import bad_input, call, prune, save_dense, tree, weights_bytes

from ace_ext import InputError
from ace_ext.runs.output import check_apart, check_output, read_report
from ace_ext.runs.own_files import MANIFEST_NAME, foreign_files, is_log, is_page, is_statistics
from ace_ext.runs.workspace import Workspace


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A dense model, and a folder that was pruned from it."""
    place = tmp_path_factory.mktemp("sound")
    prune(save_dense(place / "dense"), place / "out", sparsity=0.25)
    return place


@pytest.fixture
def place(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "place")


def refused(place, capsys, message, *options, output="bad", model="dense"):
    before = tree(place)
    assert message in bad_input(capsys, "run", place / model, *options, output=place / output)
    assert tree(place) == before


# Inputs and outputs apart


def test_the_input_is_never_the_output(place, capsys):
    refused(place, capsys, "overlaps an input of this run", "--overwrite", output="dense")
    (place / "link").symlink_to("dense")
    refused(place, capsys, "overlaps an input of this run", "--overwrite", output="dense", model="link")


def test_the_input_is_never_in_the_output(place, capsys):
    shutil.copytree(place / "dense", place / "out" / "checkpoint-500")
    shutil.copy(place / "text.txt", place / "out")
    refused(place, capsys, "overlaps an input", "--overwrite", output="out", model="out/checkpoint-500")
    # --calibration is the text beside the model, so in the folder too


def test_no_input_is_in_the_folder_of_the_run(place, capsys):
    shutil.copytree(place / "dense", place / ".bad.unfinished" / "model")
    shutil.copy(place / "text.txt", place / ".bad.unfinished")
    refused(place, capsys, "overlaps an input", model=".bad.unfinished/model")


def test_the_output_is_never_in_the_input(place, capsys):
    refused(place, capsys, "overlaps an input of this run", output="dense/pruned")


@pytest.mark.parametrize("option", ["--calibration", "--stats"])
def test_other_inputs_in_the_output(option, place, capsys):
    prune(place / "dense", place / "other", {"save_stats": place / "saved.zip"})
    for name in ("text.txt", "saved.zip"):
        shutil.copy(place / name, place / "out")
    file = {"--calibration": "text.txt", "--stats": "saved.zip"}[option]
    refused(
        place, capsys, "overlaps an input", "--overwrite", option, place / "out" / file,
        output="out",
    )  # fmt: skip


def test_names_that_are_nowhere_are_apart(tmp_path):
    check_apart(tmp_path / "out", "org/model", None, "wiki-mini", "~nobody/model")


# Only what this program wrote


def test_a_file_of_someone_else_stays(place, capsys):
    (place / "out" / "notes.txt").write_text("mine")
    refused(place, capsys, "holds 'notes.txt', which ace-prune did not write", "--overwrite", output="out")
    (place / "out" / "notes.txt").unlink()
    (place / "out" / "sub").mkdir()
    (place / "out" / "sub" / "link").symlink_to(place / "text.txt")
    refused(place, capsys, "holds 'sub/link', which ace-prune did not write", "--overwrite", output="out")
    shutil.rmtree(place / "out" / "sub")
    prune(place / "dense", place / "out", {"overwrite": True})


def test_changed_weights_stay(place, capsys):
    """Such as those of a training that went on in the folder."""
    with (place / "out" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    refused(place, capsys, "holds 'model.safetensors', which", "--overwrite", output="out")


def test_another_model_stays(place, capsys):
    shutil.copytree(place / "dense", place / "other")
    refused(place, capsys, f"has no {MANIFEST_NAME}", "--overwrite", output="other")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"format": 1, "files": [], "fingerprint": {}}', "[" * 100000]
)
def test_a_damaged_manifest_is_none(text, place, capsys):
    (place / "out" / MANIFEST_NAME).write_text(text)
    refused(place, capsys, f"has no {MANIFEST_NAME}", "--overwrite", output="out")


def test_the_manifest_names_every_file(place):
    assert foreign_files(place / "out") == []
    named = json.loads((place / "out" / MANIFEST_NAME).read_text())["files"]
    assert {*named, MANIFEST_NAME} == {file.name for file in (place / "out").iterdir()}


def test_an_empty_folder_is_replaced(place):
    (place / "new").mkdir()
    _, out = prune(place / "dense", place / "new", {"overwrite": True})
    assert weights_bytes(out)


def test_a_pruned_folder_is_pruned_further(place):
    """Its manifest is not that of the new one."""
    prune(place / "out", place / "twice", sparsity=0.75)
    assert foreign_files(place / "twice") == []
    prune(place / "out", place / "twice", {"overwrite": True}, sparsity=0.5)
    assert read_report(place / "twice").sparsity == 0.5


# The output's name


@pytest.mark.parametrize("name", ["..", ".", "dense/..", "", "/"])
def test_an_output_without_a_name(name, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = tree(place)
    text = ["--calibration", "text.txt", "--nsamples", 4, "--seqlen", 8]
    status, _, error = call(capsys, "run", "--model", "dense", "--output", name, *text)
    assert status == 2
    assert "output must end in the name of a folder" in error
    assert tree(place) == before


@pytest.mark.parametrize("name", ["~nobody-of-this-name/out", "n" * 250, "n" * 300, "text.txt/out"])
def test_an_output_that_cannot_be_made(name, place, capsys, monkeypatch):
    before = tree(place)
    monkeypatch.chdir(place)
    assert bad_input(capsys, "run", place / "dense", "--output", name)
    assert tree(place) == before


@pytest.mark.parametrize("target", ["nowhere", "out"])
def test_a_link_as_output(target, place, capsys):
    (place / "link").symlink_to(target)
    refused(place, capsys, "is a link; give a folder's own name", "--overwrite", output="link")


# The folder of the run


@pytest.mark.parametrize("make", ["link", "file", "foreign", "lock", "model", "pipe"])
def test_what_no_run_made_is_not_touched(make, place, capsys):
    victim = shutil.copytree(place / "dense", place / "victim")
    folder = place / ".bad.unfinished"
    if make == "link":
        folder.symlink_to(victim)
    elif make == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        {
            "foreign": lambda: (folder / "notes.txt").write_text("mine"),
            "lock": lambda: (folder / "lock").symlink_to(victim / "config.json"),
            "model": lambda: (folder / "model").symlink_to(victim),
            "pipe": lambda: os.mkfifo(folder / "lock"),
        }[make]()
    message = "where the run needs a folder" if make in ("link", "file") else "was not made by ace-prune"
    refused(place, capsys, message)
    refused(place, capsys, message, "--resume")


def test_a_lock_that_becomes_a_link(place, monkeypatch):
    """After the folder was checked."""
    (place / ".new.unfinished").mkdir()
    (place / ".new.unfinished" / "lock").symlink_to(place / "text.txt")
    monkeypatch.setattr("ace_ext.runs.unfinished.check_own", lambda folder: None)
    before = tree(place)
    with pytest.raises(OSError, match="Too many levels"):
        Workspace(place / "new", {})
    assert tree(place) == before


# Files beside the output


STATS = ("--save-stats",)


@pytest.mark.parametrize(
    ("option", "what"), [(STATS, "file of --save-stats"), (("--log-json",), "log"), (("--report",), "page")], ids=str
)
def test_only_files_of_their_own_kind(option, what, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    prune(place / "dense", place / "other", {"save_stats": place / "other.zip"})
    (place / "log.jsonl").write_text('{"event": "start", "time": 1}\n')
    other = "log.jsonl" if option == STATS else "other.zip"
    (place / "empty-folder").mkdir()
    (place / "link").symlink_to("empty")
    os.mkfifo(place / "pipe")
    for name in ("dense/model.safetensors", "dense/config.json", "text.txt", other):
        refused(place, capsys, f"exists and is not a {what}", *option, name)
    for name, kind in [("link", "link"), ("empty-folder", "folder"), ("pipe", "device or pipe")]:
        refused(place, capsys, f"a {kind}); give another name", *option, name)
    refused(place, capsys, "device or pipe", *option, "/dev/null")
    refused(place, capsys, "must be a file in a folder that exists", *option, "nowhere/file")
    refused(place, capsys, "is not a usable name", *option, "n" * 300)
    refused(place, capsys, "is in the output folder", "--overwrite", *option, "out/file", output="out")
    refused(place, capsys, "must be a file in a folder that exists", *option, "bad/file")
    (place / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda folder, _: folder.name != "locked")  # root may write anywhere
    refused(place, capsys, "cannot be written: its folder is read-only", *option, "locked/file")


def test_files_of_their_own_kind_are_replaced(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    kinds = {"s.zip": is_statistics, "l.jsonl": is_log, "p.html": is_page}
    text = ["--calibration", "text.txt", "--nsamples", 4, "--seqlen", 8, "--method", "wanda"]
    options = [*STATS, "s.zip", "--log-json", "l.jsonl", "--report", "p.html"]
    for file in kinds:
        (place / file).touch()
    for _ in range(2):
        status, _, error = call(
            capsys, "run", "--model", "dense", "--output", "out", "--overwrite", "--quiet", *text, *options
        )
        assert status == 0, error
        assert all(is_kind(place / file) for file, is_kind in kinds.items())
    assert not [name for name in tree(place) if name.endswith(".part") or "unfinished" in name]


def test_two_files_of_one_name(place, capsys):
    refused(place, capsys, "must be different files", "--report", place / "x", "--log-json", place / "x")


def test_a_link_in_place_of_the_part_of_a_file(place, capsys):
    (place / ".s.zip.part").symlink_to("text.txt")
    before = tree(place)
    with pytest.raises(InputError, match="is in the way and is not a file"):
        prune(place / "dense", place / "new", {"save_stats": place / "s.zip"})
    assert {name: tree(place)[name] for name in before} == before


# A run that had finished


def test_a_finished_run_that_is_resumed_is_done(place, capsys):
    report, out = prune(place / "dense", place / "new")
    before = tree(place)
    assert prune(place / "dense", place / "new", {"resume": True}) == (report, out)
    (place / ".new.unfinished").mkdir()  # as a kill while it was removed leaves it
    (place / ".new.unfinished" / "lock").touch()
    (place / ".new.unfinished" / "hidden-0-1.bin").touch()
    assert prune(place / "dense", place / "new", {"resume": True}) == (report, out)
    assert tree(place) == before


def test_the_output_of_another_run_is_not_done(place):
    with pytest.raises(InputError, match=r"of a run with other arguments \(.*config\.sparsity was 0\.25, now 0\.5\)"):
        prune(place / "dense", place / "out", {"resume": True})
    prune(place / "dense", place / "out", {"resume": True, "overwrite": True})
    assert read_report(place / "out").sparsity == 0.5


def test_check_output_names_what_is_wrong(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; give a folder"):
        check_output(tmp_path / "file", overwrite=True)
