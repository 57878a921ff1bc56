"""Packed folders through ``AutoModelForCausalLM.from_pretrained``: the same model as ``load_packed`` gives."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from folders import save_dense
from helpers import assert_same_bits, rest_nightly
from runtime.test_packed_models import FAMILIES, make_folders, packed_linears
from tiny_models import make_tokens
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline

import ace_ext
from ace_ext.packed.files import SUFFIX
from ace_ext.packed.marking import CONFIG, mark, unmarked
from ace_ext.packed.packing import pack, unpack

ace_ext.register()
NEW = int(transformers.__version__.split(".")[0]) >= 5
from_5_on = pytest.mark.skipif(not NEW, reason="transformers 4 looks for weight files before it asks a quantizer")


@from_5_on
@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_gives_the_model_of_load_packed(family, tmp_path):
    pruned, packed = make_folders(tmp_path, family)
    expected, found = ace_ext.load_packed(packed), AutoModelForCausalLM.from_pretrained(packed)
    assert len(packed_linears(found)) == len(packed_linears(expected)) >= 9
    assert type(found) is type(expected)
    assert not found.training
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    tokens = make_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(found.generate(tokens, **options), expected.generate(tokens, **options))
    found.save_pretrained(tmp_path / "saved")
    for name in ["config.json"] + ["model.safetensors"] * (family != "zamba"):  # which shares matrices
        assert (tmp_path / "saved" / name).read_bytes() == (pruned / name).read_bytes()
    found.to("meta")  # a quantized model would refuse


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("llama"), "llama-tied", torch.bfloat16)


@from_5_on
def test_a_configuration_with_fewer_blocks_is_refused(llama, tmp_path):
    shutil.copytree(llama[1], tmp_path / "edited")
    file = tmp_path / "edited" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    with pytest.raises(ace_ext.InputError, match=r"not in the model: model.layers.\d+.input_layernorm.weight, "):
        AutoModelForCausalLM.from_pretrained(tmp_path / "edited")


@from_5_on
def test_dtype_and_attention_are_those_asked_for(llama):
    pruned, packed = llama
    dense = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32, attn_implementation="eager")
    assert AutoModelForCausalLM.from_pretrained(packed).dtype == torch.bfloat16
    found = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, attn_implementation="eager")
    assert {p.dtype for p in (*found.parameters(), *(m.values for m in packed_linears(found)))} == {torch.float32}
    tokens = make_tokens(1, 7)
    with torch.no_grad():
        output = found(tokens, output_attentions=True)
        torch.testing.assert_close(output.logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
    assert output.attentions[0] is not None
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    for name, tensor in dense.state_dict().items():
        assert_same_bits(found.state_dict()[name], tensor)


@from_5_on
@pytest.mark.parametrize("codec", ["nm", "archive"])
def test_other_formats_and_several_files(codec, tmp_path):
    pruned, _ = make_folders(tmp_path, pattern="2:4")
    dense = AutoModelForCausalLM.from_pretrained(pruned)
    dense.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    pack(tmp_path / "sharded", tmp_path / "p", codec, (2, 4))
    assert len(list(tmp_path.glob(f"p/*{SUFFIX}"))) > 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert len(packed_linears(found)) == 21
    tokens = make_tokens(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)


@from_5_on
def test_a_pipeline_by_the_name_of_the_folder(llama):
    _, packed = llama
    text = pipeline("text-generation", model=str(packed), device="cpu")
    assert len(packed_linears(text.model)) == 21
    assert text("the quick", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("the quick")
    assert AutoTokenizer.from_pretrained(packed)("the").input_ids


@from_5_on
def test_what_cannot_be_loaded_is_refused(llama, tmp_path):
    _, packed = llama
    with pytest.raises(
        ace_ext.InputError, match=r"does not hold embed_tokens\.weight of LlamaModel; load .* with AutoM"
    ):
        AutoModel.from_pretrained(packed)
    with pytest.raises(ace_ext.InputError, match="device_map must name one device"):
        AutoModelForCausalLM.from_pretrained(packed, device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(packed, quantization_config=BitsAndBytesConfig())
    dense = save_dense(tmp_path / "dense")
    own = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["ace_ext"]()
    with pytest.raises(ace_ext.InputError, match="packed by ace-prune pack"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=own)


PROGRAM = """
import os, sys
before = dict(os.environ), list(sys.meta_path)
for name in sys.argv[2:]:
    __import__(name)
assert "torch" not in sys.modules or "transformers" in sys.modules  # ace_ext alone loads neither
assert (dict(os.environ), sys.meta_path) == before or "transformers" in sys.modules  # and changes nothing
if "ace_ext" in sys.modules:
    sys.modules["ace_ext"].register()
from transformers import AutoModelForCausalLM
try:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(sum(type(module).__name__ == "PackedLinear" for module in model.modules()))
except OSError as error:
    print(error)
"""


ORDERS = [("ace_ext",), ("transformers.quantizers", "ace_ext"), ()]


@pytest.mark.parametrize("order", rest_nightly(ORDERS[1:], ORDERS))
def test_ace_ext_may_be_registered_before_and_after_transformers(order, llama, tmp_path):
    """Otherwise transformers stops and says why; it never runs a model of random weights."""
    _, packed = llama
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(packed), *order], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    if order and NEW:
        assert done.stdout == "21\n"
    else:
        assert "no file named model.safetensors" in done.stdout
        assert order or "Unknown quantization type, got ace_ext" in done.stderr


def test_the_marked_configuration_comes_back(tmp_path):
    path = tmp_path / CONFIG
    mark(path)
    assert not path.exists()
    path.write_bytes(b'{"name": "\xff"}')  # no UTF-8
    mark(path)
    assert unmarked(path) == b'{"name": "\xff"}'
    for text in (
        '{"a": 1}',
        '{\r\n  "a": {"b": "\u00fc"}\r\n}\r\n',
        ' {"quantization_config": {}, "a": 1}',
        "{}",
        "no JSON",
    ):
        path.write_bytes(text.encode())
        mark(path)
        assert unmarked(path) == text.encode()
        if "a" in text and "quantization" not in text:
            assert json.loads(path.read_bytes())["quantization_config"] == {"quant_method": "ace_ext"}


def test_unpacking_restores_the_configuration(llama, tmp_path):
    pruned, packed = llama
    assert (packed / CONFIG).read_bytes() != (pruned / CONFIG).read_bytes()
    unpack(packed, tmp_path / "again")
    assert (tmp_path / "again" / CONFIG).read_bytes() == (pruned / CONFIG).read_bytes()
