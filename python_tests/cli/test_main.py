"""The command line on models and texts on disk; as a separate process where that makes a difference."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import termios

import pytest
import torch
from folders import call
from tiny_models import make_model, make_tokenizer

from ace_ext.cli.main import main
from ace_ext.pruning.criteria import METRICS

TEXT = "the quick brown fox jumps over the lazy dog " * 40


ELSEWHERE = tempfile.gettempdir()  # in the source tree, -m would find the sources there and not what is installed


def ace_prune(*arguments):
    command = [sys.executable, "-m", "ace_ext", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ELSEWHERE, timeout=300, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dense model and a text."""
    path = tmp_path_factory.mktemp("cli")
    make_model("llama-tied", torch.bfloat16).save_pretrained(path / "dense")
    make_tokenizer().save_pretrained(path / "dense")
    (path / "text.txt").write_text(TEXT)
    (path / "empty.txt").touch()
    (path / "taken").mkdir()
    spoiled = make_model("llama-tied", torch.bfloat16)
    spoiled.model.layers[2].mlp.down_proj.weight.data[3, 4] = float("nan")
    spoiled.save_pretrained(path / "spoiled")
    make_tokenizer().save_pretrained(path / "spoiled")
    return path


def run_arguments(place, name, **changed):
    options = {"model": place / "dense", "output": place / name, "calibration": place / "text.txt", **changed}
    options = {"nsamples": 4, "seqlen": 16, **options}
    return ["run", *[part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]]


def test_run_verify_eval(place):
    done = ace_prune(*run_arguments(place, "out"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"ace-prune: bos auto: .*\n", done.stderr)  # one line, and no bar
    assert "3 blocks, 21 matrices, sparsity 0.5000" in done.stdout
    report = json.loads((place / "out" / "ace_report.json").read_text())
    assert report["extra"]["calibration"]["source"].endswith("text.txt")
    assert len(report["extra"]["calibration"]["sha256"]) == 64
    assert report["config"]["gram"] == "sketch"  # the preset fast
    assert {"torch", "transformers", "ace_ext"} <= set(report["versions"])
    assert report["peak_memory_bytes"] > 0

    verified = ace_prune("verify", place / "out")
    assert verified.returncode == 0
    assert "21 matrices, sparsity 0.5000" in verified.stdout

    evaluated = ace_prune("eval", "--model", place / "out", "--text", place / "text.txt", "--seqlen", 32, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["perplexity"] > 1


def test_json_report_on_stdout(place, capsys):
    status, out, error = call(capsys, *run_arguments(place, "json", pattern="2:4", calibration="self"), "--json")
    assert status == 0, error
    report = json.loads(out)
    assert report["config"]["pattern"] == "2:4"
    assert report["sparsity"] == 0.5


def test_damage_fails_verify(place, capsys):
    assert call(capsys, *run_arguments(place, "damaged"))[0] == 0
    report = place / "damaged" / "ace_report.json"
    report.write_text(report.read_text().replace('"sparsity": 0.5,', '"sparsity": 0.75,'))
    status, out, _ = call(capsys, "verify", place / "damaged")
    assert status == 1
    assert "FAULT model.layers.0.self_attn.q_proj: 32 of 32 rows keep more than 8" in out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "/no/such/folder"}, "model '/no/such/folder' is not a folder"),
        ({"sparsity": 1.5}, "sparsity must be a share of zeros from 0 to 1 (got 1.5)"),
        ({"pattern": "3:2"}, "pattern must be N:M with 0 < N < M"),
        ({"pattern": "2:5"}, "pattern 2:5 needs columns in whole groups of 5 (got 32 in model.layers.0"),
        ({"calibration": "empty.txt"}, "empty.txt"),
        ({"calibration": "no-such.jsonl"}, "no-such.jsonl"),
        ({"model": "spoiled"}, "model.layers.2.mlp.down_proj.weight must be finite (got nan at index [3, 4])"),
        ({"output": "/proc/out"}, "output '/proc/out' cannot be written"),
        ({"output": "taken"}, "exists; pass --overwrite"),
        ({"seqlen": 100000}, "100000"),
        ({"nsamples": 0}, "nsamples"),
        ({"metric": "wonda"}, "invalid choice: 'wonda'"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"skip": "("}, "skip must be regular expressions"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(place, changed, message, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(os.listdir(place))
    status, error = bad_run(run_arguments(place, "bad", **changed), capsys)
    assert status == 2, error
    assert len(error.splitlines()) == 1, error
    assert message in error
    assert sorted(os.listdir(place)) == before


def bad_run(arguments, capsys):
    """Status and stderr of a run that must print no result."""
    try:
        status = main(list(map(str, arguments)))
    except SystemExit as end:  # argparse's own way out
        status = end.code
    printed = capsys.readouterr()
    assert printed.out == ""
    return status, printed.err


def test_bad_input_ends_the_process_with_status_2(place):
    done = ace_prune(*run_arguments(place, "bad", sparsity=1.5))
    assert done.returncode == 2
    assert done.stderr == "ace-prune: sparsity must be a share of zeros from 0 to 1 (got 1.5)\n"


def test_sparsity_and_pattern_exclude_each_other(place, capsys):
    status, error = bad_run(run_arguments(place, "bad", pattern="2:4", sparsity=0.5), capsys)
    assert status == 2
    assert "not allowed with" in error


def test_help_lists_every_metric(capsys):
    status, out, _ = call(capsys, "run", "--help")
    assert status == 0
    assert all(f"\n  {name} " in out for name in METRICS)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_completion_script_knows_every_verb_and_option(shell, capsys):
    status, out, _ = call(capsys, "--print-completion", shell)
    assert status == 0
    assert all(verb in out for verb in ("run", "heal", "plan", "compare", "eval", "verify"))
    assert all(option in out for option in ("--sparsity", "--max-swaps", "--tune-epochs", "--format"))


def test_progress_goes_to_a_terminal_only(place):
    """With a terminal on stderr the bar shows blocks, sparsity and time left; stdout stays clean."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-m", "ace_ext", *map(str, run_arguments(place, "terminal"))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, text=True, cwd=ELSEWHERE, check=False)
    os.close(writer)
    shown = b""
    while True:
        try:
            part = os.read(reader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(reader)
    assert done.returncode == 0
    assert b"3/3" in shown
    assert b"sparsity 0.500" in shown
    assert "pruning" not in done.stdout
