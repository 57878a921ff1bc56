"""The end of the command line: one line and a status in every case; a traceback only with ``--debug``."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from folders import call, command, save_dense, spawn

from ace_ext.cli import verify
from ace_ext.cli.endings import ending
from ace_ext.errors import InputError


def raising(monkeypatch, error):
    def action(_):
        raise error

    monkeypatch.setattr(verify, "check", action)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("folder must be one"), 2, "folder must be one"),
        (InputError("two\nlines"), 2, "two lines"),
        (
            PermissionError(errno.EACCES, "Permission denied", "secret"),
            2,
            "'secret': Permission denied; check the path",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device; check the path"),
        (MemoryError(), 2, "not enough memory (MemoryError); lower --nsamples"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "not enough memory"),
        (
            ZeroDivisionError("a\nb"),
            1,
            "internal error: ZeroDivisionError: a b; please report it",
        ),
        (RuntimeError("x" * 10000), 1, "xxx…; please report"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_one_line_and_a_status(error, status, words, monkeypatch, capsys):
    raising(monkeypatch, error)
    found, out, line = call(capsys, "verify", "folder")
    assert (found, out) == (status, "")
    assert line.count("\n") == 1
    assert line.startswith("ace-prune: ")
    assert words in line
    assert len(line) < 2100
    found, _, lines = call(capsys, "verify", "folder", "--debug")
    assert found == status
    assert "Traceback" in lines
    assert lines.endswith(line)


def test_memory_that_cannot_be_had_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert ending(caught.value) == 2


def test_every_verb_takes_debug(capsys):
    for verb in ("run", "plan"):
        assert "--debug" in call(capsys, verb, "--help-all")[1]
    for verb in ("heal", "compare", "eval", "verify"):
        assert "--debug" in call(capsys, verb, "--help")[1]


def test_debug_stands_before_the_verb_too(capsys):
    status, _, lines = call(capsys, "--debug", "verify", "no such folder")
    assert status == 2
    assert "Traceback" in lines
    assert lines.splitlines()[-1].startswith("ace-prune: 'no such folder'")


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    where = tempfile.gettempdir()
    return subprocess.Popen(
        [sys.executable, "-m", "ace_ext", *arguments], text=True, cwd=where, env=environment, **pipes
    )


def test_an_interruption_while_it_starts():
    """The import of torch takes a second or more; Python itself starts before that."""
    process = start("verify", "nowhere")
    modules = f"/proc/{process.pid}/maps"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and "libtorch" not in open(modules).read():  # noqa: SIM115
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "ace-prune: interrupted\n"


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("run", "; continue from here with --resume"),
        ("compare", "; the same command continues from here"),
        ("eval", ""),
    ],
)
def test_an_interruption_says_how_to_continue_where_that_is_possible(verb, words, capsys):
    assert ending(KeyboardInterrupt(), verb) == 130
    assert capsys.readouterr().err == f"ace-prune: interrupted{words}\n"


def test_output_that_is_not_read(capsys):
    reader, writer = os.pipe()
    os.close(reader)
    process = start("run", "--help", stdout=writer)
    os.close(writer)
    _, error = process.communicate(timeout=120)
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    assert process.returncode in (0, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_output_on_a_full_disk(tmp_path):
    dense = save_dense(tmp_path / "dense")
    with open("/dev/full", "w") as full:
        arguments = command(dense, tmp_path / "out", "--quiet", "--method", "magnitude")[3:]
        process = start(*arguments, stdout=full)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error == "ace-prune: No space left on device; check the path, its permissions, and the space that is left\n"
    assert (tmp_path / "out").is_dir()  # the work is done and kept


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ace_ext.cli.args.check_replaceable", lambda *_: None)  # which refuses a device
    dense = save_dense(tmp_path / "dense")
    status, _, error = call(capsys, *command(dense, tmp_path / "out", "--quiet", "--log-json", "/dev/full")[3:])
    assert status == 2
    assert error.startswith("ace-prune: log-json '/dev/full' cannot be written: No space left on device; fix that")
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["dense", "text.txt"]


def test_a_line_that_a_crash_cut_off_spoils_no_other(tmp_path, capsys):
    dense, log = save_dense(tmp_path / "dense"), tmp_path / "log.jsonl"
    arguments = command(dense, tmp_path / "out", "--quiet", "--log-json", log, "--resume")[3:]
    assert call(capsys, *arguments)[0] == 0
    whole = log.read_bytes()
    log.write_bytes(whole[:-9])
    shutil.rmtree(tmp_path / "out")
    assert call(capsys, *arguments)[0] == 0
    first = whole.splitlines()
    lines = log.read_bytes().splitlines()
    assert lines[: len(first) - 1] == first[:-1]
    events = [json.loads(line)["event"] for line in lines]
    assert events[len(first) - 1 :] == [json.loads(line)["event"] for line in first]


def test_a_terminal_that_knows_ascii_only(tmp_path):
    process = spawn([sys.executable, "-m", "ace_ext", "run", "--help-all"], PYTHONIOENCODING="ascii")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "\\u03c3" in out  # σ
