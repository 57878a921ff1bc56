"""The option ``embeddings`` of the stage ``quantize``: the token embedding and the LM head of runs on files and in
memory are on the grid, reports and cards say so, and damage is found."""

import json
import re
import shutil

import pytest
import torch
from folders import prune, save_dense, weights_bytes
from helpers import rest_nightly
from tiny_models import make_model, make_tokens
from tiny_networks import make_inputs, make_network

import ace_ext
from ace_ext import InputError, PruneReport, prune_model
from ace_ext.cli.main import main
from ace_ext.engine import embeddings
from ace_ext.grids import Grid
from ace_ext.models.loading import load_model
from ace_ext.models.safetensors_files import Shards
from ace_ext.records import REPORT_NAME
from ace_ext.runs.output import read_report
from ace_ext.runs.verify import verify
from ace_ext.runs.workspace import Workspace

METHOD = "wanda + quantize(bits=4, embeddings=8)"
WITHOUT = "wanda + quantize(bits=4)"
GRID = Grid(8, 128)
ON_TOKENS = {"source": "tokens"}
NAMES = {
    "llama": [["model.embed_tokens.weight"], ["lm_head.weight"]],
    "llama-tied": [["model.embed_tokens.weight", "lm_head.weight"]],
    "gemma3": [["model.embed_tokens.weight", "lm_head.weight"]],
    "opt": [["model.decoder.embed_tokens.weight", "lm_head.weight"]],
    "mixtral": [["model.embed_tokens.weight"], ["lm_head.weight"]],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``dense``, ``plain`` (embeddings as they were) and ``out``."""
    folder = tmp_path_factory.mktemp("tables")
    dense = save_dense(folder / "dense")
    prune(dense, folder / "plain", method=WITHOUT)
    prune(dense, folder / "out", method=METHOD)
    return folder


@pytest.mark.parametrize("family", rest_nightly(["llama-tied", "opt"], NAMES))
def test_only_embedding_and_head_differ_from_a_run_without(family, tmp_path):
    dense = save_dense(tmp_path / "dense", family)
    _, plain = prune(dense, tmp_path / "plain", calibration=ON_TOKENS, method=WITHOUT)
    report, path = prune(dense, tmp_path / "out", calibration=ON_TOKENS, method=METHOD)
    assert [table.names for table in report.embeddings] == NAMES[family]
    before, after = Shards(plain), Shards(path)
    assert before.entries.keys() == after.entries.keys()
    changed = {name for name in after.entries if not torch.equal(before.read(name), after.read(name))}
    assert changed == {after.stored_name(names) for names in NAMES[family]}
    for name, table in zip(sorted(changed, reverse=True), report.embeddings, strict=True):
        was, now = before.read(name).double(), after.read(name)
        assert GRID.recover(now) is not None
        assert table.shape == list(now.shape)
        error = (now.double() - was).square().sum() / was.square().sum()
        assert table.relative_error == pytest.approx(float(error), rel=1e-9)
        assert 0 < table.relative_error < 1e-4
    assert verify(path).problems == []


def test_memory_and_disk_give_the_same_bytes(place, tmp_path):
    expected = weights_bytes(place / "out")
    _, path = prune(place / "dense", tmp_path / "disk", {"offload": "disk"}, method=METHOD)
    assert weights_bytes(path) == expected
    model, tokens = load_model(str(place / "dense")).model, make_tokens(8, 16)
    report = prune_model(model, tokens, method=METHOD)
    stored = Shards(place / "out")
    for table, recorded in zip(report.embeddings, read_report(place / "out").embeddings, strict=True):
        assert table == recorded
        assert torch.equal(model.get_parameter(table.names[0]), stored.read(table.names[0]))


def test_the_tables_of_a_tied_model_stay_tied():
    model = make_model("llama-tied")
    prune_model(model, make_tokens(8, 16), method="quantize(bits=8, embeddings=8)")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_statistics_are_those_of_the_dense_embedding(place):
    """The tables are rounded after the pruning: weights of blocks are those of a run without the option."""
    plain, out = Shards(place / "plain"), Shards(place / "out")
    blocks = [name for name in out.entries if ".layers." in name]
    assert len(blocks) > 20
    for name in blocks:
        assert torch.equal(plain.read(name), out.read(name))


def test_a_resumed_run_keeps_the_records(place, tmp_path, monkeypatch):
    def stop(*_):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "finish", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            prune(place / "dense", tmp_path / "out", method=METHOD)
    report, path = prune(place / "dense", tmp_path / "out", {"resume": True}, method=METHOD)
    assert report.embeddings == read_report(place / "out").embeddings
    assert weights_bytes(path) == weights_bytes(place / "out")


def test_distillation_keeps_them_on_the_grid(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense")
    method = f"{METHOD} + distill(tokens=2048)"
    report, path = prune(dense, tmp_path / "out", calibration={"nsamples": 64}, method=method)
    assert report.healing.tokens
    assert verify(path).problems == []
    prune(dense, tmp_path / "two", calibration={"nsamples": 64}, method=METHOD)
    healed = ["heal", str(tmp_path / "two"), "--output", str(tmp_path / "healed"), "--tokens", "1024"]
    assert main(healed) == 0
    assert verify(tmp_path / "healed").problems == []
    shards = Shards(tmp_path / "two")
    shards.write({"lm_head.weight": shards.read("lm_head.weight") * 2})
    assert main([*healed, "--overwrite"]) == 2
    assert re.search(r"lm_head\.weight of .* differs from .* by more than its rounding", capsys.readouterr().err)
    model = load_model(str(dense)).model
    report = prune_model(model, make_tokens(128, 16), method=method)
    assert report.healing.tokens
    for table in report.embeddings:
        assert GRID.recover(model.get_parameter(table.names[0]).detach()) is not None


def test_report_card_and_table_say_so(place):
    report = read_report(place / "out")
    text = (place / "out" / REPORT_NAME).read_text()
    assert PruneReport.from_json(text) == report
    assert json.loads(text)["embeddings"][1]["names"] == ["lm_head.weight"]
    assert "embeddings" not in json.loads((place / "plain" / REPORT_NAME).read_text())
    assert re.search(r"^lm_head\.weight: rounded to 8 bits, relative squared error 0\.0000\d\d$", report.table(), re.M)
    card, plain = ((place / name / "README.md").read_text() for name in ("out", "plain"))
    assert "`model.embed_tokens.weight` and `lm_head.weight` were rounded to 8 bits. Other embeddings, biases" in card
    assert "Embeddings, the LM head, biases and norms are those of the dense model" in plain


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_verify_finds_a_table_that_left_its_grid(place, name, tmp_path):
    _, path = prune(place / "dense", tmp_path / "out", method=METHOD)
    shards = Shards(path)
    weight = shards.read(name)
    weight[3, 5] = weight[3].abs().max() * 0.501
    shards.write({name: weight})
    assert verify(path).problems == [f"{name}: not on the grid of 8 bits in groups of 128"]


def test_one_table_that_is_not_finite_stops_the_run(tmp_path):
    dense = save_dense(tmp_path / "dense")
    shards = Shards(dense)
    weight = shards.read("lm_head.weight")
    weight[1, 1] = float("inf")
    shards.write({"lm_head.weight": weight})
    with pytest.raises(InputError, match="lm_head"):
        prune(dense, tmp_path / "out", method=METHOD)
    assert not (tmp_path / "out").exists()
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[60, 1] = float("nan")  # a token that the calibration does not use
    before = model.model.embed_tokens.weight.clone()
    tokens = make_tokens(8, 16).clamp(max=50)
    with pytest.raises(InputError, match=r"embed_tokens\.weight holds NaN or infinity"):
        prune_model(model, tokens, method=METHOD)
    assert torch.equal(model.model.embed_tokens.weight.isnan(), before.isnan())


@pytest.mark.parametrize("value", [4, 3, 1, -8, 16])
def test_other_widths_are_refused(value):
    with pytest.raises(InputError, match="embeddings must be one of 0, 8"):
        ace_ext.PruneConfig(method=f"wanda + quantize(embeddings={value})")


def test_a_network_without_tables_is_refused():
    with pytest.raises(InputError, match="has neither; leave it out"):
        prune_model(make_network("dinov2"), make_inputs("dinov2"), method=METHOD)


def test_an_encoder_has_one():
    report = prune_model(make_network("bert"), make_inputs("bert"), method=METHOD)
    assert [table.names for table in report.embeddings] == [["bert.embeddings.word_embeddings.weight"]]


def test_a_run_on_files_rounds_each_table_once(place, tmp_path, monkeypatch):
    rounded, real = [], embeddings._round
    monkeypatch.setattr(embeddings, "_round", lambda *given: rounded.append(given[2][0]) or real(*given))
    prune(place / "dense", tmp_path / "out", method=METHOD)
    assert rounded == ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"bits": 99}, r"ace_report\.json names no grid .*: bits must be one of 8, 4, 3 \(got 99\)"),
        ({"group": 7}, r"ace_report\.json names no grid .*: group must be a multiple of 64 columns \(got 7\)"),
        ({"names": 5}, r"ace_report\.json is not a report .*: names must be a list of names \(got 5\)"),
        ({"names": []}, r"ace_report\.json is not a report .*: names must be a list of names \(got \[\]\)"),
        ({"relative_error": "x"}, r"ace_report\.json is not a report .*: relative_error must be a number \(got 'x'\)"),
        ({"other": 1}, r"ace_report\.json is not a report .*'other'"),
    ],
)
def test_a_damaged_record_is_named(place, edit, message, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    report["embeddings"][0].update(edit)
    (tmp_path / "out" / REPORT_NAME).write_text(json.dumps(report))
    with pytest.raises(InputError, match=message):
        verify(tmp_path / "out")
