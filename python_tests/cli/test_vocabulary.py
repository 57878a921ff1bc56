"""One vocabulary for all verbs: names of methods, lengths and texts; and what is given in vain is said."""

import re
import warnings

import pytest
import torch
from folders import bad_input, call, save_dense
from tiny_models import make_model, make_tokenizer, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.cli import compare, main
from ace_ext.compare.method_spec import METHODS, Method
from ace_ext.data.generate import self_generated
from ace_ext.pruning.presets import PRESETS, PUBLISHED, RENAMED_PRESETS, preset_config
from ace_ext.runs import options


def study(*arguments: str):
    return compare.study_from(main.build_parser().parse_args(["compare", "--model", "m", *arguments]))


@pytest.mark.parametrize("name", PRESETS | PUBLISHED)
def test_a_method_is_the_same_for_run_and_compare(name):
    assert Method.parse(name).config(sparsity=0.5) == preset_config(name)


@pytest.mark.parametrize("old", RENAMED_PRESETS)
def test_presets_of_an_earlier_version(old):
    assert old in METHODS or old == "sparsegpt"  # and there it is a metric or a solver, or nothing
    with pytest.warns(FutureWarning, match=f"the preset '{old}' is now called 'published-{old}'"):
        assert preset_config(old) == preset_config(f"published-{old}")


def test_an_earlier_name_on_the_command_line(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense")
    command = ("plan", "--model", dense, "--calibration", tmp_path / "text.txt", "--nsamples", 4, "--seqlen", 8)
    status, _, error = call(capsys, *command, "--preset", "admm")
    assert (status, error) == (0, "ace-prune: the preset 'admm' is now called 'published-admm'\n")
    assert call(capsys, *command, "--preset", "admm", "--quiet")[2] == ""


def test_lengths_as_in_run():
    assert study().grid.lengths == study("--nsamples", "128").grid.lengths == ((128, 128),)
    assert study("--nsamples", "4", "--seqlen", "16").grid == study("--lengths", "4x16").grid
    with pytest.raises(InputError, match="give lengths, or nsamples and seqlen, not both"):
        study("--lengths", "4x16", "--seqlen", "8")
    with pytest.raises(InputError, match="at least 1 sample of at least 2 tokens"):
        study("--seqlen", "1")


def test_one_and_many_have_both_names():
    one = study("--sparsity", "0.6", "--pattern", "2:4", "--seed", "3", "--text", "code-mini")
    assert one == study("--sparsities", "0.6", "--patterns", "2:4", "--seeds", "3", "--texts", "code-mini")
    assert (one.grid.amounts, one.grid.seeds, one.evaluation.texts) == (("0.6", "2:4"), (3,), ("code-mini",))


def test_a_metric_in_vain_is_said(tmp_path, capsys):
    message = "metric wanda has no effect: update admm chooses the mask itself"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in ({"update": "admm"}, {"metric": "wanda", "update": "admm", "refine": "swaps"}, {"metric": "ria"}):
            PruneConfig(**config)
    with pytest.warns(UserWarning, match=message):
        config = PruneConfig("wanda", update="admm+distill")
    assert config.without_distillation() == PruneConfig(update="admm")
    with pytest.warns(UserWarning, match="metric ria has no effect: update obs"):
        Method.parse("ria:update=obs").config(sparsity=0.5)
    dense = save_dense(tmp_path / "dense")
    command = ("plan", "--model", dense, "--calibration", tmp_path / "text.txt", "--nsamples", 4, "--seqlen", 8)
    assert message in call(capsys, *command, "--update", "admm", "--metric", "wanda")[2]
    assert call(capsys, *command, "--update", "admm")[2] == ""


def test_one_pattern_to_skip_is_one():
    assert PruneConfig(skip="k_proj").skip == ("k_proj",)
    report = prune_model(make_model("llama"), make_tokens(), PruneConfig(skip="k_proj"))
    assert len(report.matrices) == 18
    assert not any("k_proj" in matrix.name for matrix in report.matrices)
    with pytest.raises(InputError, match=r"skip 'k_porj' matches no weight of the blocks"):
        prune_model(make_model("llama"), make_tokens(), PruneConfig(skip="k_porj"))


def test_a_budget_is_refused_before_the_model_writes_text(tmp_path, capsys, monkeypatch):
    dense = save_dense(tmp_path / "dense")
    monkeypatch.setattr(options, "load_windows", lambda *_, **__: pytest.fail("text was drawn"))
    assert "did you mean 2GB?" in bad_input(capsys, "run", dense, "--max-memory", "2")
    for budget in ("2MB", "2000000"):
        message = bad_input(capsys, "run", dense, "--max-memory", budget, "--calibration", "self")
        assert "max-memory must be at least" in message


def test_a_bar_while_the_model_writes(capsys):
    model, tokenizer = make_model("llama"), make_tokenizer()
    quiet = self_generated(model, tokenizer, 3, 8, 0)
    assert capsys.readouterr().err == ""
    assert torch.equal(self_generated(model, tokenizer, 3, 8, 0, progress=True), quiet)
    assert re.search(r"writing text: 100%.*21/21", capsys.readouterr().err)


@pytest.mark.parametrize("name", main.VERBS)
def test_examples_of_help_are_commands(name, capsys):
    shown = call(capsys, name, "--help")[1]
    for example in main.module_of(name).EXAMPLES:
        assert f"  ace-prune {example}\n" in shown
        assert main.build_parser().parse_args(example.split()).command == name
