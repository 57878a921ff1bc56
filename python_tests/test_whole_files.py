"""What has its final name is on the disk: files are synced before they are renamed, and their folder afterwards."""

import contextlib
import errno
import os
from pathlib import Path

import pytest
from folders import prune, save_dense

from ace_ext.packed.packing import pack, unpack
from ace_ext.whole_files import sync_folder


@pytest.fixture
def events(monkeypatch):
    """``("fsync" or "rename", path)`` in their order. What is open is named by its descriptor."""
    found: list[tuple[str, Path]] = []
    fsync = os.fsync

    def syncing(number):
        found.append(("fsync", Path(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(number)

    def renaming(real):
        def call(source, target):
            found.append(("rename", Path(target).absolute()))
            return real(source, target)

        return call

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming(os.replace))
    monkeypatch.setattr(os, "rename", renaming(os.rename))
    return found


@pytest.mark.parametrize("write", ["run", "pack", "unpack"])
def test_all_files_of_a_folder_are_synced_before_it_gets_its_name(write, tmp_path, events):
    out = tmp_path / "out"
    dense = save_dense(tmp_path / "dense")
    if write == "run":
        prune(dense, out)
    else:
        prune(dense, tmp_path / "pruned")
        pack(tmp_path / "pruned", tmp_path / "packed", "bitmap")
    if write != "run":
        events.clear()
        pack(tmp_path / "pruned", out, "bitmap") if write == "pack" else unpack(tmp_path / "packed", out)
    last = events.index(("rename", out))
    synced = {path.name.removeprefix(".").removesuffix(".part") for event, path in events[:last] if event == "fsync"}
    assert {path.name for path in out.iterdir()} <= synced
    assert ("fsync", tmp_path) in events[last:]


@pytest.mark.parametrize(("number", "told"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_a_folder(number, told, tmp_path, monkeypatch):
    def refusing(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(OSError, match="Input/output error") if told else contextlib.nullcontext():
        sync_folder(tmp_path)
