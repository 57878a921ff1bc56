"""The command line on models and texts on disk, in a separate process if that makes a difference."""

import argparse
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

from ace_ext.cli.args import setting_help
from ace_ext.cli.main import build_parser, main
from ace_ext.cli.parser import VERBS
from ace_ext.pruning.method import PRESETS, PUBLISHED
from ace_ext.pruning.metrics import METRICS
from ace_ext.pruning.stages import STAGES

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


def test_run_verify_eval(place, capsys):
    done = ace_prune(*run_arguments(place, "out"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"ace-prune: bos auto: .*\n", done.stderr)  # one line, and no bar
    assert "3 blocks, 21 matrices, sparsity 0.5000" in done.stdout
    report = json.loads((place / "out" / "ace_report.json").read_text())
    assert report["extra"]["calibration"]["source"].endswith("text.txt")
    assert len(report["extra"]["calibration"]["sha256"]) == 64
    assert report["config"]["preset"] == "fast"
    assert report["config"]["method"] == "admm(damping=1, iterations=10, relaxation=1, gram=sketch)"
    assert {"torch", "transformers", "ace_ext"} <= set(report["versions"])
    assert report["peak_memory_bytes"] > 0

    status, out, _ = call(capsys, "verify", place / "out")
    assert status == 0
    assert "21 matrices, sparsity 0.5000" in out

    evaluate = ["eval", "--model", place / "out", "--text", place / "text.txt", "--seqlen", 32, "--json"]
    status, out, error = call(capsys, *evaluate)
    assert status == 0, error
    assert json.loads(out)["perplexity"] > 1


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
    assert "problem: model.layers.0.self_attn.q_proj: 32 of 32 rows keep more than 8" in out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "/no/such/folder"}, "model '/no/such/folder' is not a folder"),
        ({"sparsity": 1.5}, "sparsity must be a share from 0 to 1 (got 1.5); did you mean 0.015?"),
        ({"pattern": "3:2"}, "pattern must be N:M with 0 < N < M"),
        ({"pattern": "2:5"}, "pattern 2:5 needs columns in whole groups of 5 (got 32 in model.layers.0"),
        ({"calibration": "empty.txt"}, "empty.txt"),
        ({"calibration": "no-such.jsonl"}, "no-such.jsonl"),
        ({"model": "spoiled"}, "model.layers.2.mlp.down_proj.weight must be finite (got nan at index [3, 4])"),
        ({"output": "/proc/out"}, "output '/proc/out' cannot be written"),
        ({"output": "taken"}, "exists; pass --overwrite"),
        ({"seqlen": 100000}, "100000"),
        ({"nsamples": 0}, "nsamples"),
        ({"method": "wonda"}, "(got 'wonda'); did you mean wanda?"),
        (
            {"method": "wanda(iterations=30)"},
            "wanda has no option iterations: iterations is an option of admm and alps",
        ),
        ({"group": "modelz"}, "argument --group: invalid choice: 'modelz'"),
        ({"sparsty": 0.5}, "unrecognized arguments: --sparsty 0.5; did you mean --sparsity?"),
        ({"max-memory": "1MB"}, "MB here (got 1MB): process 0."),
        ({"max-memory": "1MB"}, "; allow more"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"skip": "("}, "skip must be regular expressions"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(place, changed, message, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("ace_ext.runs.memory_model.resident_bytes", lambda: 5 * 10**8)  # whatever ran before this test
    before = sorted(os.listdir(place))
    status, error = bad_run(run_arguments(place, "bad", **changed), capsys)
    assert status == 2, error
    assert len(error.splitlines()) == 1, error
    assert message in error
    assert sorted(os.listdir(place)) == before


def bad_run(arguments, capsys):
    """Status and stderr of a run that must not print a result."""
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
    assert done.stderr == "ace-prune: sparsity must be a share from 0 to 1 (got 1.5); did you mean 0.015?\n"


def test_sparsity_and_pattern_exclude_each_other(place, capsys):
    status, error = bad_run(run_arguments(place, "bad", pattern="2:4", sparsity=0.5), capsys)
    assert status == 2
    assert "not allowed with" in error


COMMON = {
    "run": "model output method sparsity pattern remove calibration nsamples seqlen device max-memory resume overwrite "
    "format evaluate report",
    "plan": "model method sparsity pattern remove calibration nsamples seqlen device max-memory format list json",
}
"""The options of each verb's ``--help``; ``--help-all`` shows the others too."""


def options_in(text):
    """The options that a help text describes, without those that every verb has."""
    return set(re.findall(r"^ +(?:-\w, )?--([a-z-]+)", text, re.MULTILINE)) - {"help", "help-all", "debug"}


def parser_of(verb):
    return next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices[verb]


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), (["--version"], 0), ([], 2), (["rnu"], 2)])
def test_the_list_of_verbs_does_not_load_torch(argv, status):
    """Torch takes seconds to load."""
    program = (
        "import sys\nfrom ace_ext.cli.main import load, main\nload(sys.argv[1:])\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert (ended.returncode, "torch was loaded" in ended.stderr) == (status, False)


def test_the_list_of_verbs_is_that_of_their_modules(capsys):
    status, shown, _ = call(capsys, "--help")
    assert (status, shown) == (0, build_parser().format_help())


@pytest.mark.parametrize("verb", COMMON)
def test_help_shows_the_common_options(verb, capsys):
    status, out, _ = call(capsys, verb, "--help")
    assert status == 0
    assert options_in(out) == set(COMMON[verb].split())
    assert options_in(re.sub(r"\[|\]", " ", out.split("\n\n")[0])) <= options_in(out)
    assert "\n  -h, --help " in out
    assert "\n  --help-all " in out
    for name, text in (PRESETS | PUBLISHED).items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", out, re.MULTILINE)


@pytest.mark.parametrize("verb", COMMON)
def test_help_all_shows_every_option_and_stage(verb, capsys):
    status, out, _ = call(capsys, verb, "--help-all")
    assert status == 0
    every = {option.removeprefix("--") for action in parser_of(verb)._actions for option in action.option_strings}
    assert options_in(out) == {option for option in every if len(option) > 1} - {"-h", "help", "help-all", "debug"}
    assert options_in(out) > set(COMMON[verb].split())
    for name, metric in METRICS.items():
        assert f"\n  {name:<11}  keeps the highest {metric.formula}\n" in out
    shown = " ".join(out.split())
    for name, stage in STAGES.items():
        assert name == "score" or f" {name} {' '.join(stage.summary.split())} " in shown
        for setting in stage.settings():
            assert f"{setting.name}: {' '.join(setting_help(setting).split())}" in shown
    assert all(f"\n  {name} " in out for name in (PRESETS | PUBLISHED))
    again = call(capsys, verb, "--help")[1]
    assert options_in(again) == set(COMMON[verb].split())  # nothing stays shown, or hidden


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in COMMON])
def test_help_all_is_help_where_that_shows_every_option(verb, capsys):
    assert call(capsys, verb, "--help-all") == call(capsys, verb, "--help")


