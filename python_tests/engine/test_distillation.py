"""The stage ``distill``: the pruned model is distilled from the dense one, in memory and on files, resumable."""

import contextlib
import copy
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest
import torch
from folders import prune, save_dense, weights_bytes
from helpers import rest_nightly
from tiny_models import make_model

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.cli.main import main
from ace_ext.compare.grid import Evaluation, Grid, Study
from ace_ext.compare.runner import run_study
from ace_ext.data.evaluation import text_perplexity
from ace_ext.engine.distillation import distill_draw, heal_settings
from ace_ext.engine.progress import Progress
from ace_ext.healing import distill_
from ace_ext.models.blocks import find_blocks
from ace_ext.models.loading import load_model
from ace_ext.pruning.method import parse, parse_list
from ace_ext.runs import heal_journal
from ace_ext.runs.heal import heal_folder
from ace_ext.runs.heal_request import HealOptions, HealRequest
from ace_ext.runs.heal_text import recorded_text
from ace_ext.runs.options import Calibration, RunOptions
from ace_ext.runs.output import read_report
from ace_ext.runs.plan import make_plan
from ace_ext.runs.verify import verify

TOKENS = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(0))
TRAINS = "distill(tokens=3072, learning_rate=0.0025)"
"""In three steps, if the text is long enough."""
DISTILL = f"admm + {TRAINS}"
MANY = {"nsamples": 64}


def weights(model):
    return {
        block.full_name(child): linear.weight for block in find_blocks(model) for child, linear in block.linears.items()
    }


# --- in memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", rest_nightly(["llama", "mixtral"], ["llama", "opt", "mixtral"]))
@pytest.mark.parametrize(
    "config", [{"method": f"wanda + {TRAINS}"}, {}, {"pattern": "2:4"}, {"method": f"admm + train + {TRAINS}"}]
)
def test_is_pruning_and_then_distillation(family, config):
    dense = make_model(family)
    config = PruneConfig(**{"method": DISTILL, **config})
    expected, model = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_model(expected, TOKENS, config.without_distillation())
    zeros = {name: weight == 0 for name, weight in weights(expected).items()}
    healing = distill_(expected, dense, TOKENS, heal_settings(config, *TOKENS.shape))

    report = prune_model(model, TOKENS, config)
    assert report.healing == replace(healing, seconds=report.healing.seconds)
    assert report.healing.steps == 6
    if config.method.solve is None:  # what solvers leave is hard to lower on so few tokens
        assert report.healing.loss_after < report.healing.loss_before
    assert report.config == config.to_dict()
    for name, weight in weights(model).items():
        assert torch.equal(weight, weights(expected)[name])
        assert torch.equal(weight == 0, zeros[name])


@pytest.mark.parametrize(("windows", "passes"), [(12, 6), (61, 4), (200, 1), (1000, 1)])
def test_a_short_text_is_read_again(windows, passes):
    """3,072 tokens, from 16 for each window that is not held out; at most six times."""
    assert heal_settings(PruneConfig(DISTILL), windows, 16).passes == passes


def test_other_text_than_the_calibration():
    dense = make_model("llama")
    text = torch.randint(0, 64, (20, 16), generator=torch.Generator().manual_seed(1))
    expected, model = copy.deepcopy(dense), copy.deepcopy(dense)
    config = PruneConfig(DISTILL)
    prune_model(expected, TOKENS, config.without_distillation())
    distill_(expected, dense, text, heal_settings(config, *text.shape))
    prune_model(model, [TOKENS], config, distill_text=text)  # samples in several tensors will do then
    for name, weight in weights(model).items():
        assert torch.equal(weight, weights(expected)[name])


def test_compare_reads_the_text_that_a_run_reads(dense, whole, tmp_path):
    text = str(dense.parent / "text.txt")
    method = "best(tokens=3072, learning_rate=0.0025)"
    study = Study(
        str(dense),
        Grid(parse_list(method), lengths=((64, 16),), calibrations=(text,)),
        Evaluation((text,), seqlen=16, windows=4),
    )
    run = run_study(study, torch.device("cpu")).runs[0]
    model = load_model(str(whole))
    found = text_perplexity(model.model, model.tokenizer, text, 16, max_tokens=64)
    assert run.perplexity[text].perplexity == pytest.approx(found.perplexity, rel=1e-6)


