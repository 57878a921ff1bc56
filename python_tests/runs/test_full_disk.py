"""A full disk: a one-line error, status 2, and the run can be resumed once there is space."""

import contextlib
import errno
import json
import os
import subprocess
import uuid

import pytest
import torch
from folders import command, prune, save_dense, weights_bytes

from ace_ext import InputError
from ace_ext.cli import main as cli
from ace_ext.formats import dense as dense_format
from ace_ext.models import hidden_states, safetensors_files
from ace_ext.runs import unfinished
from ace_ext.runs.output import disk_errors
from ace_ext.runs.workspace import Workspace


def finished(place) -> int:
    path = place / ".out.unfinished" / "state.json"
    return json.loads(path.read_text())["finished"] if path.exists() else 0


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


def test_a_copy_that_fails_names_the_file_that_was_written(tmp_path):
    """Both names are in the error: there is no space for the second."""
    read, written = tmp_path / "dense" / "model.safetensors", tmp_path / "out" / "model.safetensors"
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(read), None, str(written))
    with (
        pytest.raises(InputError, match=rf"No space left on device at '{written}'; free"),
        disk_errors(tmp_path / "out"),
    ):
        raise error


# Wherever a write may fail, by an error in its place


def fail_at(monkeypatch, place: str, number: int, code: int = errno.ENOSPC):
    """The ``number``-th call of this kind of write fails."""
    owner, name = {
        "weights": (safetensors_files.Shards, "write"),
        "state": (Workspace, "_write_state"),
        "hidden": (hidden_states.HiddenStates, "_write"),
        "copy": (dense_format, "copy_model"),
        "finish": (unfinished, "_open_to_others"),
    }[place]
    real, calls = getattr(owner, name), []

    def write(*arguments):
        calls.append(None)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(owner, name, write)


@pytest.mark.parametrize("offload", ["disk", "none"])
@pytest.mark.parametrize(
    ("place", "number", "blocks"),
    [
        ("copy", 1, 0),
        ("hidden", 1, 0),
        ("weights", 1, 0),
        ("state", 1, 0),
        ("weights", 3, 2),
        ("hidden", 3, 2),
        ("state", 3, 2),
        ("finish", 1, 3),
    ],
)
def test_each_write_may_fail(place, number, blocks, offload, dense, tmp_path, monkeypatch):
    run = {"offload": offload, "resume": True}
    with monkeypatch.context() as patch:
        fail_at(patch, place, number)
        with pytest.raises(InputError, match=r"^output '.*out' cannot be written: No space left on device; free some"):
            prune(dense, tmp_path / "out", run)
    assert finished(tmp_path) == blocks
    assert (tmp_path / ".out.unfinished").exists() == (blocks > 0)  # else it would only take room
    _, out = prune(dense, tmp_path / "out", run)
    _, whole = prune(dense, tmp_path / "whole")
    assert weights_bytes(out) == weights_bytes(whole)


def test_another_error_is_named(dense, tmp_path, monkeypatch):
    fail_at(monkeypatch, "weights", 2, errno.EIO)
    with pytest.raises(InputError, match="cannot be written: Input/output error; correct that and continue with"):
        prune(dense, tmp_path / "out")


def test_the_status_is_2_and_the_line_is_one(dense, tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, "weights", 2)
    assert cli.main([*command(dense, tmp_path / "out")[3:], "--quiet"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("ace-prune: output ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


# A file system that is full


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a given size; needs root."""
    mounted = []

    def mount(size: int):
        place = tmp_path / f"disk-{uuid.uuid4().hex[:4]}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}; the tests above simulate one")
        mounted.append(place)
        return place

    def grow(place, size: int):
        subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)

    mount.grow = grow
    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("offload", "dtype"), [("disk", "auto"), ("none", "auto"), ("none", "float32")], ids=["disk", "copied", "saved"]
)
def test_a_small_disk(offload, dtype, dense, tmp_path, small_disk):
    """Space for the model but not for the hidden states, or not even for the model; then more space."""
    calibration = {"dtype": dtype, "nsamples": 64}
    _, whole = prune(dense, tmp_path / "whole", {"offload": offload}, calibration)
    needed = sum(file.stat().st_size for file in whole.iterdir())
    for share in (0.5, 1.1):
        place = small_disk(int(needed * share) // 4096 * 4096)
        with pytest.raises(InputError, match=r"No space left on device.*; free some space and continue with --resume"):
            prune(dense, place / "out", {"offload": offload, "resume": True}, calibration)
        assert not (place / "out").exists()
        small_disk.grow(place, 2**26)
        _, out = prune(dense, place / "out", {"offload": offload, "resume": True}, calibration)
        assert weights_bytes(out) == weights_bytes(whole)
        assert [file.name for file in place.iterdir()] == ["out"]


def fill(place) -> None:
    """Fills the disk."""
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def test_a_disk_that_fills_up_behind_some_blocks(dense, tmp_path, small_disk, monkeypatch):
    """Another program fills the disk after two blocks."""
    place = small_disk(2**22)
    real = Workspace._write_state

    def write(self, *arguments):
        real(self, *arguments)
        if finished(place) == 2:
            fill(place)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "_write_state", write)
        with pytest.raises(InputError, match=r"No space left on device"):
            prune(dense, place / "out", {"offload": "disk"})
    assert finished(place) == 2
    (place / "filler").unlink()
    _, out = prune(dense, place / "out", {"offload": "disk", "resume": True})
    _, whole = prune(dense, tmp_path / "whole")
    assert weights_bytes(out) == weights_bytes(whole)


def test_statistics_that_do_not_fit(dense, tmp_path, small_disk):
    place = small_disk(8192)
    run = {"save_stats": place / "stats.zip", "resume": True}
    with pytest.raises(InputError, match=r"^save-stats '.*stats\.zip' cannot be written: No space left on device"):
        prune(dense, tmp_path / "out", run)
    assert list(place.iterdir()) == []
    small_disk.grow(place, 2**24)
    prune(dense, tmp_path / "out", run)
    _, again = prune(dense, tmp_path / "again", {"stats": place / "stats.zip"})
    assert weights_bytes(again) == weights_bytes(tmp_path / "out")


def test_the_process_stays_usable(dense, tmp_path, monkeypatch):
    """Nothing of a failed run is left behind in the model or the lock: the next one starts as if it were the first."""
    with monkeypatch.context() as patch:
        fail_at(patch, "weights", 2)
        with pytest.raises(InputError):
            prune(dense, tmp_path / "out")
    _, out = prune(dense, tmp_path / "out")
    assert weights_bytes(out)
    assert torch.is_grad_enabled()
