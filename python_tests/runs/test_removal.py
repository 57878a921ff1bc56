"""A run that removes structures writes an ordinary smaller checkpoint, says so, and can be resumed."""

import json
import shlex
import subprocess
import sys
import textwrap

import every_class
import pytest
import torch
from folders import call, prune, save_dense, tree, weights_bytes
from safetensors.torch import load_file, save_file
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM

from ace_ext import InputError, PruneConfig
from ace_ext.cards import CARD
from ace_ext.cli import args as shared
from ace_ext.cli.main import build_parser
from ace_ext.records import REPORT_NAME, PruneReport
from ace_ext.runs.options import Calibration, RunOptions
from ace_ext.runs.output import read_report
from ace_ext.runs.plan import make_plan
from ace_ext.runs.verify import verify
from ace_ext.runs.workspace import Workspace

BOTH = "blocks=1 + heads=0.5 + neurons=0.25"
TEXT = {"nsamples": 16, "seqlen": 16}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("removal") / "dense", dtype=torch.float32)


@pytest.fixture(scope="module")
def smaller(dense):
    """A folder without a block, half of the heads and a quarter of the neurons, and its report."""
    report, path = prune(dense, dense.parent / "smaller", calibration=TEXT, method=None, remove=BOTH)
    return path, report


def test_transformers_loads_it_without_this_package(smaller):
    code = f"""
        import sys
        sys.modules["ace_ext"] = None  # an import of it fails
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained({str(smaller[0])!r})
        tokens = AutoTokenizer.from_pretrained({str(smaller[0])!r})("the quick brown fox", return_tensors="pt")
        assert torch.isfinite(model(**tokens).logits).all()
        print(model.config.intermediate_size, model.config.num_hidden_layers, len(model.model.layers))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["36", "2", "2"]


def test_the_report_says_what_was_removed(smaller):
    path, report = smaller
    assert [(r.kind, r.setting, r.before, r.after) for r in report.removed] == [
        ("blocks", "num_hidden_layers", 3, 2),
        ("heads", "num_attention_heads", 4, 2),
        ("neurons", "intermediate_size", 48, 36),
    ]
    assert report.blocks == []
    read = read_report(path)
    assert read == PruneReport.from_json(report.to_json())
    assert read.removed == report.removed
    assert [len(record.cut) for record in read.removed] == [0, 2, 2]
    model = AutoModelForCausalLM.from_pretrained(path)
    assert report.removed[-1].parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert "36" in report.table()
    assert "removed 1 of 3 blocks" in report.table()


def test_a_report_of_a_run_that_removes_nothing_does_not_mention_it(dense, tmp_path):
    _, path = prune(dense, tmp_path / "out")
    assert "remove" not in (path / REPORT_NAME).read_text()


def test_the_card_says_what_was_removed(smaller):
    card = (smaller[0] / CARD).read_text()
    assert "pruned: 1 of 3 blocks removed, 2 of 4 heads removed, 12 of 48 neurons removed" in card
    assert "`intermediate_size` is 36" in card
    assert "sparse" not in card
    assert "mask" not in card


def test_the_command_of_the_card_repeats_the_run(smaller):
    words = shlex.split(smaller[1].extra["command"])
    args = build_parser().parse_args(words[1:])
    assert shared.config_from(args).to_dict() == smaller[1].config == PruneConfig(remove=BOTH).to_dict()


def test_verify_finds_it_sound(smaller):
    result = verify(smaller[0])
    assert result.problems == []
    assert result.loads
    assert result.removed == ["2 of 3 blocks", "2 of 4 heads", "36 of 48 neurons"]


def damaged(folder, tmp_path, **config):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, **config}))
    return copy


def test_verify_finds_another_number_in_the_configuration(smaller, tmp_path):
    copy = damaged(smaller[0], tmp_path, intermediate_size=40)
    assert "config.json: intermediate_size is 40, but the report says 36" in verify(copy).problems


def test_verify_finds_a_report_that_cannot_be(smaller, tmp_path):
    copy = damaged(smaller[0], tmp_path)
    report = json.loads((copy / REPORT_NAME).read_text())
    (neurons,) = (record for record in report["removed"] if record["part"].startswith("neurons"))
    neurons["before"] = 20
    (copy / REPORT_NAME).write_text(json.dumps(report))
    assert "the report says that 36 of 20 neurons are left" in verify(copy).problems


def test_verify_finds_another_shape(smaller, tmp_path):
    copy = damaged(smaller[0], tmp_path)
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name][:, :32].contiguous()}, copy / "model.safetensors")
    assert f"{name}: shape [32, 32], but config.json says [32, 36]" in verify(copy).problems


def test_equal_runs_write_equal_bytes(smaller, dense, tmp_path):
    _, path = prune(dense, tmp_path / "out", calibration=TEXT, method=None, remove=BOTH)
    assert weights_bytes(path) == weights_bytes(smaller[0])
    assert (path / CARD).read_bytes() == (smaller[0] / CARD).read_bytes()


def test_a_finished_run_is_not_made_again(smaller, dense):
    before = tree(smaller[0])
    prune(dense, smaller[0], {"resume": True}, TEXT, method=None, remove=BOTH)
    assert tree(smaller[0]) == before


def test_other_arguments_are_another_run(smaller, dense):
    with pytest.raises(InputError, match="other arguments"):
        prune(dense, smaller[0], {"resume": True}, TEXT, method=None, remove="neurons=0.25")


class Crash(BaseException):
    """Not a subclass of Exception, so that no handler cleans up, as after a kill."""


@pytest.mark.parametrize("place", ["remove", "write"])
def test_a_run_that_died_is_resumed_with_the_same_bytes(smaller, dense, tmp_path, monkeypatch, place):
    def crash(*_, **__):
        raise Crash

    names = {"remove": "ace_ext.structures.remove.without_units", "write": "ace_ext.runs.unfinished.write_manifest"}
    with monkeypatch.context() as patch:
        patch.setattr(names[place], crash)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out", calibration=TEXT, method=None, remove=BOTH)
    assert not (tmp_path / "out").exists()
    _, path = prune(dense, tmp_path / "out", {"resume": True}, TEXT, method=None, remove=BOTH)
    assert weights_bytes(path) == weights_bytes(smaller[0])
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_zeros_after_a_removal_are_resumed_with_the_same_bytes(dense, tmp_path, monkeypatch):
    arguments = {"calibration": TEXT, "method": "admm", "remove": "neurons=0.25", "pattern": "2:4"}
    _, whole = prune(dense, tmp_path / "whole", **arguments)
    real, done = Workspace._write_state, []

    def write(self, *values):
        if len(done) == 2:
            raise Crash
        done.append(None)
        return real(self, *values)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "_write_state", write)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out", **arguments)
    report, path = prune(dense, tmp_path / "out", {"resume": True}, **arguments)
    assert weights_bytes(path) == weights_bytes(whole)
    assert report.removed[0].after == 36
    assert verify(path).problems == []
    assert json.loads((path / "config.json").read_text())["intermediate_size"] == 36


def test_quantized_survivors_of_a_smaller_model(dense, tmp_path):
    report, path = prune(dense, tmp_path / "out", calibration=TEXT, method="quantize(bits=8)", remove="neurons=0.25")
    assert report.quantized
    assert verify(path).problems == []


def test_the_model_is_opened_whole_even_if_memory_is_scarce(dense, tmp_path):
    with pytest.raises(InputError, match="max-memory must be at least") as found:
        prune(dense, tmp_path / "out", {"max_memory": 10**8}, TEXT, method=None, remove="neurons=0.25")
    assert "offload" not in str(found.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"offload": "disk"}, "does not go with offload disk"),
        ({"stats": "s.zip"}, "does not go with stats"),
        ({"save_stats": "s.zip"}, "does not go with save-stats"),
        ({"format": "bitmap"}, "format bitmap stores zeros"),
    ],
)
def test_options_that_remove_does_not_go_with(dense, tmp_path, options, words):
    options = {name: tmp_path / value if "stats" in name else value for name, value in options.items()}
    with pytest.raises(InputError, match=words):
        prune(dense, tmp_path / "out", options, TEXT, method=None, remove="neurons=0.25")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("remove", ["params=0.2", "neurons=0.25(score=auto)"])
def test_one_sample_cannot_compare_candidates(tmp_path, remove):
    """It is refused before the model is opened: there is none."""
    with pytest.raises(InputError, match="give nsamples of at least 2"):
        prune(tmp_path / "no-model", tmp_path / "out", {}, TEXT | {"nsamples": 1}, method=None, remove=remove)


def test_a_pattern_must_fit_the_smaller_model(dense, tmp_path):
    with pytest.raises(InputError, match="pattern 8:16 needs columns in whole groups of 16"):
        prune(dense, tmp_path / "out", calibration=TEXT, remove="neurons=0.25", pattern="8:16")
    assert list(tmp_path.iterdir()) == []


HEALED = {"nsamples": 64, "seqlen": 16}
"""Enough text of the tiny file to hold windows back."""


@pytest.mark.parametrize(
    ("method", "amount"),
    [
        ("distill", {}),
        pytest.param("wanda + distill", {"sparsity": 0.5}, marks=pytest.mark.nightly),
        pytest.param("quantize(bits=8) + distill", {}, marks=pytest.mark.nightly),
    ],
)
def test_distilled_after_a_removal(dense, tmp_path, method, amount):
    """The second part reads the dense model from its files, and trains the smaller one towards it."""
    report, path = prune(dense, tmp_path / "out", calibration=HEALED, method=method, remove=BOTH, **amount)
    assert report.healing is not None
    assert report.healing.loss_after <= report.healing.loss_before
    assert [record.after for record in read_report(path).removed] == [2, 2, 36]
    assert verify(path).problems == []
    assert AutoModelForCausalLM.from_pretrained(path).config.intermediate_size == 36


def test_healed_as_a_folder_of_its_own(dense, smaller, tmp_path, capsys):
    text = ["--calibration", str(dense.parent / "text.txt"), "--seqlen", "16", "--tokens", "1024"]
    command = ["heal", str(smaller[0]), "--output", str(tmp_path / "healed"), *text]
    status, _, error = call(capsys, *command)
    assert status == 0, error
    healed = read_report(tmp_path / "healed")
    assert healed.healing is not None
    assert healed.removed == smaller[1].removed
    assert verify(tmp_path / "healed").problems == []
    other = save_dense(tmp_path / "other", "llama-tied", torch.float32)
    status, _, error = call(capsys, *command[:-1], "512", "--dense", str(other), "--overwrite")
    assert status == 2
    assert "dense must be the model that was pruned" in error


def test_a_plan_has_the_sizes_of_the_run(smaller, dense):
    text = Calibration(str(dense.parent / "text.txt"), **TEXT)
    config = PruneConfig(remove=BOTH)
    plan = make_plan(str(dense), config, text, RunOptions(), torch.device("cpu"))
    sizes = [(r.part, r.setting, r.before, r.after, r.parameters_after) for r in plan.removed]
    assert sizes == [(r.part, r.setting, r.before, r.after, r.parameters_after) for r in smaller[1].removed]
    assert plan.matrices == []
    weights = sum(tensor.nbytes for tensor in load_file(smaller[0] / "model.safetensors").values())
    assert plan.output_bytes == weights
    assert "removes 12 of 48 neurons" in plan.table()
    assert "removes 1 of 3 blocks" in plan.table()
    assert json.loads(plan.to_json())["removed"][2]["after"] == 36


@pytest.mark.parametrize("remove", ["neurons=0.25", "blocks=1", "params=0.2"])
def test_a_plan_with_a_distillation_after_the_removal(remove, dense):
    text = Calibration(str(dense.parent / "text.txt"), **TEXT)
    plan = make_plan(str(dense), PruneConfig("distill", remove=remove), text, RunOptions(), torch.device("cpu"))
    assert plan.removed
    assert plan.matrices == plan.dense == []
    assert {"remove", "distill"} <= plan.seconds.keys()
    assert "blocks" not in plan.seconds


def saved(folder, kind):
    """A tiny model of a class, with a tokenizer, as text to calibrate on."""
    every_class.build(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return ["--model", folder, "--calibration", "bundled", "--nsamples", 2, "--seqlen", 8]


def test_a_plan_says_where_its_bytes_are_an_estimate(dense, tmp_path, capsys):
    config, text = PruneConfig(remove="blocks=1"), Calibration(str(dense.parent / "text.txt"), **TEXT)
    assert not make_plan(str(dense), config, text, RunOptions(), torch.device("cpu")).estimate
    status, out, error = call(capsys, "plan", *saved(tmp_path / "hybrid", "minimax"), "--remove", "blocks=1")
    assert status == 0, error
    assert "parameters and bytes are an estimate: the blocks differ in size" in out


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_matrices_of_an_unknown_layout_do_not_hinder_a_removal_alone(tmp_path, capsys, verb):
    """Zamba's Mamba matrices are of such a layout. What hinders it is that its blocks share weights."""
    given = [verb, *saved(tmp_path / "zamba", "zamba"), *(["--output", tmp_path / "out"] if verb == "run" else [])]
    assert "is in no layout that can be pruned" in call(capsys, *given)[2]
    status, _, error = call(capsys, *given, "--remove", "neurons=0.25")
    assert status == 2
    assert "is the same tensor as" in error


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize("remove", [(), ("--remove", "neurons=0.25")])
def test_a_draft_model_is_refused(tmp_path, capsys, verb, remove):
    given = [*saved(tmp_path / "draft", "gemma4_unified_assistant"), *remove]
    status, _, error = call(capsys, verb, *given, *(["--output", tmp_path / "out"] if verb == "run" else []))
    assert status == 2
    assert "Gemma4UnifiedAssistantForCausalLM does not take tokens alone" in error
    assert len(error.strip().splitlines()) == 1 or verb == "run"  # a run shows its progress
    assert not (tmp_path / "out").exists()