def test_best_does_it():
    assert parse("best") == parse("admm + distill")
    assert PruneConfig("best").without_distillation().method == parse("balanced")


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_without_it_the_configuration_is_the_same(pattern):
    config = PruneConfig("cosvar + distill(tokens=2)", pattern=pattern, skip=("k_proj",), max_dense=0.2)
    expected = PruneConfig("cosvar", pattern=pattern, skip=("k_proj",), max_dense=0.2)
    assert config.without_distillation().to_dict() == expected.to_dict()
    assert PruneConfig("wanda").without_distillation().to_dict() == PruneConfig("wanda").to_dict()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([{"input_ids": TOKENS}], r"distill trains on windows .*one tensor \[nsamples, seqlen\] \(got list\)"),
        (TOKENS[:1], r"tokens must be at least two windows"),
    ],
)
def test_refuses_before_any_weight_changes(tokens, message):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        prune_model(model, tokens, PruneConfig(DISTILL))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOKENS[0], r"tokens must be at least two windows .*\(got shape \[16\]\)"),
        (TOKENS[:, :1], r"of two tokens: .*\(got shape \[12, 1\]\)"),
        (TOKENS[:, :0], r"\(got shape \[12, 0\]\)"),
        (TOKENS + 1, r"tokens: ids from 1 to 64 found, but the model knows those from 0 to 63"),
        (TOKENS - 1, r"tokens: ids from -1 to 62 found"),
        (TOKENS.float(), r"tokens: float32 found; use ids in int64 or int32"),
        (TOKENS > 31, r"tokens: bool found"),
        (TOKENS.repeat(1, 9), r"seqlen: 144 found, but the model has 128 positions"),
    ],
)
def test_refuses_text_before_any_weight_changes(text, message):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        prune_model(model, TOKENS, PruneConfig(DISTILL), distill_text=text)
    with pytest.raises(InputError, match=message):
        distill_(model, make_model("llama"), text)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refuses_text_that_nothing_reads():
    with pytest.raises(InputError, match=r"distill_text is given, but nothing trains on it; .* a method with distill"):
        prune_model(make_model("llama"), TOKENS, PruneConfig("wanda"), distill_text=TOKENS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_width(dtype):
    dense = make_model("llama")
    model = copy.deepcopy(dense)
    report = prune_model(model, TOKENS, PruneConfig(DISTILL), distill_text=TOKENS.to(dtype))
    expected = prune_model(dense, TOKENS, PruneConfig(DISTILL))
    assert report.healing.losses == expected.healing.losses


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("admm + distill(tokens=0)", r"tokens must be a whole number of at least 1 \(got 0\)"),
        ("admm + distill(learning_rate=0)", r"learning_rate must be more than 0"),
        ("obs + admm + distill", r"method takes one stage of each kind \(got obs and admm\)"),
        ("distill + admm", r"stages in the order in which they run; write admm \+ distill"),
        ("admm(tokens=9) + distill", r"admm has no option tokens: tokens is an option of distill"),
    ],
)
def test_refuses_settings(method, message):
    with pytest.raises(InputError, match=message):
        PruneConfig(method)


# --- on files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = save_dense(tmp_path_factory.mktemp("distill") / "dense")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    (folder.parent / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=4000)))
    return folder


@pytest.fixture(scope="module")
def whole(dense):
    """The output of a run that is not interrupted."""
    _, path = prune(dense, dense.parent / "whole", calibration=MANY, method=DISTILL)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_is_two_runs(dense, whole, tmp_path):
    prune(dense, tmp_path / "pruned", calibration=MANY, method="admm")
    text = recorded_text(read_report(tmp_path / "pruned"))
    windows, seed = distill_draw(PruneConfig(DISTILL), 16, text.seed)
    text = replace(text, seed=seed)
    settings = heal_settings(PruneConfig(DISTILL), windows, 16)
    assert (windows, seed, settings.passes) == (3 * 64 + 8, 2**20, 1)
    request = HealRequest(
        str(tmp_path / "pruned"), tmp_path / "healed", text, None, settings, HealOptions(windows=windows)
    )
    heal_folder(request)
    assert weights_bytes(whole) == weights_bytes(tmp_path / "healed") != weights_bytes(tmp_path / "pruned")
    report = read_report(whole)
    assert report.config == PruneConfig(DISTILL).to_dict()
    assert report.extra["model"] == str(dense)
    assert report.healing.loss_after < report.healing.loss_before
    assert not verify(str(whole)).problems
    assert ".whole" not in "".join(names(whole.parent))


class Stops(Exception):
    """Where a test ends a run."""


def stop_pruning(patch):
    def stopping(self, block, report):
        raise Stops

    patch.setattr(Progress, "block", stopping)


def stop_between(patch):
    def stopping(self, *arguments):
        raise Stops

    patch.setattr(heal_journal.HealJournal, "__init__", stopping)


def stop_training(patch):
    save = heal_journal.HealJournal.save

    def stopping(self, tensors=()):
        save(self, tensors)
        if self.notes.get("step") == 2:
            raise Stops

    patch.setattr(heal_journal, "SAVE_SECONDS", 0)
    patch.setattr(heal_journal, "SAVE_SHARE", 0)
    patch.setattr(heal_journal.HealJournal, "save", stopping)


@pytest.mark.parametrize("stop", [stop_pruning, stop_between, stop_training])
def test_stopped_and_resumed(stop, dense, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop(patch)
        with pytest.raises(Stops):
            prune(dense, out, calibration=MANY, method=DISTILL)
    assert not out.exists()
    assert ".out.pruned.unfinished" in names(tmp_path)
    other = r"resume: the unfinished run differs from this one: .*method was .*tokens=3072.*, now .*tokens=2\b"
    with pytest.raises(InputError, match=other):
        prune(dense, out, {"resume": True}, MANY, method="admm + distill(tokens=2, learning_rate=0.0025)")
    walked = []
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "start", lambda self, *_: walked.append(1))
        patch.setattr(Progress, "block", lambda *_: None)
        prune(dense, out, {"resume": True}, MANY, method=DISTILL)
    assert len(walked) == (stop is stop_pruning), "a part that was done is not done again"
    assert weights_bytes(out) == weights_bytes(whole)
    assert names(tmp_path) == ["out"]
    again, _ = prune(dense, out, {"resume": True}, MANY, method=DISTILL)
    assert again.healing == read_report(out).healing, "what had finished is not done again"
    assert names(tmp_path) == ["out"]