@pytest.mark.parametrize("verb", ["compare", "eval", "verify", "heal"])
def test_other_verbs_show_all_their_options(verb, capsys):
    out = call(capsys, verb, "--help")[1]
    for action in parser_of(verb)._actions:
        assert action.dest == "help_all" or all(option in out for option in action.option_strings)


UNREAD = {"calibration": "text.txt", "nsamples": 4, "seqlen": 16, "seed": 1, "text-field": "x", "bos": "never"}
UNREAD |= {"evaluate": "never"}


def test_statistics_are_saved_of_dense_blocks_and_read_without_text(place, capsys):
    saved = place / "saved.zip"
    arguments = run_arguments(place, "saving", save_stats=saved, method="wanda + swaps")
    status, out, error = call(capsys, *arguments, "--json")
    assert status == 0, error
    assert json.loads(out)["config"]["method"] == "collect(order=block) + wanda + swaps"

    command = ["run", "--model", place / "dense", "--output", place / "loaded", "--stats", saved, "--method"]
    for option, value in UNREAD.items():
        status, error = bad_run([*command, "swaps", f"--{option}", value], capsys)
        assert status == 2
        assert error == (
            f"ace-prune: a run from --stats reads no calibration text (got --{option}); leave out one of them\n"
        )
    every = [part for option, value in UNREAD.items() for part in (f"--{option}", value)]
    assert (
        "(got --calibration, --nsamples, --seqlen, --seed, --text-field, --bos, --evaluate)"
        in bad_run([*command, "swaps", *every], capsys)[1]
    )
    for options in (["--stats", saved], ["--save-stats", place / "other.zip"]):
        sequential = ["run", "--model", place / "dense", "--output", place / "loaded", *options]
        status, error = bad_run([*sequential, "--method", "collect(order=sequential) + swaps"], capsys)
        assert status == 2
        assert error == (
            "ace-prune: saved statistics are of dense blocks; leave out order=sequential, or write order=block\n"
        )
    assert not (place / "loaded").exists()

    status, out, error = call(capsys, *command, "swaps", "--json")
    assert status == 0, error
    assert json.loads(out)["config"]["method"] == "collect(order=block) + wanda + swaps"
    for name in ("saving", "loaded"):
        assert (place / name / "model.safetensors").is_file()
    weights = [(place / name / "model.safetensors").read_bytes() for name in ("saving", "loaded")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_completion_script_knows_every_verb_and_option(shell, capsys):
    status, out, _ = call(capsys, "--print-completion", shell)
    assert status == 0
    assert all(verb in out for verb in ("run", "heal", "plan", "compare", "eval", "verify"))
    assert all(option in out for option in ("--sparsity", "--method", "--max-dense", "--format"))


def test_progress_goes_to_a_terminal_only(place):
    """With a terminal on stderr, the bar shows blocks, sparsity and remaining time; stdout has only the result."""
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


def test_a_name_that_is_no_utf8(place):
    name = os.fsdecode(b"\xe9.txt")
    done = ace_prune("run", "--model", place / "dense", "--output", place / "never", "--calibration", name)
    assert done.returncode == 2
    assert (
        done.stderr == "ace-prune: arguments must be UTF-8 (got '\\xe9.txt'); rename the file, or use a UTF-8 locale\n"
    )
    assert not (place / "never").exists()


def test_a_field_for_no_text(place, capsys):
    given = ("--model", "dense", "--output", "never", "--text-field", "body", "--evaluate", "never")
    assert "text-field is for .jsonl files (got bundled); leave it out" in call(capsys, "run", *given)[2]


@pytest.mark.parametrize("verb", ["run", "plan", "eval", "compare"])
def test_a_field_without_a_file_that_has_fields(verb, place, capsys):
    text = {"eval": ("--text", "text.txt"), "compare": ("--texts", "text.txt")}.get(verb, ())
    text = ("--calibration", "text.txt", *text) if verb != "eval" else text
    output = ("--output", "never") if verb == "run" else ()
    status, out, error = call(capsys, verb, "--model", "dense", *output, *text, "--text-field", "body")
    assert (status, out) == (2, "")
    assert "text-field is for .jsonl files (got text.txt" in error
    assert not (place / "never").exists()
