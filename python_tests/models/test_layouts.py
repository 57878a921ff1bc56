"""Matrices that no ``nn.Linear`` owns: ``Conv1D``, experts transposed, interleaved, flattened and parallel, and the
projection that state-space layers multiply by without a call. Each is pruned like a Linear, in memory and in files."""

import copy

import every_class
import pytest
import torch
from folders import TEXT, prune, weights_bytes
from helpers import rest_nightly
from safetensors.torch import load_file
from tiny_models import make_tokenizer, make_tokens
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ace_ext import PruneConfig, load_packed, prune_model
from ace_ext.models.blocks import find_blocks
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.packed.packing import pack, unpack
from ace_ext.pruning.masks import as_rows
from ace_ext.runs.verify import verify

LAYOUTS = ["gpt2", "openai-gpt", "gpt_oss", "llama4", "dbrx", "jetmoe", "mamba"]
layouts = pytest.mark.parametrize("kind", LAYOUTS)


def save(folder, kind, dtype=torch.bfloat16, **more):
    every_class.build(kind, dtype).save_pretrained(folder, **more)
    make_tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


# What each matrix reads, taken from the modules' own calls and formulas


def _conv1d(block):
    """``Conv1D``: ``x W``, ``W [d_in, d_out]``."""
    found, handles = {}, []
    for name, module in block.named_modules():
        if type(module).__name__ == "Conv1D":
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=name: found.update({name: (m.weight.T, args[0].flatten(0, -2))})
                )
            )
    return found, handles


def _interleaved(block):
    """GPT-OSS: gate and up in turn, biases, ``x W[e]``."""
    found = {}

    def note(m, args):
        x, chosen = args[0].reshape(-1, 32), args[1]
        for e in range(m.num_experts):
            routed = x[(chosen == e).any(dim=1)]
            found[f"mlp.experts.{e}.gate_up_proj"] = m.gate_up_proj[e].T, routed
            inner = m._apply_gate(routed @ m.gate_up_proj[e] + m.gate_up_proj_bias[e])
            found[f"mlp.experts.{e}.down_proj"] = m.down_proj[e].T, inner

    return found, [block.mlp.experts.register_forward_pre_hook(note)]


def _transposed(block):
    """Llama-4: every expert gets every token, times 0 where it was not chosen."""
    found = {}

    def note(m, args):
        x = args[0].view(m.num_experts, -1, 32)
        for e in range(m.num_experts):
            routed = x[e][(x[e] != 0).any(dim=1)]
            gate, up = (routed @ m.gate_up_proj[e]).chunk(2, dim=1)
            found[f"feed_forward.experts.{e}.gate_up_proj"] = m.gate_up_proj[e].T, routed
            found[f"feed_forward.experts.{e}.down_proj"] = m.down_proj[e].T, up * m.act_fn(gate)

    return found, [block.feed_forward.experts.register_forward_pre_hook(note)]


def _flattened(block):
    """DBRX: ``[experts * ffn, hidden]``; ``w1`` and ``v1`` as ``x Wᵀ``, ``w2`` as ``x W``."""
    found, path = {}, "ffn.experts.mlp"

    def note(m, args):
        x, chosen, mlp = args[0].reshape(-1, 32), args[1], m.mlp
        for e in range(4):
            routed, rows = x[(chosen == e).any(dim=1)], slice(48 * e, 48 * e + 48)
            found[f"{path}.{e}.w1"] = mlp.w1[rows], routed
            found[f"{path}.{e}.v1"] = mlp.v1[rows], routed
            inner = mlp.activation_fn(routed @ mlp.w1[rows].T) * (routed @ mlp.v1[rows].T)
            found[f"{path}.{e}.w2"] = mlp.w2[rows].T, inner

    return found, [block.ffn.experts.register_forward_pre_hook(note)]


def _parallel(block):
    """JetMoE: inputs sorted by expert, and how many each gets; in attention too."""
    found, handles = {}, []
    for name, module in block.named_modules():
        if type(module).__name__ == "JetMoeParallelExperts":

            def note(m, args, name=name):
                for e, part in enumerate(args[0].split(args[1])):
                    found[f"{name}.{e}.weight"] = m.weight[e], part

            handles.append(module.register_forward_pre_hook(note))
    return found, handles


def _not_called(block):
    """Mamba: ``W xᵀ``; its input is a part of what ``x_proj`` gives."""
    found, mixer = {}, block.mixer
    rank = mixer.time_step_rank
    handle = mixer.x_proj.register_forward_hook(
        lambda m, args, out: found.update({"mixer.dt_proj": (mixer.dt_proj.weight, out[..., :rank].flatten(0, -2))})
    )
    return found, [handle]


READS = dict(
    zip(LAYOUTS, (_conv1d, _conv1d, _interleaved, _transposed, _flattened, _parallel, _not_called), strict=True)
)


def held_inputs(model, kind, tokens, index=0):
    """``{name in the block: (dense matrix [d_out, d_in], inputs [tokens, d_in])}`` of a block, in the dense model."""
    found, handles = READS[kind](find_blocks(model)[index].module)
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (weight.detach().clone(), x.detach()) for name, (weight, x) in found.items()}


