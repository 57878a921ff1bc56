"""The beginning of text: which windows begin with the BOS token, how ``auto`` decides, and that all records say so."""

import json
import math
import warnings

import pytest
import torch
from folders import command, prune, weights_bytes
from tiny_models import (
    DENSE_FAMILIES,
    MIXTURES,
    make_english_model,
    make_english_tokenizer,
    make_model,
    make_tokenizer,
    make_tokens,
)
from torch.nn import functional

from ace_ext import InputError
from ace_ext.cli.main import main
from ace_ext.data import bos
from ace_ext.data.bos import BosChoice, choose_bos, default_mode, text_ids
from ace_ext.data.evaluation import text_perplexity
from ace_ext.data.perplexity import perplexity
from ace_ext.data.windows import evaluation_tokens, load_windows, token_windows
from ace_ext.models.block_store import OffloadedBlocks, ResidentBlocks
from ace_ext.models.blocks import find_blocks
from ace_ext.models.loading import load_model
from ace_ext.models.products import float32_products
from ace_ext.models.safetensors_files import Shards
from ace_ext.models.skeleton import skeleton
from ace_ext.models.whole_forward import whole_logits
from ace_ext.runs.options import Calibration
from ace_ext.runs.workspace import Workspace

BOS, EOS = 1, 2
WORDS = "the sun takes about eight minutes to reach the earth and the sky looks blue at noon . " * 20


@pytest.fixture(scope="module")
def needy():
    return make_english_model(needs_bos=True)


@pytest.fixture(scope="module")
def plain():
    return make_english_model(needs_bos=False)


@pytest.fixture(scope="module")
def folders(needy, plain, tmp_path_factory):
    """Folders of models by name, each with ``text.txt`` beside it: one that needs the token and does not say so, one
    that does not need it, one whose tokenizer adds it, and one whose tokenizer has none."""
    found = {}
    for name, model, tokenizer in (
        ("needy", needy, make_english_tokenizer()),
        ("plain", plain, make_english_tokenizer()),
        ("adds", plain, make_english_tokenizer(adds_bos=True)),
        ("none", plain, make_english_tokenizer(has_bos=False)),
    ):
        found[name] = tmp_path_factory.mktemp(name) / "dense"
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
        (found[name].parent / "text.txt").write_text(WORDS)
    return found


# The choice


@pytest.mark.parametrize(
    ("tokenizer", "model", "token", "why"),
    [
        ({"has_bos": False}, "needy", None, "the tokenizer has none"),
        ({"adds_bos": True}, "plain", BOS, "the tokenizer begins each text with it"),
        ({}, "needy", BOS, "perplexity {} with it and {} without it, on a short text"),
        ({}, "plain", None, "perplexity {} with it and {} without it, on a short text"),
    ],
)
def test_auto(tokenizer, model, token, why, request):
    choice = choose_bos("auto", make_english_tokenizer(**tokenizer), request.getfixturevalue(model))
    assert (choice.mode, choice.token, choice.decided) == ("auto", token, True)
    figures = [float(word) for word in choice.why.split() if word.replace(".", "").isdigit()]
    assert choice.why == why.format(*(f"{figure:.2f}" for figure in figures))
    if figures:
        assert (figures[1] / figures[0] > 1.1) == (token is not None)


def test_measured_perplexities_are_over_the_same_targets(needy):
    """By hand: two windows of half the text each, every token but the first, with and without the token before."""
    tokenizer = make_english_tokenizer()
    ids = torch.tensor(tokenizer(bos._TEXT).input_ids)
    windows = ids[:256].view(2, 128)
    losses = {}
    with torch.no_grad():
        for name, batch in (("with", bos.begin_with(BOS, windows)), ("without", windows)):
            logits = needy(batch).logits[:, -128:-1].float()
            losses[name] = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()
    why = choose_bos("auto", tokenizer, needy).why
    assert [float(word) for word in why.split() if "." in word] == pytest.approx([*losses.values()], rel=1e-2)


@pytest.mark.parametrize("tokenizer", [{}, {"adds_bos": True}])
def test_always_and_never_do_not_measure(tokenizer):
    tokenizer = make_english_tokenizer(**tokenizer)
    assert choose_bos("always", tokenizer) == BosChoice("always", BOS, "as set")
    assert choose_bos("never", tokenizer).token is None


