"""All verbs use the same words for methods, lengths and texts. An argument without effect is refused."""

import re
import shlex

import pytest
import torch
from folders import bad_input, call, save_dense
from tiny_models import make_model, make_tokenizer, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.cli import args as shared
from ace_ext.cli import compare, main
from ace_ext.data.generate import self_generated
from ace_ext.pruning.method import PRESETS, PUBLISHED
from ace_ext.runs import options


def study(*arguments: str):
    return compare.study_from(main.build_parser().parse_args(["compare", "--model", "m", *arguments]))


def planned(*arguments: str):
    """The configuration that ``run`` and ``plan`` read."""
    return shared.config_from(main.build_parser().parse_args(["plan", "--model", "m", *arguments]))


@pytest.mark.parametrize("text", [*PRESETS, *PUBLISHED, "wanda", "balanced(damping=0.2)", "ria(exponent=1)+ swaps"])
def test_a_method_is_the_same_for_run_compare_and_python(text):
    (method,) = study("--methods", text).grid.methods
    run = planned("--method", text)
    assert method == run.method == PruneConfig(text).method
    assert method.label == run.method.label
    assert run.to_dict() == PruneConfig(text).to_dict() == PruneConfig(method).to_dict()


def test_the_default_method_of_run_is_that_of_python():
    assert planned().to_dict() == PruneConfig().to_dict()


@pytest.mark.parametrize(
    "options",
    [
        *("--iterations 30", "--floor 0", "--saliency obs", "--max-swaps 5", "--mean-rounds 2", "--gram plain"),
        *("--tune-lr 1", "--tune-epochs 2", "--distill-tokens 5", "--update +", "--update admm", "--refine swaps"),
        *("--preset balanced", "--metric wanda", "--order block", "--allocation owl", "--batch-tokens 5"),
    ],
)
def test_an_option_of_a_stage_is_no_flag(options, tmp_path, capsys):
    error = bad_input(capsys, "plan", save_dense(tmp_path / "dense"), *options.split())
    assert f"unrecognized arguments: {options}" in error


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "obs(iterations=3)",
            "obs has no option iterations: iterations is an option of admm and alps, as in admm(iterations=…)",
        ),
        (
            "balanced(tokens=1000)",
            "balanced has no option tokens: tokens is an option of distill, as in distill(tokens=…)",
        ),
        ("+", "method must be stages joined by +, each a name or name(option=value, …)"),
    ],
)
def test_an_option_outside_its_stage_says_where_it_belongs(method, message, tmp_path, capsys):
    assert f"ace-prune: {message}" in bad_input(capsys, "plan", save_dense(tmp_path / "dense"), "--method", method)
    with pytest.raises(InputError, match=re.escape(message)):
        study("--methods", f"wanda; {method}")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--methodx", "wanda"], "--method"),
        (["--sparsty", "0.5"], "--sparsity"),
        (["--group", "modelz"], "model"),
        (["--method", "balancd"], "balanced"),
        (["--method", "admm(dampign=1)"], "damping"),
        (["--sparsity", "50"], "0.5"),
        (["--calibration", "wiki-mni"], "wiki-mini"),
    ],
)
def test_what_is_nearly_right_is_suggested(arguments, meant, tmp_path, capsys):
    error = bad_input(capsys, "plan", save_dense(tmp_path / "dense"), *arguments)
    assert re.search(rf"; did you mean {meant}\?(; see .*--help)?\n$", error)


def test_a_flag_that_is_an_option_of_a_stage(tmp_path, capsys):
    error = bad_input(capsys, "plan", save_dense(tmp_path / "dense"), "--iterations", "30")
    assert "; iterations is an option of admm and alps, as in admm(iterations=…); see " in error


def test_a_share_that_is_no_number(tmp_path, capsys):
    error = bad_input(capsys, "plan", save_dense(tmp_path / "dense"), "--sparsity", "50%")
    assert "a share from 0 to 1, such as 0.5, was expected (got '50%')" in error


def test_what_is_far_off_is_not_guessed(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense")
    for arguments in (["--colour", "red"], ["--method", "xyz"], ["--group", "zzz"], ["--sparsity", "1000"]):
        assert "did you mean" not in bad_input(capsys, "plan", dense, *arguments)


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
        assert main.build_parser().parse_args(shlex.split(example)).command == name
