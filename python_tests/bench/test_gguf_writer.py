"""GGUF files for llama.cpp, read back by the ``gguf`` package's reader."""

import gguf
import pytest
import torch
import transformers
from folders import save_dense
from helpers import assert_same_bits
from tiny_models import make_model
from transformers import AutoModelForCausalLM

from ace_ext import InputError
from ace_ext.bench.gguf_writer import check_writable, paired_rows, write_gguf

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 64}


def read(path):
    """``(settings, values by name, types by name)``."""
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    values = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return settings, values, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_bf16_holds_the_weights(family, tmp_path):
    dense = save_dense(tmp_path / "dense", family)
    write_gguf(dense, tmp_path / "model.gguf", "bf16")
    settings, values, types = read(tmp_path / "model.gguf")
    weights = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).state_dict()
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    expected = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    if family != "llama-tied":
        expected["output.weight"] = weights["lm_head.weight"]
    for name, value in weights.items():
        if name.startswith("model.layers."):
            _, _, layer, *_, module, kind = name.split(".")
            heads = {"q_proj": 4, "k_proj": 2}.get(module)
            if heads and family != "qwen2":
                value = paired_rows(value, heads)
            expected[f"blk.{layer}.{names[module]}.{kind}"] = value
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(values[name], value.float())
        assert types[name] == ("BF16" if value.dim() == 2 else "F32")
    architecture = "qwen2" if family == "qwen2" else "llama"
    assert settings["general.architecture"] == architecture
    assert settings[f"{architecture}.attention.head_count_kv"] == 2
    assert settings[f"{architecture}.rope.freq_base"] == 10_000
    assert settings["tokenizer.ggml.tokens"] == [f"\u2581{token}" for token in range(64)]


def test_rows_of_a_head_are_paired():
    rows = torch.arange(12)  # two heads of six rows
    assert paired_rows(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    matrix = torch.stack((rows, -rows), dim=1)
    assert torch.equal(paired_rows(matrix, 2)[:, 1], -paired_rows(rows, 2))


@pytest.mark.parametrize(("kind", "steps"), [("q8_0", 127), ("q4_0", 7)])
def test_quantized_types(kind, steps, tmp_path):
    """A value is at most half a step from its own; the step of 32 columns is the largest of them over ``steps``."""
    dense = save_dense(tmp_path / "dense", dtype=torch.float32)
    write_gguf(dense, tmp_path / "model.gguf", kind)
    _, values, types = read(tmp_path / "model.gguf")
    weights = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    assert types["blk.0.ffn_gate.weight"] == kind.upper()
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "BF16"  # 48 columns, not a multiple of 32
    assert types["blk.0.attn_norm.weight"] == "F32"
    own, written = weights["model.layers.0.mlp.gate_proj.weight"], values["blk.0.ffn_gate.weight"]
    largest = own.reshape(len(own), -1, 32).abs().amax(dim=-1, keepdim=True).expand(-1, -1, 32).reshape(own.shape)
    error = (own - written).abs()
    assert (error <= largest / steps * 1.01).all()
    assert error.max() > 0


def test_gemma3_norms_and_window(tmp_path):
    config = transformers.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8, query_pre_attn_scalar=16)
    model = transformers.Gemma3ForCausalLM(config)
    model.save_pretrained(tmp_path / "dense")
    write_gguf(tmp_path / "dense", tmp_path / "model.gguf", "bf16")
    settings, values, _ = read(tmp_path / "model.gguf")
    assert settings["gemma3.attention.sliding_window"] == 8
    assert settings["gemma3.rope.freq_base"] == 1_000_000
    norm = model.model.layers[2].pre_feedforward_layernorm.weight
    assert_same_bits(values["blk.2.ffn_norm.weight"], norm.detach() + 1)


def test_frequencies_of_llama_3_1(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, rope_parameters=rope))
    model.save_pretrained(tmp_path / "dense")
    write_gguf(tmp_path / "dense", tmp_path / "model.gguf", "bf16")
    settings, values, _ = read(tmp_path / "model.gguf")
    assert settings["llama.rope.freq_base"] == 500_000
    plain = 500_000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / values["rope_freqs.weight"], model.model.rotary_emb.inv_freq)
    assert values["rope_freqs.weight"].max() == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "class OPTForCausalLM: only LlamaForCausalLM"),
        ({"architectures": None}, "class None: only"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'yarn' cannot"),
    ],
)
def test_models_that_it_does_not_know(change, message, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    config = model.config.to_dict() | change
    type(model.config)(**config).to_json_file(tmp_path / "config.json")
    with pytest.raises(InputError, match=message):
        check_writable(tmp_path)


def test_a_scale_of_queries_that_llama_cpp_does_not_have(tmp_path):
    config = transformers.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8)
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"by head_dim \(16\), not by query_pre_attn_scalar \(256\)"):
        check_writable(tmp_path)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_that_llama_cpp_does_not_have(family, tmp_path):
    """The tiny Mistral has a sliding window; the tiny Gemma has other kinds of layers than llama.cpp expects."""
    make_model(family).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="leave out --against"):
        check_writable(tmp_path)


def test_a_tensor_without_a_name(tmp_path):
    model = make_model("llama")
    weights = {**model.state_dict(), "model.layers.0.mlp.extra.weight": torch.ones(4, 4)}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match=r"tensor model\.layers\.0\.mlp\.extra\.weight has no name in GGUF"):
        write_gguf(tmp_path, tmp_path / "model.gguf", "bf16")