def test_a_page_is_written(dense, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = ["--calibration", str(dense.parent / "text.txt"), "--nsamples", "16", "--seqlen", "16"]
    for name, options in {"alone": (), "zeros": ("--pattern", "2:4")}.items():
        page = tmp_path / f"{name}.html"
        command = ["run", "--model", str(dense), "--output", str(tmp_path / name), "--remove", BOTH, *options, *text]
        status, _, error = call(capsys, *command, "--report", str(page))
        assert status == 0, error
        assert "Removed 12 of 48 neurons of each of 2 blocks" in page.read_text()


def test_the_log_has_a_line_for_each_step(dense, tmp_path, capsys):
    text = ["--calibration", str(dense.parent / "text.txt"), "--nsamples", "16", "--seqlen", "16"]
    log = tmp_path / "log.json"
    command = ["run", "--model", str(dense), "--output", str(tmp_path / "out"), "--remove", BOTH, *text]
    assert call(capsys, *command, "--log-json", str(log))[0] == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [(line["kind"], line["done"], line["of"]) for line in lines if line["event"] == "remove"]
    assert steps == [("blocks", 1, 1), *((kind, done, 2) for kind in ("heads", "neurons") for done in (1, 2))]
    assert lines[-1]["event"] == "end"


def test_experts_in_a_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    mixture = save_dense(tmp_path / "dense", "mixtral", torch.float32)
    text = ["--calibration", str(tmp_path / "text.txt"), "--nsamples", "16", "--seqlen", "16"]
    wanted = ["--model", str(mixture), "--remove", "experts=0.5", *text]
    status, planned, error = call(capsys, "plan", *wanted, "--json")
    assert status == 0, error
    out, page = tmp_path / "out", tmp_path / "page.html"
    status, _, error = call(capsys, "run", *wanted, "--output", str(out), "--report", str(page))
    assert status == 0, error
    (record,) = read_report(out).removed
    assert (record.kind, record.before, record.after) == ("experts", 4, 2)
    assert json.loads(planned)["removed"][0]["parameters_after"] == record.parameters_after
    for block in record.gone:
        assert max(block.scores[expert] for expert in block.experts) <= sorted(block.scores)[1]
    card = (out / CARD).read_text()
    assert "2 of 4 experts removed" in card
    assert "the router's weight" in card
    assert "Removed 2 of 4 experts of each of 3 blocks" in page.read_text()
    assert verify(out).removed == ["2 of 4 experts"]
    assert AutoModelForCausalLM.from_pretrained(out).config.num_local_experts == 2


def test_neurons_of_experts_in_a_run(tmp_path, capsys):
    mixture, out = save_dense(tmp_path / "dense", "mixtral", torch.float32), tmp_path / "out"
    text = ["--calibration", str(tmp_path / "text.txt"), "--nsamples", "16", "--seqlen", "16"]
    wanted = ["--model", str(mixture), "--remove", "experts=0.5 + neurons=0.25", "--pattern", "2:4", *text]
    status, planned, error = call(capsys, "plan", *wanted, "--json")
    assert status == 0, error
    status, _, error = call(capsys, "run", *wanted, "--output", str(out))
    assert status == 0, error
    record = read_report(out).removed[1]
    assert (record.kind, record.setting, record.before, record.after) == ("neurons", "intermediate_size", 48, 36)
    assert json.loads(planned)["removed"][1]["parameters_after"] == record.parameters_after
    found = verify(out)
    assert (found.problems, found.removed) == ([], ["2 of 4 experts", "36 of 48 neurons"])
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.model.layers[0].mlp.experts.down_proj.shape == (2, 32, 36)
    assert loaded.num_parameters() == record.parameters_after


def test_a_share_of_the_parameters_in_a_run(dense, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = ["--calibration", str(dense.parent / "text.txt"), "--nsamples", "16", "--seqlen", "16"]
    wanted = ["--model", str(dense), "--remove", "params=0.3", *text]
    status, planned, error = call(capsys, "plan", *wanted, "--json")
    assert status == 0, error
    out, page = tmp_path / "out", tmp_path / "page.html"
    status, _, error = call(capsys, "run", *wanted, "--output", str(out), "--report", str(page))
    assert status == 0, error
    record = read_report(out).removed[0]
    plans = json.loads(planned)["removed"][0]["tried"]
    assert [one["part"] for one in plans] == [one.part for one in record.tried]
    for one in record.tried:
        assert one.part in page.read_text()
    assert verify(out).problems == []
    assert (
        AutoModelForCausalLM.from_pretrained(out).num_parameters()
        == min(record.tried, key=lambda one: one.divergence).parameters_after
    )


def test_weights_that_stay_dense_lose_structures_too(dense, tmp_path):
    """``skip`` is for zeros."""
    report, path = prune(
        dense,
        tmp_path / "out",
        calibration=TEXT,
        remove="heads=0.5 + neurons=0.25",
        sparsity=0.5,
        skip=("mlp", "o_proj"),
    )
    assert [record.kind for record in report.removed] == ["heads", "neurons"]
    assert {matrix.name.rsplit(".", 1)[1] for matrix in report.matrices} == {"q_proj", "k_proj", "v_proj"}
    assert not verify(path).problems


def test_a_distillation_after_a_removal_is_told(dense, tmp_path):
    report, _ = prune(dense, tmp_path / "out", calibration=TEXT, method="distill(tokens=64)", remove="neurons=0.25")
    assert "distilled on " in report.table()


def test_a_pruned_model_loses_zeros_and_it_is_said(dense, tmp_path, capsys):
    _, pruned = prune(dense, tmp_path / "pruned", calibration=TEXT, pattern="2:4")
    (tmp_path / "text.txt").write_text((dense.parent / "text.txt").read_text())
    command = ["run", "--model", pruned, "--output", tmp_path / "out", "--remove", "neurons=0.25", "--seqlen", 16]
    _, _, error = call(capsys, *command, "--nsamples", 8, "--calibration", tmp_path / "text.txt")
    assert "was pruned or quantized before" in error
    command[2] = prune(dense, tmp_path / "smaller", calibration=TEXT, method=None, remove="neurons=0.25")[1]
    command[4] = tmp_path / "again"
    _, _, error = call(capsys, *command, "--nsamples", 8, "--calibration", tmp_path / "text.txt")
    assert "before" not in error
