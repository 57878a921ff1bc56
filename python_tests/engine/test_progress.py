"""The progress of a run: a bar on a terminal, JSON lines for programs."""

import io
import json
import time

import pytest
from folders import command, prune, save_dense

from ace_ext.cli import main as cli
from ace_ext.engine.progress import Progress
from ace_ext.records import BlockReport, MatrixReport, PruneReport

START = {"event", "time", "blocks", "done", "tokens"}
BLOCK = {"event", "time", "block", "done", "blocks", "seconds", "tokens_per_second", "sparsity", "memory_bytes"}
END = {"event", "time", "seconds", "sparsity"}


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


def check_lines(text: str, done: int = 0, blocks: int = 3) -> list[dict]:
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["start", *["block"] * (blocks - done), "end"]
    assert lines[0].keys() == START
    assert all(line.keys() == BLOCK | {"seconds_left"} for line in lines[1:-1])
    assert lines[-1].keys() == END
    assert lines[0]["done"] == done
    assert [line["done"] for line in lines[1:-1]] == list(range(done + 1, blocks + 1))
    assert lines == sorted(lines, key=lambda line: line["time"])
    return lines


def test_lines_of_a_run(dense, tmp_path):
    log = tmp_path / "log.jsonl"
    assert cli.main([*command(dense, tmp_path / "out")[3:], "--log-json", str(log), "--quiet"]) == 0
    lines = check_lines(log.read_text())
    assert lines[0]["tokens"] == 8 * 16
    assert [line["block"] for line in lines[1:-1]] == [f"model.layers.{i}" for i in range(3)]
    for line in lines[1:-1]:
        assert line["sparsity"] == 0.5
        assert line["tokens_per_second"] > 0
        assert 10**7 < line["memory_bytes"] < 10**11
        assert abs(line["time"] - time.time()) < 600
    assert lines[-2]["seconds_left"] == 0
    assert lines[-1]["seconds"] >= sum(line["seconds"] for line in lines[1:-1]) - 1e-3


def test_a_dash_is_stderr_and_stdout_stays_the_report(dense, tmp_path, capsys):
    assert cli.main([*command(dense, tmp_path / "out")[3:], "--log-json", "-", "--json"]) == 0
    printed = capsys.readouterr()
    check_lines(printed.err)
    assert json.loads(printed.out)["sparsity"] == 0.5


def test_a_log_that_cannot_be_written(dense, tmp_path, capsys):
    assert cli.main([*command(dense, tmp_path / "out")[3:], "--log-json", str(tmp_path / "no" / "log")]) == 2
    assert "log-json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [{"group": "model"}, {"method": "collect(order=block) + wanda"}, {"method": "collect(batch_tokens=16) + wanda"}],
    ids=str,
)
def test_lines_of_every_walk(config, dense, tmp_path):
    log = io.StringIO()
    prune(dense, tmp_path / "out", None, {"progress": Progress(log=log)}, **config)
    check_lines(log.getvalue())


def test_a_resumed_run_counts_what_is_done(dense, tmp_path):
    class Stop(Progress):
        def block(self, block, report):
            super().block(block, report)
            if self._done == 2:
                raise KeyboardInterrupt

    log = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        prune(dense, tmp_path / "out", None, {"progress": Stop(log=log)})
    log = io.StringIO()
    prune(dense, tmp_path / "out", {"resume": True}, {"progress": Progress(log=log)})
    lines = check_lines(log.getvalue(), done=2)
    assert lines[-1]["sparsity"] == 0.5


def test_the_time_left_shrinks_to_none(monkeypatch):
    """Ten blocks of two seconds each: 18, 16 … 0 seconds are left. Blocks of an earlier run are not counted as fast."""
    clock = [100.0]
    monkeypatch.setattr("ace_ext.engine.progress.time.perf_counter", lambda: clock[0])
    for done in (0, 1):
        log = io.StringIO()
        progress, report = Progress(log=log), PruneReport({}, "cpu", "float32")
        progress.start(10, done, 300)
        for index in range(done, 10):
            clock[0] += 2.0
            report.blocks.append(BlockReport(str(index), 2.0, [MatrixReport("m", (2, 4), 4, 4, 300, 0.1, 0.9)]))
            progress.block(report.blocks[-1], report)
        progress.end(report)
        progress.close()
        lines = check_lines(log.getvalue(), done, 10)
        assert [line["seconds_left"] for line in lines[1:-1]] == [2.0 * (9 - i) for i in range(done, 10)]
        assert {line["tokens_per_second"] for line in lines[1:-1]} == {150.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "options", "shows"),
    [(Terminal(), [], True), (Terminal(), ["--quiet"], False), (io.StringIO(), [], False)],
    ids=["terminal", "quiet", "piped"],
)
def test_a_bar_on_a_terminal_only(stderr, options, shows, dense, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", stderr)
    assert cli.main([*command(dense, tmp_path / "out")[3:], *options]) == 0
    text = stderr.getvalue()
    if not shows:
        assert "pruning" not in text
        assert len(text.splitlines()) == (0 if options else 1)  # the note on the BOS token; none with --quiet
        return
    assert "pruning: 100%" in text
    assert "3/3 " in text
    assert "tokens/s, sparsity 0.500, " in text
    assert " GiB" in text
