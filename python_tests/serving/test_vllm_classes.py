"""Packed models of several classes in vLLM: in float32 they write the tokens of transformers' dense model.

Needs an environment with vLLM, as test_vllm.py does; ``make check-vllm`` runs both. Models are small and random.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

from ace_ext import prune_model
from ace_ext.formats import table_grids_of
from ace_ext.packed.packing import pack
from ace_ext.pruning.method import parse

pytestmark = pytest.mark.vllm

# vLLM 0.32 for CPUs runs heads of 64; with a hidden size of 256 it ends with an illegal instruction on some processors.
SIZES = {"vocab_size": 512, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
ROPE = {"intermediate_size": 512, "num_key_value_heads": 2, "max_position_embeddings": 128}
MIXTURE = {"num_experts_per_tok": 2, "head_dim": 64}
KINDS = ["sliding_attention", "full_attention"]
CLASSES = {
    "gpt2": {"n_positions": 128},  # matrices that are stored transposed
    "phi3": {**ROPE, "pad_token_id": 0},  # q, k and v, and gate and up in one matrix
    "gemma3_text": {**ROPE, "head_dim": 64, "layer_types": KINDS, "vocab_size": 500},  # vLLM adds 12 rows
    "gemma4_text": {  # two blocks read keys and values of others
        **ROPE,
        "num_hidden_layers": 4,
        "layer_types": KINDS * 2,
        "num_kv_shared_layers": 2,
        "head_dim": 64,
        "global_head_dim": 64,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 512,
    },
    "qwen3_moe": {**ROPE, **MIXTURE, "num_experts": 4, "moe_intermediate_size": 256},
    "gpt_oss": {**ROPE, **MIXTURE, "num_local_experts": 4, "layer_types": KINDS},  # transposed experts with biases
}
PROMPTS = [[11, 200, 37, 401], [5, 5, 311, 90, 64, 222, 123, 17, 450], [333]]
TOKENS = 12
WORKER = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64,
          skip_tokenizer_init=True, enforce_eager=True)
settings = SamplingParams(max_tokens=int(sys.argv[3]), temperature=0, detokenize=False, ignore_eos=True)
found = llm.generate([{"prompt_token_ids": one} for one in json.loads(sys.argv[2])], settings, use_tqdm=False)
print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in found]))
"""
RELOAD = """
try:
    llm.collective_rpc("reload_weights")
except Exception as error:
    print("REFUSED", error)
again = llm.generate([{"prompt_token_ids": one} for one in json.loads(sys.argv[2])], settings, use_tqdm=False)
assert [list(one.outputs[0].token_ids) for one in again] == [list(one.outputs[0].token_ids) for one in found]
"""
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def small(kind):
    """A random model whose next token depends on all that it reads: embeddings are small beside what blocks add."""
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **CLASSES[kind]}, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 0.03 if "embed" in name or "wte" in name else 1.5
            parameter.data = torch.randn(parameter.shape, generator=random) * (scale / parameter.shape[-1] ** 0.5)
    return model


def run_vllm(folder: Path, program: str = WORKER) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", program, str(folder), json.dumps(PROMPTS), str(TOKENS)]
    return subprocess.run(call, env=os.environ | SETTINGS, capture_output=True, text=True, cwd=tempfile.gettempdir())


def written_by_vllm(folder: Path) -> list[list[int]]:
    done = run_vllm(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    return json.loads(line.removeprefix("TOKENS "))


def packed(kind: str, method: str, folder: Path) -> transformers.PreTrainedModel:
    """Writes the packed model to ``folder / "packed"`` and returns the dense one."""
    model = small(kind)
    tokens = torch.randint(3, 500, (8, 16), generator=torch.Generator().manual_seed(1))
    report = prune_model(model, tokens, method=parse(method), sparsity=0.5)
    model.save_pretrained(folder / "dense")
    tables = table_grids_of(report)
    result = pack(folder / "dense", folder / "packed", "bitmap", grid=parse(method).grid, tables=tables)
    assert result.matrices
    assert result.tables == len(report.embeddings)
    return model


@pytest.mark.parametrize("method", ["wanda", "wanda + quantize(bits=4, embeddings=8)"])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_tokens_of_the_dense_model(kind, method, tmp_path):
    model = packed(kind, method, tmp_path)
    expected = []
    for prompt in PROMPTS:
        given = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(given), "max_new_tokens": TOKENS, "do_sample": False}
        text = model.generate(given, **options, pad_token_id=0, eos_token_id=None)
        expected.append(text[0, len(prompt) :].tolist())
    assert len({token for text in expected for token in text}) > 2 * len(PROMPTS)  # they do not repeat one token
    assert written_by_vllm(tmp_path / "packed") == expected


def test_a_parameter_that_the_files_lack_is_an_error(tmp_path):
    packed("gemma3_text", "wanda", tmp_path)
    file = tmp_path / "packed/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_bias": True}))
    done = run_vllm(tmp_path / "packed")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert f"InputError: {tmp_path / 'packed'} does not fit its config.json; pack the model again" in message
    assert "model.layers.0.self_attn.qkv_proj.bias" in message


def test_loading_again_is_refused_and_the_model_goes_on(tmp_path):
    packed("phi3", "wanda", tmp_path)
    done = run_vllm(tmp_path / "packed", WORKER + RELOAD)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "REFUSED the weights of a packed model cannot be loaded again while it is served" in done.stdout
