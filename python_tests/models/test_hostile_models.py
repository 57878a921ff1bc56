"""Models that are damaged, or made to do harm: an error that names what is wrong, and nothing written or run."""

import json
import shutil

import pytest
import torch
from folders import bad_input, call, command, prune, save_dense, spawn, tree
from safetensors.torch import load_file, save_file
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from ace_ext import InputError
from ace_ext.models.loading import load_model
from ace_ext.models.safetensors_files import INDEX, SINGLE


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("sound") / "dense")


@pytest.fixture
def dense(sound, tmp_path):
    """A model to damage, and its text beside it."""
    shutil.copy(sound.parent / "text.txt", tmp_path)
    return shutil.copytree(sound, tmp_path / "dense")


def edit(folder, **values):
    """Changes keys of the configuration."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def refused(dense, capsys, message, *options, verbs=("run", "plan", "eval")):
    """Each verb ends with one line and status 2, and leaves everything as it was."""
    before = tree(dense.parent)
    for verb in verbs:
        assert message in bad_input(capsys, verb, dense, *options)
        assert tree(dense.parent) == before


# Names in an index


@pytest.mark.parametrize("name", ["{victim}", "../victim.safetensors", "sub/../../victim.safetensors", "..", ".", ""])
def test_a_shard_outside_the_folder(name, dense, tmp_path, capsys):
    victim = tmp_path / "victim.safetensors"
    shutil.move(dense / SINGLE, victim)
    (dense / "sub").mkdir()
    names = dict.fromkeys(load_file(victim), name.format(victim=victim))
    (dense / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    refused(dense, capsys, "is not the name of a .safetensors file in the same folder", verbs=("run", "plan"))


# Weights that are missing, and weights that are too many


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer_config.json", "more.json"])
def test_a_link_out_of_the_folder_is_not_copied(name, dense, tmp_path, capsys):
    """What it leads to would be in the output, which may be published."""
    (tmp_path / "secret").write_text((dense / name).read_text() if (dense / name).exists() else "{}")
    (dense / name).unlink(missing_ok=True)
    (dense / name).symlink_to("../secret")
    refused(dense, capsys, "outside the model's folder", verbs=("run",))


def test_links_within_the_folder_and_of_a_hub_cache(dense, tmp_path, capsys):
    """A snapshot of the hub's cache is a folder of links to ``blobs``. Weights may lie anywhere."""
    _, whole = prune(dense, tmp_path / "whole")
    snapshot = tmp_path / "cache" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for file in sorted(dense.iterdir()):
        blob = file.rename(tmp_path / "cache" / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (tmp_path / "elsewhere").write_bytes((snapshot / SINGLE).read_bytes())
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(tmp_path / "elsewhere")
    (snapshot / "again.json").symlink_to("config.json")
    shutil.copy(tmp_path / "text.txt", tmp_path / "cache" / "snapshots")
    _, out = prune(snapshot, tmp_path / "out")
    assert (out / SINGLE).read_bytes() == (whole / SINGLE).read_bytes()
    assert not any(file.is_symlink() for file in out.iterdir())


def keep_tensors(folder, keep):
    tensors = {name: tensor for name, tensor in load_file(folder / SINGLE).items() if keep(name)}
    save_file(tensors, folder / SINGLE, {"format": "pt"})


@pytest.mark.parametrize(
    "gone", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_missing_weight_is_named(gone, dense, capsys):
    keep_tensors(dense, lambda name: name != gone)
    refused(dense, capsys, f"missing: {gone}")


def test_an_empty_header(dense, capsys):
    keep_tensors(dense, lambda name: False)
    refused(dense, capsys, "missing: ", verbs=("run", "eval"))


def test_more_layers_than_the_file_has(dense, capsys):
    edit(dense, num_hidden_layers=4)
    refused(dense, capsys, "missing: model.layers.3.")


def test_fewer_layers_than_the_file_has(dense, capsys):
    edit(dense, num_hidden_layers=2)
    refused(dense, capsys, "not in the model: model.layers.2.")
    refused(dense, capsys, "not in the model: model.layers.2.", "--offload", "disk", verbs=("run", "plan"))


def test_a_model_that_gives_outputs_without_names(dense, capsys):
    edit(dense, return_dict=False)
    refused(dense, capsys, "return_dict must be true in config.json, or left out")


def test_a_tensor_that_no_model_reads(dense, capsys):
    save_file({**load_file(dense / SINGLE), "v_head.weight": torch.zeros(1, 32)}, dense / SINGLE, {"format": "pt"})
    refused(dense, capsys, "not in the model: v_head.weight")


def test_buffers_that_older_versions_stored(dense, tmp_path):
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    _, plain = prune(dense, tmp_path / "plain")
    save_file({**load_file(dense / SINGLE), **old}, dense / SINGLE, {"format": "pt"})
    for offload in ("disk", "none"):
        _, out = prune(dense, tmp_path / offload, {"offload": offload})
        found = load_file(out / SINGLE)
        assert all(torch.equal(found[name], tensor) for name, tensor in load_file(plain / SINGLE).items())


def test_a_tied_weight_under_its_other_name(tmp_path):
    """transformers finds it, so it is not missing."""
    dense = save_dense(tmp_path / "dense", "llama-tied")
    _, plain = prune(dense, tmp_path / "plain")
    tensors = load_file(dense / SINGLE)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    _, out = prune(dense, tmp_path / "out")
    blocks = {name: tensor for name, tensor in load_file(out / SINGLE).items() if "layers" in name}
    expected = load_file(plain / SINGLE)
    assert blocks
    assert all(torch.equal(expected[name], tensor) for name, tensor in blocks.items())


def test_a_model_of_another_kind(dense, capsys):
    edit(dense, model_type="bert", architectures=["BertForMaskedLM"])
    refused(dense, capsys, "missing: ", verbs=("plan", "run"))
    edit(dense, model_type="gpt2")
    refused(dense, capsys, "missing: ", verbs=("run",))


@pytest.mark.parametrize("decodes", [False, True])
def test_an_encoder_is_pruned_as_such_unless_it_decodes(decodes, dense, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertLMHeadModel(BertConfig(vocab_size=64, **shape, is_decoder=decodes)).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    report, _ = prune(tmp_path / "bert", tmp_path / "out", calibration={"evaluate": "auto"})
    assert report.sparsity == 0.5
    assert (report.perplexity is not None) == decodes
    assert (report.agreement is None) == decodes


def test_the_api_refuses_random_weights(dense):
    keep_tensors(dense, lambda name: "layers.1" not in name)
    with pytest.raises(InputError, match=r"missing: model\.layers\.1\..* and 6 more"):
        load_model(str(dense))
    assert AutoModelForCausalLM.from_pretrained(dense) is not None  # transformers itself does not mind


# Code among a model's files

CODE = """
import pathlib
pathlib.Path(__file__).parent.joinpath("{mark}").touch()
pathlib.Path({place!r}, "ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder, model_type):
    (folder / "own.py").write_text(CODE.format(mark="ran", place=str(folder.parent)))
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(folder, auto_map=code, model_type=model_type, architectures=["OwnModel"])
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | (own if model_type == "own" else {})))
    return folder


@pytest.fixture
def says_yes(monkeypatch):
    """As ``yes | ace-prune``."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def test_code_does_not_run_on_a_yes(dense, tmp_path, capsys, says_yes):
    refused(with_code(dense, "own"), capsys, "pass --trust-remote-code")
    assert not (tmp_path / "ran").exists()


def test_code_of_a_known_model_does_not_run(dense, tmp_path, capsys, says_yes):
    """transformers has a class for it, which is taken instead."""
    _, out = prune(with_code(dense, "llama"), tmp_path / "out")
    assert call(capsys, "verify", out)[0] == 0
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_pruned_model_does_not_run(dense, tmp_path, capsys, says_yes):
    _, out = prune(dense, tmp_path / "out")
    status, printed, _ = call(capsys, "verify", with_code(out, "own"))
    assert status == 1
    assert "pass --trust-remote-code" in printed
    assert not (tmp_path / "ran").exists()


def test_code_runs_when_asked(dense, tmp_path):
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = spawn(command(with_code(dense, "own"), tmp_path / "out", "--trust-remote-code"), **cache)
    assert run.communicate(timeout=300) is not None
    assert run.returncode == 0
    assert (tmp_path / "ran").exists()
