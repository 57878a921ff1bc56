"""Faults at counted file events of each verb that writes (:mod:`faults`): what is there afterwards is the old output,
the new one or none, never a part; the next call finishes the work with the same bytes and leaves nothing else behind.
"""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from faults import KINDS, SIGNALS, run_with_fault
from folders import fork, prune, save_dense, tree
from helpers import rest_nightly
from runs.test_heal import write_text

from ace_ext import InputError
from ace_ext.compare.journal import RUNS_NAME, read_results
from ace_ext.packed.packing import pack
from ace_ext.runs import pipeline
from ace_ext.runs.workspace import Workspace

VOLATILE = ("ace_report.json", "ace_manifest.json", "results.json", RUNS_NAME, "stats.zip")
"""Files that hold times; their contents are compared otherwise, or not."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    dense = save_dense(place / "dense")
    write_text(place / "text.txt")
    prune(dense, place / "pruned")
    pack(place / "pruned", place / "packed", "bitmap")
    return place


def arguments(verb: str, inputs: Path, work: Path) -> list[str]:
    text = ["--calibration", inputs / "text.txt", "--device", "cpu"]
    samples = [*text, "--nsamples", 4, "--seqlen", 8, "--quiet"]
    steps = ["--seqlen", 16, "--step-tokens", 16, "--held-out", 2, "--learning-rate", 0.015]
    grid = ["--methods", "wanda; magnitude", "--lengths", "4x8", "--texts", inputs / "text.txt"]
    grid += ["--eval-seqlen", 8, "--eval-windows", 2]
    run = ["run", "--model", inputs / "dense", "--output", work / "out", *samples]
    typed = {
        "run": [*run, "--method", "wanda"],
        "run from disk": [*run, "--method", "collect(batch_tokens=16) + wanda", "--offload", "disk"],
        "run over an older one": [*run, "--method", "wanda", "--overwrite"],
        "run with statistics": [*run, "--method", "wanda", "--save-stats", work / "stats.zip"],
        "run and distill": [*run, "--method", "admm + distill(tokens=32)"],
        "run and distill from disk": [*run, "--method", "best(tokens=32)", "--offload", "disk"],
        "run and pack": [*run, "--method", "wanda", "--format", "bitmap"],
        "heal": ["heal", inputs / "pruned", "--output", work / "out", "--tokens", 48, *steps, *text, "--quiet"],
        "compare": ["compare", "--model", inputs / "dense", "--output", work / "out", *grid, *text, "--quiet"],
        "pack": ["pack", inputs / "pruned", "--output", work / "out"],
        "unpack": ["unpack", inputs / "packed", "--output", work / "out"],
    }
    return [str(part) for part in typed[verb]]


VERBS = ("run", "run from disk", "run over an older one", "run with statistics", "run and distill", "heal")
VERBS += ("compare", "pack", "run and distill from disk", "run and pack", "unpack")
RESUMES = ("run", "heal")
SAMPLE = [(verb, KINDS[number % len(KINDS)]) for number, verb in enumerate(VERBS)]
"""What is tried at one event. Each test run tries every third of them; all events of all are tried at night."""


def call(given: list[str], work: Path, kind: str | None = None, at: int = 0) -> tuple[int, list[str]]:
    """Status (negative: the signal that ended it) and the lines that were printed on stderr."""
    told = work.parent / f"{work.name}.told"
    child = fork(run_with_fault, given, str(work), kind, at, str(told))
    child.join(120)
    assert child.exitcode is not None, f"it hangs: {given}"
    lines = told.read_text().splitlines()
    told.unlink()
    return child.exitcode, lines


def prepare(verb: str, inputs: Path, work: Path) -> dict[str, str] | None:
    """Makes the folder of a call, with an older output if the verb replaces one; returns what that is."""
    work.mkdir()
    if verb != "run over an older one":
        return None
    prune(inputs / "dense", work / "out", sparsity=0.25)
    return tree(work / "out")


def settled(work: Path) -> dict[str, object]:
    """Everything below a folder, without what differs between two equal runs."""
    found: dict[str, object] = {name: value for name, value in tree(work).items()}
    for name in found:
        if Path(name).name == RUNS_NAME:
            runs = read_results(work / name).runs
            found[name] = sorted(json.dumps([run.cell.method, str(run.perplexity), run.sparsity]) for run in runs)
        elif Path(name).name in VOLATILE or Path(name).suffix in (".png", ".html", ".md", ".pdf"):
            found[name] = "there"
    return found


class Whole:
    """For each verb, what a call without a fault leaves, and how many events it has."""

    def __init__(self, inputs: Path, place: Path) -> None:
        self.inputs, self.place, self._known = inputs, place, {}

    def __getitem__(self, verb: str) -> tuple[dict[str, object], int]:
        if verb not in self._known:
            work = self.place / verb.replace(" ", "-")
            prepare(verb, self.inputs, work)
            status, lines = call(arguments(verb, self.inputs, work), work)
            assert status == 0, lines
            self._known[verb] = settled(work), int(lines[-1].split()[1])
        return self._known[verb]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    return Whole(inputs, tmp_path_factory.mktemp("whole"))


def check_fault(verb: str, kind: str, at: int, inputs: Path, expected: dict[str, object], work: Path) -> None:
    old = prepare(verb, inputs, work)
    given = arguments(verb, inputs, work)
    status, lines = call(given, work, kind, at)
    what = f"{verb}, {kind} at event {at}: status {status}, {lines}"
    if kind in SIGNALS and status != 0:
        assert status == (130 if kind == "interrupt" else -SIGNALS[kind]), what
    elif kind not in SIGNALS:
        assert status in (0, 2), what
    if status in (2, 130):
        told = [line for line in lines if not line.startswith("events ")]
        assert len(told) == 1, what
        assert told[0].startswith("ace-prune: "), what
    if verb != "compare" and (work / "out").exists():  # the older one or the new one, whole
        found = settled(work / "out")
        new = {name.removeprefix("out/"): value for name, value in expected.items() if name.startswith("out/")}
        assert tree(work / "out") == old or found == new, what
    if old is not None:
        assert (work / "out").is_dir() or (work / ".out.unfinished" / "old").is_dir(), what
    again = [*given, "--resume"] if verb.split()[0] in RESUMES else given
    if verb in ("pack", "unpack") and (work / "out").exists():
        assert settled(work) == expected, what
        return
    status, lines = call(again, work)
    assert status == 0, f"{what}; then {lines}"
    assert settled(work) == expected, f"{what}; then another result"


@pytest.mark.parametrize(("verb", "kind"), rest_nightly(SAMPLE[::3], SAMPLE, several=True))
def test_some_faults(verb, kind, inputs, whole, tmp_path):
    before = tree(inputs)
    expected, count = whole[verb]
    at = random.Random(f"{verb} {kind}").randint(1, count)
    check_fault(verb, kind, at, inputs, expected, tmp_path / "work")
    assert tree(inputs) == before


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_at_every_event(verb, kind, inputs, whole, tmp_path):
    before = tree(inputs)
    expected, count = whole[verb]
    failed = []
    for at in range(1, count + 1):
        try:
            check_fault(verb, kind, at, inputs, expected, tmp_path / str(at))
        except AssertionError as error:
            failed.append(str(error).splitlines()[0])
    print(f"\n{verb}, {kind}: {count} faults, {len(failed)} findings")
    assert not failed, "\n".join(failed)
    assert tree(inputs) == before


def test_two_processes_on_one_output(inputs, whole, tmp_path):
    """One writes, the other is refused or finds the work done; never a mixture."""
    expected, _ = whole["run"]
    work = tmp_path / "work"
    work.mkdir()
    given = arguments("run", inputs, work)
    told = [tmp_path / f"{i}.told" for i in range(2)]
    children = [fork(run_with_fault, given, str(work), None, 0, str(path)) for path in told]
    for child in children:
        child.join(120)
    statuses = sorted(child.exitcode for child in children)
    assert statuses in ([0, 2],), [path.read_text() for path in told]
    message = next(p.read_text() for c, p in zip(children, told, strict=True) if c.exitcode)
    assert "is being written by another run" in message or "exists; pass --overwrite" in message
    assert settled(work) == expected


def test_a_run_that_gets_the_lock_late_does_not_prune_in_vain(inputs, tmp_path, monkeypatch):
    """The one that had it has finished meanwhile."""

    def late(*arguments, **named):
        monkeypatch.undo()
        prune(inputs / "dense", tmp_path / "out")
        monkeypatch.setattr(pipeline, "prune_model", None)
        return Workspace(*arguments, **named)

    monkeypatch.setattr(pipeline, "Workspace", late)
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        prune(inputs / "dense", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_run_does_not_disturb_one_that_is_stopped(inputs, whole, tmp_path):
    """The first holds the lock while it is suspended."""
    expected, _ = whole["run"]
    work = tmp_path / "work"
    work.mkdir()
    given = arguments("run", inputs, work)
    child = fork(run_with_fault, given, str(work), None, 0, str(tmp_path / "told"))
    while not (work / ".out.unfinished" / "state.json").exists() and child.is_alive():
        pass
    os.kill(child.pid, signal.SIGSTOP)
    if (work / "out").exists():
        pytest.fail("the run was over before it could be stopped")
    for more in ([], ["--resume"], ["--overwrite"]):
        status, lines = call([*given, *more], work)
        assert (status, "is being written by another run; wait for it" in lines[0]) == (2, True), lines
    os.kill(child.pid, signal.SIGCONT)
    child.join(120)
    assert child.exitcode == 0
    assert settled(work) == expected