def test_another_method_leaves_nothing_of_a_stopped_run(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_between(patch)
        with pytest.raises(Stops):
            prune(dense, tmp_path / "out", calibration=MANY, method=DISTILL)
    prune(dense, tmp_path / "out", method="magnitude")
    assert names(tmp_path) == ["out"]


def test_an_unfinished_run_that_writes_an_output_of_that_name_stays(dense, tmp_path):
    other = tmp_path / ".out.pruned.unfinished"
    other.mkdir()
    (other / "state.json").write_text('{"format": 1, "fingerprint": {}, "blocks": []}')
    prune(dense, tmp_path / "out", method="magnitude")
    assert names(tmp_path) == [other.name, "out"]


@pytest.mark.parametrize("stop", [stop_between, None])
def test_another_text_is_not_mixed_with_the_first(stop, tmp_path, monkeypatch):
    """Each part reads the file: one that changes between them, or after both, is that of another run."""
    dense, out = save_dense(tmp_path / "dense"), tmp_path / "out"
    words, text = ["the", "quick", "brown", "fox", "jumps", "over"], tmp_path / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(words, k=20000)))
    with monkeypatch.context() as patch, contextlib.suppress(Stops):
        if stop is not None:
            stop(patch)
        prune(dense, out, calibration=MANY, method=DISTILL)
    assert out.exists() == (stop is None)
    text.write_text(" ".join(random.Random(1).choices(words, k=20000)))
    with pytest.raises(InputError, match=r"calibration\.sha256 was .*, now "):
        prune(dense, out, {"resume": True}, MANY, method=DISTILL)


def test_a_changed_pruned_model_is_named(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_training(patch)
        with pytest.raises(Stops):
            prune(dense, tmp_path / "out", calibration=MANY, method=DISTILL)
    file = tmp_path / ".out.pruned.unfinished" / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"resume: .*model\.safetensors has changed .*start over without --resume"):
        prune(dense, tmp_path / "out", {"resume": True}, MANY, method=DISTILL)


def test_an_older_output_stays_until_the_new_one_is_there(dense, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prune(dense, out)
    before = weights_bytes(out)
    with pytest.raises(InputError, match=r"output folder .* exists; pass --overwrite"):
        prune(dense, out, calibration=MANY, method=DISTILL)
    with monkeypatch.context() as patch:
        stop_training(patch)
        with pytest.raises(Stops):
            prune(dense, out, {"overwrite": True}, MANY, method=DISTILL)
    assert weights_bytes(out) == before
    prune(dense, out, {"overwrite": True}, MANY, method=DISTILL)
    assert weights_bytes(out) == weights_bytes(whole)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("run", "calibration", "method", "message"),
    [
        ({"max_memory": 1000}, {}, DISTILL, r"max-memory must be at least \d+MB here \(got 0MB\)"),
        ({"stats": "x"}, {}, f"collect(order=block) + {DISTILL}", r"distill does not go with stats"),
        ({}, {"source": "nowhere.txt"}, DISTILL, r"nowhere.txt"),
    ],
)
def test_refuses_before_anything_is_written(run, calibration, method, message, dense, tmp_path):
    with pytest.raises(InputError, match=message):
        prune(dense, tmp_path / "out", run, MANY | calibration, method=method)
    assert names(tmp_path) == []


def test_the_plan_counts_it(dense):
    text = Calibration(str(dense.parent / "text.txt"), 64, 16)
    with_it, without = (
        make_plan(str(dense), config, text, RunOptions(), torch.device("cpu"))
        for config in (PruneConfig(DISTILL), PruneConfig("admm"))
    )
    assert "distill" in {phase.phase for phase in with_it.phases}
    assert with_it.seconds["distill"] > 0
    assert "distill" not in without.seconds


def test_from_the_command_line(dense, whole, tmp_path, capsys):
    log = tmp_path / "log"
    text = ["--calibration", str(dense.parent / "text.txt"), "--nsamples", "64", "--seqlen", "16"]
    files = ["--model", str(dense), "--output", str(tmp_path / "out"), "--log-json", str(log)]
    assert main(["run", *files, *text, "--method", DISTILL, "--device", "cpu"]) == 0
    assert "distilled on" in capsys.readouterr().out
    assert weights_bytes(tmp_path / "out") == weights_bytes(whole)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.index("block") < events.index("step")


def test_other_runs_do_not_load_it():
    program = (
        "import sys, ace_ext.runs.pipeline; from ace_ext.engine.progress import Progress; Progress(); "
        "print([name for name in sys.modules if name.startswith('ace_ext.healing')])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