@layouts
def test_masks_are_those_of_the_inputs(kind):
    """Wanda's mask of every held matrix of the first block, by the definition; survivors keep their values."""
    model, tokens = every_class.build(kind), make_tokens()
    reads = held_inputs(model, kind, tokens)
    assert len(reads) >= 1
    report = prune_model(model, tokens, PruneConfig("collect(order=block) + wanda"))
    (block, *_), reported = find_blocks(model), {matrix.name: matrix for matrix in report.matrices}
    for name, (dense, x) in reads.items():
        matrix, pruned = reported[block.full_name(name)], block.linears[name].weight
        assert matrix.shape == tuple(dense.shape) == tuple(pruned.shape)
        assert matrix.tokens == len(x)
        score = dense.abs() * (x.double().norm(dim=0).float() if len(x) else 1.0)
        kept = torch.zeros_like(score).scatter_(1, score.topk(score.shape[1] // 2, dim=1).indices, 1.0).bool()
        assert ((pruned != 0) != kept).float().mean() < 2e-3, name
        assert torch.equal(pruned[pruned != 0], dense[pruned != 0]), name


@layouts
def test_a_block_through_its_linears_is_the_block(kind):
    model = every_class.build(kind)
    blocks = find_blocks(model)
    (call,) = capture_calls(model, blocks, [{"input_ids": make_tokens()}])
    with torch.no_grad():
        plain = blocks[0].module(call.hidden, *call.others[0][0], **call.others[0][1])
        found = run_block(blocks[0], call.hidden, call.others[0])
    torch.testing.assert_close(found, plain if isinstance(plain, torch.Tensor) else plain[0])


@layouts
def test_at_sparsity_0_nothing_changes(kind):
    model, tokens = every_class.build(kind), make_tokens()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        prune_model(model, tokens, PruneConfig("wanda", sparsity=0.0))
        assert torch.equal(model(tokens, use_cache=False).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CONFIGS = [
    {},
    {"method": "collect(batch_tokens=32) + wanda", "pattern": "2:4"},
    {"method": "admm"},
    {"method": "obs(gram=cosine)", "group": "row"},
    {"method": "wanda + swaps", "group": "row"},
    {"method": "ace", "group": "matrix"},
    {"group": "model"},
    {"method": "allocate + wanda"},
    {"method": "admm + train(epochs=1)"},
    {"method": "admm + quantize(bits=8)"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", rest_nightly(["llama4"], ["gpt2", "llama4"]))
def test_pruned_files_are_sound(kind, config, tmp_path):
    """From the disk and in memory the same bytes; ``verify`` finds every zero where it should be."""
    dense = save(tmp_path / "dense", kind)
    if config.get("group") == "model" or "allocate" in config.get("method", ""):
        config = {**config, "skip": ["experts"]} if kind == "llama4" else config  # some experts see no token
    report, output = prune(dense, tmp_path / "out", calibration={"source": "tokens"}, **config)
    result = verify(output)
    assert not result.problems
    assert result.loads
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert result.matrices == len(report.matrices)
    if config.get("group") != "model":
        _, other = prune(dense, tmp_path / "disk", {"offload": "disk"}, {"source": "tokens"}, **config)
        assert weights_bytes(other) == weights_bytes(output)


@layouts
def test_files_hold_what_pruning_in_memory_gives(kind, tmp_path):
    dense = save(tmp_path / "dense", kind)
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    prune_model(expected, make_tokens(8, 16), PruneConfig("wanda"))
    for offload in ("none", "disk"):
        _, output = prune(dense, tmp_path / offload, {"offload": offload}, {"source": "tokens"})
        assert load_file(output / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()
        loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
        for name, parameter in expected.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name
        assert not verify(output).problems


def test_a_pruned_gpt2_packs(tmp_path):
    """Its stored matrices are packed as they are, by rows of ``[d_in, d_out]``; loaded, they are dense."""
    dense = save(tmp_path / "dense", "gpt2")
    _, output = prune(dense, tmp_path / "out", calibration={"source": "tokens"}, sparsity=0.7)
    assert pack(output, tmp_path / "packed", "bitmap").matrices == 2 * 4
    unpack(tmp_path / "packed", tmp_path / "again")
    assert weights_bytes(tmp_path / "again") == weights_bytes(output)
    tokens, plain = make_tokens(), AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "packed")(tokens).logits, plain(tokens).logits)


def test_a_transposed_weight_is_pruned_through_a_copy():
    stored = torch.arange(6.0).view(2, 3)
    with as_rows(stored.T) as rows:
        assert rows.is_contiguous()
        rows[0, 1] = 7.0
    assert stored[1, 0] == 7
    with as_rows(stored) as rows:
        assert rows is stored


def test_products_with_other_tensors_stay_products():
    """Only a known matrix, at its address and with its strides, is a call of its Linear, which adds no bias itself."""
    (block, *_), calls = find_blocks(every_class.build("gpt2")), []
    linear = block.linears["attn.c_attn"]
    linear.register_forward_pre_hook(lambda *_: calls.append(1))
    weight, x = block.module.attn.c_attn.weight, torch.randn(5, 32)
    bias = torch.randn(96)
    with block.products():
        torch.testing.assert_close(torch.addmm(bias, x, weight.clone()), torch.addmm(bias, x, weight))
        assert calls == [1]
        torch.testing.assert_close(functional.linear(x, weight.T), x @ weight)
        assert calls == [1] * 3
        weight @ torch.randn(96, 2)
    assert calls == [1] * 3
