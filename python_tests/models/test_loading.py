"""What is refused when a model is loaded, and models that are spread over devices by accelerate."""

import json
import shutil

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from folders import bad_input, save_dense
from tiny_models import make_model, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.models.loading import _has_tokenizer, load_model

QUANTIZED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("loading") / "dense")


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights(method, dense, tmp_path, capsys):
    """By the configuration alone: the library of the method need not be there, and no weight is read."""
    folder = shutil.copytree(dense, tmp_path / "quantized")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": QUANTIZED[method]}))
    shutil.copy(dense.parent / "text.txt", tmp_path)
    expected = f"holds {method} weights; give the unquantized checkpoint, or dequantize"
    for verb in ("run", "plan", "eval"):
        assert expected in bad_input(capsys, verb, folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=expected):
        load_model(str(folder))


def test_a_folder_of_an_adapter(dense, tmp_path, capsys):
    """Also where the base model is beside it: without peft transformers would leave the adapter out."""
    folder = shutil.copytree(dense, tmp_path / "adapter")
    shutil.copy(dense.parent / "text.txt", tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/model"}')
    for verb in ("run", "plan", "eval"):
        assert "holds an adapter of PEFT; merge it into its base model first" in bad_input(capsys, verb, folder)


@pytest.mark.parametrize("order", ["sequential", "block"])
def test_a_model_with_hooks_of_accelerate(order):
    """As ``device_map`` leaves them: the hooks stay, and the weights are those of a model without."""
    plain, hooked = make_model("llama"), make_model("llama")
    hooked = dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
    assert hooked.model.layers[0]._hf_hook is not None
    config = PruneConfig(f"collect(order={order}) + wanda")
    prune_model(plain, make_tokens(), config)
    prune_model(hooked, make_tokens(), config)
    assert hooked.model.layers[0]._hf_hook is not None
    assert torch.equal(plain(make_tokens()).logits, hooked(make_tokens()).logits)
    remove_hook_from_module(hooked, recurse=True)
    pairs = zip(plain.state_dict().items(), hooked.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(value, found) for (name, value), (other, found) in pairs)


def test_weights_that_accelerate_keeps_elsewhere():
    """Between calls such a weight is on the meta device, where nothing can be pruned."""
    model = cpu_offload(make_model("llama"), torch.device("cpu"))
    with pytest.raises(InputError, match=r"layers\.0\..*\.weight must be loaded .*got a tensor without data"):
        prune_model(model, make_tokens(), PruneConfig("wanda"))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "vocab.txt", "spiece.model", "qwen.tiktoken"])
def test_a_folder_with_a_tokenizer_is_known_by_its_files(tmp_path, file):
    (tmp_path / "config.json").write_text("{}")
    assert not _has_tokenizer(str(tmp_path))
    (tmp_path / file).write_text("")
    assert _has_tokenizer(str(tmp_path))
