import json
import os

import pytest
import torch
from folders import prune, save_dense, weights_bytes
from transformers import AutoModelForCausalLM

from ace_ext import InputError
from ace_ext.formats import dense as dense_format
from ace_ext.models.loading import load_model
from ace_ext.runs.output import check_output, read_report


@pytest.fixture
def folder(tmp_path):
    """A dense model on disk."""
    return save_dense(tmp_path / "dense", "llama-tied")


def test_round_trip(folder, tmp_path):
    report, out = prune(folder, tmp_path / "a" / "out")
    again = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    dense = load_model(str(folder))
    for (name, after), before in zip(again.named_parameters(), dense.model.parameters(), strict=True):
        kept = after != 0 if name.endswith("proj.weight") else torch.ones_like(after, dtype=torch.bool)
        assert torch.equal(after[kept], before[kept]), name
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert read_report(out) == report
    assert load_model(str(out)).tokenizer("the fox").input_ids == dense.tokenizer("the fox").input_ids
    assert os.listdir(tmp_path / "a") == ["out"]


def test_files_are_as_readable_as_others(folder, tmp_path):
    _, out = prune(folder, tmp_path / "out")
    (tmp_path / "plain").touch()
    assert {f.stat().st_mode for f in out.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_same_run_same_bytes(folder, tmp_path):
    first, second = (weights_bytes(prune(folder, tmp_path / name)[1]) for name in ("one", "two"))
    assert first == second


def test_existing_output_needs_overwrite(folder, tmp_path):
    _, out = prune(folder, tmp_path / "out")
    before = weights_bytes(out)
    with pytest.raises(InputError, match="exists; pass --overwrite"):
        prune(folder, out)
    prune(folder, out, {"overwrite": True}, sparsity=0.7)
    assert weights_bytes(out) != before
    assert sorted(os.listdir(tmp_path)) == ["dense", "out", "text.txt"]


def test_a_failed_write_leaves_the_old_output(folder, tmp_path, monkeypatch):
    _, out = prune(folder, tmp_path / "out")
    before = weights_bytes(out)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dense_format, "copy_model", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        prune(folder, out, {"overwrite": True})
    assert weights_bytes(out) == before


def test_check_output_refuses_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for output, overwrite, message in [
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "file" / "out", False, "cannot be written"),
        (tmp_path / "photos", False, "exists; pass --overwrite"),
        (tmp_path / "photos", True, "has no ace_manifest.json, so ace-prune did not write it"),
    ]:
        with pytest.raises(InputError, match=message):
            check_output(output, overwrite)
    check_output(tmp_path / "new" / "deep" / "out", False)
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "is not a folder, a .gguf file or a hub name"),
        ("./nothing", "is not a folder"),
        ("nothing", "is not a folder"),
        ("/no/such.gguf", "is not a file"),
    ],
)
def test_missing_models(source, message):
    with pytest.raises(InputError, match=message):
        load_model(source)


def test_broken_model_folders(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="could not be loaded"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match="dtype must be auto, float32"):
        load_model(str(tmp_path), dtype="int8")


def test_quantized_models_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        load_model(str(folder))


def test_reports_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"has no ace_report\.json"):
        read_report(tmp_path)
    for text in ("{", "{}", "[]"):
        (tmp_path / "ace_report.json").write_text(text)
        with pytest.raises(InputError, match="is not a report of ace-prune"):
            read_report(tmp_path)


def test_sharded_models(tmp_path):
    dense = save_dense(tmp_path / "dense", max_shard_size="20KB")
    assert len(list(dense.glob("*.safetensors"))) > 1
    _, out = prune(dense, tmp_path / "out")
    assert weights_bytes(out).keys() == weights_bytes(dense).keys()
    AutoModelForCausalLM.from_pretrained(out)
