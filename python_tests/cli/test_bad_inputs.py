"""Every bad input of the catalogue ends with one line and status 2, leaves nothing behind and changes no other file."""

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from bad_inputs import arguments, cases
from folders import call, prune, save_dense, tree

CASES = {name: case for name, *case in cases()}
SECONDS = 10

WRITES = {"os.remove": 0, "os.rename": 1, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0, "os.chmod": 0, "os.link": 1}
WRITES |= {"os.symlink": 1, "shutil.rmtree": 0, "shutil.move": 1, "shutil.copyfile": 1, "os.chown": 0}
"""Events of an audit hook that change files, with the positions of the arguments that name files."""


class Watch:
    """While it is on, it refuses changes outside a folder, so that a test that runs as root cannot replace a device."""

    def __init__(self) -> None:
        self.place: Path | None = None
        self.outside: list[str] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.place is None:
            return
        if event == "open":
            name, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
        elif event in WRITES:
            name = arguments[WRITES[event]]
        else:
            return
        if not isinstance(name, str | bytes | os.PathLike):
            return
        path = os.path.realpath(os.fsdecode(name))
        allowed = (str(self.place), "/dev/null", "/proc/self/clear_refs", f"/proc/{os.getpid()}/clear_refs")
        if not path.startswith(allowed):
            self.outside.append(f"{event} {path}")
            raise PermissionError(f"{event} of {path} outside {self.place}")


@pytest.fixture(scope="module")
def watch():
    found = Watch()
    sys.addaudithook(found)
    return found


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A dense model, a pruned one, texts, and files that are not models."""
    place = tmp_path_factory.mktemp("sound") / "place"
    prune(save_dense(place / "dense"), place / "out", method="magnitude")
    report = place / "out" / "ace_report.json"
    report.write_text(report.read_text().replace(f"{place}/", ""))  # the copies name their own dense model
    texts = {"empty.txt": b"", "blank.txt": b" \n\t\n", "latin.txt": b"\xe9", "list.jsonl": b"[1]\n"}
    texts |= {"cut.jsonl": b'{"text": ', "number.jsonl": b'{"text": 5}', "half.jsonl": b'{"text": "\\ud800"}'}
    texts |= {"nested.jsonl": b"[" * 100_000, "notes": b"mine"}
    texts |= {"no_file.jsonl": b'{"image": "a.png"}', "no_key.jsonl": b'{"audio": "notes"}\n{}'}
    texts |= {"two_kinds.jsonl": b'{"audio": "notes"}\n{"image": "notes"}'}
    for name, content in texts.items():
        (place / name).write_bytes(content)
    (place / "photos").mkdir()
    (place / "photos" / "cat.jpg").write_bytes(b"cat")
    return place


@pytest.fixture
def place(sound, tmp_path, monkeypatch):
    """A copy to damage. It is the current folder too."""
    copy = shutil.copytree(sound, tmp_path / "place")
    os.mkfifo(copy / "pipe")
    (copy / "loop").symlink_to("loop")
    (copy / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back when the test ends
        del os.environ[name]
    return copy


class TooLong(BaseException):
    """Not an ``Exception``, so that no code treats it as an error of the input."""


@contextlib.contextmanager
def at_most(seconds: int):
    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_names_are_unique():
    assert len(CASES) == sum(1 for _ in cases())


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, place, tmp_path, watch, monkeypatch, capsys):
    verb, options, damage = CASES[name]
    if damage is not None:
        damage(place)
    before = tree(place)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    watch.outside.clear()
    try:
        watch.place = tmp_path
        with at_most(SECONDS):
            status, out, error = call(capsys, *arguments(verb, options))
    finally:
        watch.place = None
    assert tree(place) == before
    assert watch.outside == []
    assert error.count("\n") <= 1, error
    assert "internal error" not in error
    if verb == "verify" and status == 1:
        assert "problem:" in out
        assert error == ""
    else:
        assert status == 2, (status, out, error)
        assert error.startswith("ace-prune"), error
        assert out == ""