def test_without_a_model_auto_may_stay_undecided():
    undecided = choose_bos("auto", make_english_tokenizer())
    assert (undecided.decided, undecided.token) == (False, None)
    assert str(undecided).startswith("bos auto: undecided (its tokenizer has a BOS token and does not add it")
    assert choose_bos("auto", make_english_tokenizer(adds_bos=True)).token == BOS


def test_a_text_of_unknown_words_measures_nothing():
    choice = choose_bos("auto", make_tokenizer(), make_model("llama"))
    assert (choice.token, choice.why) == (None, bos._NO_ENGLISH)


@pytest.mark.parametrize(
    ("mode", "tokenizer", "message"),
    [
        ("perhaps", {}, "bos: 'perhaps' found; use one of auto, always, never"),
        ("always", {"has_bos": False}, "bos: 'always' found, but the tokenizer has no BOS token; use auto or never"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(mode, tokenizer, message):
    with pytest.raises(InputError) as error:
        choose_bos(mode, make_english_tokenizer(**tokenizer))
    assert str(error.value) == message


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_a_tokenizer_of_another_model_is_refused(mode, plain):
    small = make_english_model(needs_bos=False)
    small.resize_token_embeddings(1)
    with pytest.raises(InputError, match="its first token has id 1, but the model knows ids below 1"):
        choose_bos(mode, make_english_tokenizer(), small)


def test_a_model_of_few_positions_is_measured_within_them(needy):
    model = make_english_model(needs_bos=False)
    model.config.max_position_embeddings = 9
    read = []
    model.register_forward_pre_hook(lambda _, args, given: read.append(given["input_ids"].shape), with_kwargs=True)
    assert choose_bos("auto", make_english_tokenizer(), model).decided
    assert read == [(4, 9)]


def test_measuring_leaves_the_training_mode_alone(plain):
    model = make_english_model(needs_bos=False).train()
    choose_bos("auto", make_english_tokenizer(), model)
    assert model.training


def test_published_methods_calibrate_without_it_unless_the_model_writes():
    assert [default_mode(published, own) for published in (True, False) for own in (True, False)] == [
        "auto",
        "never",
        "auto",
        "auto",
    ]


# Windows


@pytest.mark.parametrize("adds", [False, True])
def test_text_has_no_special_tokens(adds):
    tokenizer = make_english_tokenizer(adds_bos=adds)
    expected = make_english_tokenizer()("the sun").input_ids
    assert text_ids("the sun", tokenizer) == expected
    assert text_ids("<s> the sun", tokenizer) == expected  # one that is there all the same
    assert text_ids("the <s> sun", tokenizer)[1] == BOS  # inside it is text


def test_documents_are_joined_by_empty_lines_alone():
    """No EOS and no BOS between documents, and no chat template."""
    tokenizer = make_english_tokenizer(adds_bos=True)
    tokenizer.chat_template = "{{ raise_exception('applied') }}"
    windows = token_windows(["the sun", "the sky"], tokenizer, 3, 4, seed=0)
    assert windows.tolist() == [text_ids("the sun the sky", tokenizer)] * 3


@pytest.mark.parametrize("adds", [False, True])
def test_a_sample_is_the_token_and_a_slice_of_text(adds, tmp_path):
    (tmp_path / "text.txt").write_text(WORDS)
    tokenizer = make_english_tokenizer(adds_bos=adds)
    ids = text_ids(WORDS, tokenizer)
    for mode, width in (("always", 7), ("never", 8)):
        data = load_windows(str(tmp_path / "text.txt"), tokenizer, 20, 8, 0, bos=mode)
        assert data.tokens.shape == (20, 8)
        assert bool((data.tokens[:, 0] == BOS).all()) == (mode == "always")
        slices = {tuple(ids[i : i + width]) for i in range(len(ids) - width + 1)}
        assert {tuple(row[-width:]) for row in data.tokens.tolist()} <= slices
        assert data.bos.mode == mode


def test_a_sample_of_two_tokens_has_one_of_text():
    windows = token_windows(["the sun"], make_english_tokenizer(), 4, 2, seed=0, bos=BOS)
    assert windows.shape == (4, 2)
    with pytest.raises(InputError, match="seqlen: 4 found, but the whole text has 2 tokens; use 3 or less"):
        token_windows(["the sun"], make_english_tokenizer(), 1, 4, seed=0, bos=BOS)


def test_load_windows_measures_its_model_or_warns(needy, tmp_path):
    (tmp_path / "text.txt").write_text(WORDS)
    source, tokenizer = str(tmp_path / "text.txt"), make_english_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_windows(source, tokenizer, 4, 8, 0, model=needy)
    assert data.bos.token == BOS
    assert (data.tokens[:, 0] == BOS).all()
    with pytest.warns(UserWarning, match="undecided .* samples get no BOS token; pass model="):
        without = load_windows(source, tokenizer, 4, 8, 0)
    assert torch.equal(without.tokens, load_windows(source, tokenizer, 4, 8, 0, bos="never").tokens)


@pytest.mark.parametrize(
    ("mode", "has_bos", "first"),
    [("auto", True, BOS), ("always", True, BOS), ("never", True, EOS), ("auto", False, EOS)],
)
def test_text_of_the_models_own_begins_with_it_unless_told_otherwise(plain, mode, has_bos, first, monkeypatch):
    """It has to begin with some token, so nothing is measured."""
    monkeypatch.setattr(bos, "_measured", None)
    data = load_windows("self", make_english_tokenizer(has_bos=has_bos), 3, 8, 0, model=plain, bos=mode)
    assert data.tokens[:, 0].tolist() == [first] * 3
    assert data.bos.token == (BOS if first == BOS else None)


# Perplexity


def test_perplexity_after_the_token_equals_a_plain_loop():
    model, tokens = make_model("llama"), make_tokens(1, 100)[0]
    losses = []
    with torch.no_grad():
        for start in range(0, 90, 15):
            window = torch.cat([torch.tensor([BOS]), tokens[start : start + 15]])
            logits = model(window[None]).logits[0]
            losses += [functional.cross_entropy(logits[t], window[t + 1]).item() for t in range(15)]
    result = perplexity(model, tokens, seqlen=16, bos=BOS)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.windows, result.seqlen, result.tokens, result.bos) == (6, 16, 90, BOS)


@pytest.mark.parametrize("token", [None, BOS])
def test_max_tokens_gives_the_same_number_of_windows(token):
    model, tokens = make_model("llama"), make_tokens(1, 2000)[0]
    assert perplexity(model, tokens, 16, max_tokens=16 * 24 + 3, bos=token).windows == 24


def test_text_perplexity_chooses_or_takes_a_choice(needy, tmp_path):
    (tmp_path / "text.txt").write_text(WORDS)
    source, tokenizer = str(tmp_path / "text.txt"), make_english_tokenizer()
    tokens = evaluation_tokens(source, tokenizer)
    for given, token in (("auto", BOS), ("never", None), (BosChoice("auto", None, "made elsewhere"), None)):
        assert text_perplexity(needy, tokenizer, source, 32, bos=given) == perplexity(needy, tokens, 32, bos=token)


# A model on the disk


def both_ways(folder, family):
    make_model(family, torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    shards = Shards(folder)
    laid_out = skeleton(folder, shards)
    blocks = find_blocks(laid_out, check=False)
    memory = load_model_alone(folder)
    return memory, laid_out, OffloadedBlocks(blocks, shards, "cpu")


def load_model_alone(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("family", [*DENSE_FAMILIES, *MIXTURES])
def test_a_model_on_the_disk_gives_the_same_bits(family, tmp_path):
    memory, laid_out, store = both_ways(tmp_path / "dense", family)
    tied = laid_out.get_output_embeddings().weight is laid_out.get_input_embeddings().weight
    tokens = make_tokens(4, 12)
    expected = whole_logits(memory, ResidentBlocks(find_blocks(memory)), tokens, torch.device("cpu"))
    assert torch.equal(whole_logits(laid_out, store, tokens, torch.device("cpu")), expected)
    if family in DENSE_FAMILIES:  # the experts of a mixture are computed one after the other, in another order of sums
        with torch.no_grad(), float32_products(memory):
            assert torch.equal(memory(tokens).logits, expected)
    assert all(parameter.is_meta for parameter in laid_out.parameters())
    assert tied == (laid_out.get_output_embeddings().weight is laid_out.get_input_embeddings().weight)
    assert "forward" not in store.blocks[0].module.__dict__


def test_one_part_is_in_memory_at_a_time(tmp_path):
    """Neither two blocks nor the embedding and the head."""
    _, laid_out, store = both_ways(tmp_path / "dense", "llama")
    parts = {"embedding": laid_out.model.embed_tokens, "head": laid_out.lm_head, "norm": laid_out.model.norm}
    parts |= {str(index): block.module for index, block in enumerate(store.blocks)}
    seen = []

    def held(p):
        """Whether the parameter has memory of its own; a stand-in is one number, repeated."""
        return not p.is_meta and p.untyped_storage().nbytes() >= p.nbytes

    def loaded(*_):
        seen.append([name for name, part in parts.items() if all(held(p) for p in part.parameters())])

    for part in parts.values():
        list(part.modules())[-1].register_forward_hook(loaded)
    whole_logits(laid_out, store, make_tokens(2, 8), torch.device("cpu"))
    assert seen == [["embedding"], ["0"], ["1"], ["2"], ["norm"], ["head"]]


def test_weights_are_dropped_after_an_error(tmp_path):
    _, laid_out, store = both_ways(tmp_path / "dense", "llama-tied")
    with pytest.raises(IndexError):
        whole_logits(laid_out, store, torch.full((1, 4), 10_000), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in laid_out.parameters())


# Runs


def recorded(path) -> dict:
    return json.loads((path / "ace_report.json").read_text())["extra"]["calibration"]["bos"]


@pytest.mark.parametrize(("name", "token"), [("needy", BOS), ("plain", None), ("adds", BOS), ("none", None)])
def test_a_run_from_the_disk_chooses_and_writes_the_same(name, token, folders, tmp_path):
    choices, outputs = [], []
    for offload in ("none", "disk"):
        _, out = prune(folders[name], tmp_path / offload, {"offload": offload})
        choices.append(recorded(out))
        outputs.append(weights_bytes(out))
    assert choices[0] == choices[1]
    assert choices[0]["token"] == token
    assert outputs[0] == outputs[1]
    _, never = prune(folders[name], tmp_path / "never", calibration={"bos": "never"})
    assert (weights_bytes(never) == outputs[0]) == (token is None)  # otherwise as ever


def test_a_run_says_what_it_chose(folders, tmp_path, capsys):
    arguments = command(folders["adds"], tmp_path / "out")[3:]
    assert main(arguments) == 0
    note = "bos auto: each window begins with token 1 (the tokenizer begins each text with it)"
    assert capsys.readouterr().err == f"ace-prune: {note}\n"
    published = [*arguments, "--overwrite", "--quiet", "--method", "published-wanda"]
    assert main([*published, "--report", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().err == ""
    assert recorded(tmp_path / "out")["mode"] == "never"  # the default of a published method
    assert "bos never: no BOS token" in (tmp_path / "page.html").read_text()
    assert main([*published, "--bos", "auto"]) == 0
    assert recorded(tmp_path / "out")["token"] == BOS


class Crash(BaseException):
    """Not a subclass of Exception, so that no handler cleans up, as after a kill."""


def crash_after_one_block(monkeypatch):
    real, done = Workspace._write_state, []

    def write(self, *arguments):
        if done:
            raise Crash
        done.append(None)
        return real(self, *arguments)

    monkeypatch.setattr(Workspace, "_write_state", write)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_resumed_run_takes_the_recorded_choice(offload, folders, tmp_path, monkeypatch):
    _, whole = prune(folders["needy"], tmp_path / "whole", {"offload": offload})
    crash_after_one_block(monkeypatch)
    with pytest.raises(Crash):
        prune(folders["needy"], tmp_path / "out", {"offload": offload})
    monkeypatch.undo()
    with pytest.raises(InputError, match=r'calibration\.bos\.mode was "auto", now "always"'):
        prune(folders["needy"], tmp_path / "out", {"offload": offload, "resume": True}, {"bos": "always"})
    monkeypatch.setattr(bos, "_measured", lambda *_: pytest.fail("measured again"))
    _, out = prune(folders["needy"], tmp_path / "out", {"offload": offload, "resume": True})
    assert weights_bytes(out) == weights_bytes(whole)
    assert recorded(out) == recorded(whole)


def test_a_damaged_state_is_refused_as_ever(folders, tmp_path, monkeypatch):
    crash_after_one_block(monkeypatch)
    with pytest.raises(Crash):
        prune(folders["needy"], tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / ".out.unfinished" / "state.json").write_text('{"fingerprint": [1]}')
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        prune(folders["needy"], tmp_path / "out", {"resume": True})


def test_a_mode_that_is_none_is_refused_first(folders, tmp_path):
    with pytest.raises(InputError, match=r"bos must be one of auto, always, never \(got 'perhaps'\)"):
        prune(folders["plain"], tmp_path / "out", calibration={"bos": "perhaps"})
    with pytest.raises(InputError, match="the tokenizer has no BOS token; use auto or never"):
        prune(folders["none"], tmp_path / "out", calibration={"bos": "always"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "printed"),
    [
        ("needy", [], "bos auto: undecided (its tokenizer has a BOS token and does not add it, so the model must be"),
        ("adds", [], "bos auto: each window begins with token 1 (the tokenizer begins each text with it)"),
        ("needy", ["--bos", "always"], "bos always: each window begins with token 1 (as set)"),
        ("none", [], "bos auto: no BOS token (the tokenizer has none)"),
    ],
)
def test_a_plan_says_what_it_knows(name, options, printed, folders, capsys):
    dense = folders[name]
    text = ["--calibration", str(dense.parent / "text.txt"), "--nsamples", "4", "--seqlen", "16"]
    assert main(["plan", "--model", str(dense), *text, *options]) == 0
    assert printed in capsys.readouterr().out
    assert main(["plan", "--model", str(dense), *text, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bos"]
    assert found["mode"] == (options[-1] if options else "auto")


def evaluated(capsys, *options) -> dict:
    assert main(["eval", *map(str, options), "--seqlen", "32", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluation_is_that_of_the_dense_model(folders, tmp_path, capsys, monkeypatch):
    """The pruned folder's own tokenizer and weights are not asked again: its run recorded the dense model's choice."""
    dense = folders["needy"]
    text = dense.parent / "text.txt"
    found = evaluated(capsys, "--model", dense, "--text", text)
    assert (found["bos"], found["bos_choice"]["mode"]) == (BOS, "auto")
    assert found["perplexity"] < evaluated(capsys, "--model", dense, "--text", text, "--bos", "never")["perplexity"]
    _, out = prune(dense, tmp_path / "out", sparsity=0.9)
    _, own = prune(dense, tmp_path / "own", calibration={"source": "self"})
    measured = []
    real = bos._measured
    monkeypatch.setattr(bos, "_measured", lambda *given: measured.append(1) or real(*given))
    assert evaluated(capsys, "--model", out, "--text", text)["bos_choice"] == recorded(out)
    assert not measured
    evaluated(capsys, "--model", own, "--text", text)  # its record says how the model began its own text
    assert len(measured) == 1
    (out / "ace_report.json").write_text("{}")
    evaluated(capsys, "--model", out, "--text", text)
    assert len(measured) == 2


def test_what_changes_no_weight_is_in_the_fingerprint():
    assert Calibration(bos="always") != Calibration()


# Comparisons


def compare(dense, output, *options) -> list[dict]:
    text = str(dense.parent / "text.txt")
    given = ["--model", str(dense), "--calibration", text, "--texts", text, "--lengths", "4x16", "--eval-seqlen", "16"]
    assert main(["compare", *given, "--device", "cpu", "--output", str(output), *options]) == 0
    return [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]


def test_a_comparison_evaluates_all_alike_and_calibrates_published_methods_without(folders, tmp_path, capsys):
    dense = folders["needy"]
    text = str(dense.parent / "text.txt")
    settings, first, *runs = compare(dense, tmp_path / "out", "--methods", "published-wanda; wanda", "--markdown")
    assert (settings["settings"]["bos"], settings["settings"]["eval_bos"]) == (None, "auto")
    assert first["bos"]["token"] == BOS
    assert first["dense"][text]["bos"] == BOS
    assert [run["run"]["perplexity"][text]["bos"] for run in runs] == [BOS, BOS]
    assert [(run["run"]["bos"]["mode"], run["run"]["bos"]["token"]) for run in runs] == [("never", None), ("auto", BOS)]
    loaded = load_model(str(dense))
    for run, mode in zip(runs, ("never", "auto"), strict=True):
        data = load_windows(text, loaded.tokenizer, 4, 16, 0, model=loaded.model, bos=mode)
        assert run["run"]["tokens_sha256"] == data.sha256
    printed = capsys.readouterr()
    assert "Evaluation: bos auto: each window begins with token 1" in printed.out
    assert "Calibration of published-wanda: bos never: no BOS token" in printed.out
    assert printed.err.startswith("ace-prune: bos auto: each window begins with token 1 (perplexity ")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["bos"] == first["bos"]


def test_published_methods_run_twice_if_asked(folders, tmp_path, capsys):
    """A folder that has the first runs goes on with the second ones."""
    compare(folders["needy"], tmp_path / "out", "--methods", "published-wanda; wanda")
    again = ("--methods", "published-wanda; wanda", "--bos", "both", "--markdown")
    runs = [line["run"] for line in compare(folders["needy"], tmp_path / "out", *again)[2:]]
    assert [(run["cell"]["method"], run["bos"]["mode"], run["bos"]["token"]) for run in runs] == [
        ("published-wanda", "never", None),
        ("wanda", "auto", BOS),
        ("published-wanda with BOS", "auto", BOS),
    ]
    assert runs[2]["tokens_sha256"] == runs[1]["tokens_sha256"]
    assert runs[2]["config"] == runs[0]["config"]
    assert "Calibration of wanda, published-wanda with BOS: bos auto: each window" in capsys.readouterr().out


def test_a_comparison_goes_on_with_the_recorded_choice(folders, tmp_path, monkeypatch):
    compare(folders["needy"], tmp_path / "out", "--methods", "wanda")
    monkeypatch.setattr(bos, "_measured", lambda *_: pytest.fail("measured again"))
    runs = compare(folders["needy"], tmp_path / "out", "--methods", "wanda; ace")[2:]
    assert [run["run"]["bos"]["token"] for run in runs] == [BOS, BOS]


@pytest.mark.parametrize("name", ["bos", "eval_bos"])
def test_other_beginnings_are_refused_by_name(name, folders, tmp_path, capsys):
    compare(folders["adds"], tmp_path / "out", "--methods", "wanda")
    flag = f"--{name.replace('_', '-')}"
    dense = folders["adds"]
    text = str(dense.parent / "text.txt")
    given = ["--model", str(dense), "--calibration", text, "--texts", text, "--lengths", "4x16", "--eval-seqlen", "16"]
    status = main(["compare", *given, "--device", "cpu", "--output", str(tmp_path / "out"), flag, "never"])
    assert status == 2
    assert f"{name} was " in capsys.readouterr().err


def test_a_comparison_can_set_either(folders, tmp_path):
    text = str(folders["adds"].parent / "text.txt")
    options = ("--methods", "wanda; published-wanda", "--bos", "always", "--eval-bos", "never")
    _, first, *runs = compare(folders["adds"], tmp_path / "out", *options)
    assert first["dense"][text]["bos"] is None
    assert [run["run"]["bos"]["token"] for run in runs] == [BOS, BOS]
    assert [run["run"]["perplexity"][text]["bos"] for run in runs] == [None, None]


def test_published_methods_share_the_text_that_the_model_writes(folders, tmp_path):
    runs = compare(folders["plain"], tmp_path / "out", "--methods", "wanda; published-wanda", "--calibration", "self")[
        2:
    ]
    assert runs[0]["run"]["tokens_sha256"] == runs[1]["run"]["tokens_sha256"]
    assert {run["run"]["bos"]["token"] for run in runs} == {BOS}


def test_records_of_earlier_versions_are_read(folders, tmp_path):
    from ace_ext.compare.journal import read_results
    from ace_ext.compare.tables import text_table

    compare(folders["plain"], tmp_path / "out", "--methods", "wanda")
    lines = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    lines[0]["format"] = 1
    for line in lines:
        del line["sha256"]
    del lines[1]["bos"], lines[2]["run"]["bos"]
    for figures in (*lines[1]["dense"].values(), *lines[2]["run"]["perplexity"].values()):
        del figures["bos"]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = read_results(tmp_path / "runs.jsonl")
    assert results.bos is None
    assert results.runs[0].bos is None
    assert "Evaluation: bos" not in text_table(results)
