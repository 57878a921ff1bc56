"""Fused experts: each matrix is pruned on the tokens that are routed to its expert, and written to its own tensor."""

import copy
import json
from types import SimpleNamespace

import every_class
import pytest
import torch
from folders import prune, save_dense, weights_bytes
from helpers import rest_nightly
from safetensors.torch import load_file
from tiny_models import MIXTURES, make_model, make_tokenizer, make_tokens
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ace_ext import InputError, PruneConfig, load_packed, prune_model
from ace_ext.engine.context import RunContext
from ace_ext.models.blocks import find_blocks
from ace_ext.models.fused_weights import filled_linear, filled_rows, find_fused
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.models.safetensors_files import Shards
from ace_ext.packed.files import PackedShards
from ace_ext.packed.packing import pack
from ace_ext.runs.plan import planned_matrices
from ace_ext.runs.verify import verify

mixtures = pytest.mark.parametrize("family", MIXTURES)


def experts_module(model, index=0):
    """The module that holds a block's fused tensors."""
    return find_fused(find_blocks(model)[index].module)[0].owner


def zeros(weight):
    return 1 - weight.count_nonzero() / weight.numel()


@mixtures
def test_every_expert_is_a_linear_in_the_tensors_memory(family):
    model = make_model(family)
    blocks = find_blocks(model)
    for block in blocks:
        assert {child.split(".")[-1] for child in block.linears if block.is_expert(child)} == {
            "gate_up_proj",
            "down_proj",
        }
        for fused in block.experts:
            assert len(fused.linears) == 4
            for expert, linear in enumerate(fused.linears.values()):
                assert linear.weight.data_ptr() == fused.tensor[expert].data_ptr()
                assert torch.equal(linear.weight, fused.tensor[expert])
        assert not any("router" in child or child.endswith("gate") for child in block.linears)


ROUTERS = {
    "qwen2-moe": {"mlp.gate.weight", "mlp.shared_expert_gate.weight"},
    "deepseek-v3": {"mlp.gate.weight"},
    "hunyuan-moe": {"mlp.gate.wg.weight"},
    "afmoe": {"mlp.router.gate.weight"},
}


@pytest.mark.parametrize("family", ROUTERS)
def test_what_chooses_experts_stays_dense(family):
    model = make_model(family)
    block = find_blocks(model)[-1]  # where only some blocks are mixtures, the last one is
    pruned = {f"{child}.weight" for child in block.linears}
    left = {n for n, p in block.module.named_parameters() if p.dim() == 2 and n not in pruned}
    assert left == ROUTERS[family]
    before = {name: block.module.get_parameter(name).clone() for name in left}
    prune_model(model, make_tokens(), PruneConfig("wanda"))
    assert all(torch.equal(block.module.get_parameter(name), value) for name, value in before.items())


def test_so_does_what_chooses_experts_that_are_modules():
    """As in transformers 4, and in code of one's own."""
    block = torch.nn.Module()
    block.proj, block.mlp = torch.nn.Linear(8, 8), torch.nn.Module()
    block.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
    block.mlp.gate, block.mlp.scale = torch.nn.Linear(8, 3), torch.nn.Linear(8, 1)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    names = {"proj", *(f"mlp.experts.{i}" for i in range(3))}
    assert set(find_blocks(model)[0].linears) == names


@mixtures
def test_their_products_go_through_the_linears(family):
    """Each expert's Linear is called once, with the tokens that are routed to it; afterwards the model is unchanged."""
    model = make_model(family)
    blocks = find_blocks(model)
    chosen = model.config._experts_implementation
    (call,) = capture_calls(model, blocks, [{"input_ids": make_tokens()}])
    seen, sent = {}, []
    owner = blocks[0].experts[0].owner
    handles = [owner.register_forward_pre_hook(lambda _, args: sent.append(args[1]))]
    for child, linear in blocks[0].linears.items():
        handles.append(linear.register_forward_pre_hook(lambda _, args, child=child: seen.update({child: args[0]})))
    run_block(blocks[0], call.hidden, call.others[0])
    for handle in handles:
        handle.remove()
    assert model.config._experts_implementation == chosen
    for fused in blocks[0].experts:
        for expert, child in enumerate(fused.linears):
            assert len(seen[child]) == (sent[0] == expert).sum(), child


@mixtures
@pytest.mark.parametrize("order", ["block", "sequential"])
def test_masks_are_those_of_the_routed_tokens(family, order):
    """Wanda's score of the first block's gate and up matrices, from what the dense model sends to each expert."""
    model, tokens = make_model(family), make_tokens()
    if order == "sequential":  # what reaches the experts has passed the pruned attention: leave that dense
        config = PruneConfig("collect(order=sequential) + wanda", skip=("self_attn",))
    else:
        config = PruneConfig("collect(order=block) + wanda")
    owner, sent = experts_module(model), []
    handle = owner.register_forward_pre_hook(lambda _, args: sent.append((args[0].clone(), args[1].clone())))
    model(tokens)
    handle.remove()
    x, index = sent[0]
    dense = owner.gate_up_proj.detach().clone()
    report = prune_model(model, tokens, config)
    for expert in range(4):
        routed = x[(index == expert).any(dim=1)]
        score = dense[expert].abs() * routed.norm(dim=0)
        kept = torch.zeros_like(score).scatter_(1, score.topk(16, dim=1).indices, 1.0).bool()
        pruned = owner.gate_up_proj[expert]
        assert ((pruned != 0) != kept).float().mean() < 2e-3
        assert torch.equal(pruned[pruned != 0], dense[expert][pruned != 0])
        matrix = next(m for m in report.matrices if m.name.endswith(f"0.{_path(model)}.{expert}.gate_up_proj"))
        assert matrix.tokens == len(routed)


def _path(model):
    return find_blocks(model)[0].experts[0].name.removesuffix(".gate_up_proj")


@pytest.mark.parametrize("family", rest_nightly(["mixtral"], MIXTURES))
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"method": "collect(order=block) + cosp"},
        {"method": "collect(batch_tokens=32) + wanda", "pattern": "2:4"},
        {"method": "collect(batch_tokens=32) + admm"},
        {"method": "obs(gram=cosine)", "group": "row"},
        {"method": "wanda + swaps", "group": "row"},
        {"method": "admm + train(epochs=2)"},
        {"method": "admm + quantize(bits=8)"},
        {"group": "matrix"},
    ],
    ids=str,
)
def test_pruned_files_are_sound(family, config, tmp_path):
    """By the report, through ``verify``; and router, embeddings and head keep their bytes."""
    dense = save_dense(tmp_path / "dense", family)
    report, output = prune(dense, tmp_path / "out", calibration={"source": "tokens"}, **config)
    result = verify(output)
    assert not result.problems
    assert result.loads
    assert result.matrices == len(report.matrices) == 3 * (4 + 2 * 4)
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    before, after = load_file(dense / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if "expert" in name or "_linear" in name or "_proj" in name:
            assert zeros(tensor) == pytest.approx(0.5, abs=0.01 if config.get("group") != "matrix" else 0.2), name
        elif "norm" not in name or "train" not in config.get("method", ""):
            assert torch.equal(tensor, before[name]), name


@mixtures
@pytest.mark.parametrize("fused", [False, True], ids=["as-published", "as-loaded"])
def test_the_files_names_do_not_matter(family, fused, tmp_path):
    """A checkpoint whose tensors are fused already prunes to the same weights, in memory and from the disk."""
    dense = save_dense(tmp_path / "dense", family, save_original_format=not fused)
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    prune_model(expected, make_tokens(8, 16), PruneConfig("wanda"))
    for offload in ("none", "disk"):
        _, output = prune(dense, tmp_path / offload, {"offload": offload}, {"source": "tokens"})
        assert load_file(output / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()
        loaded = AutoModelForCausalLM.from_pretrained(output)
        for name, parameter in expected.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name


@mixtures
def test_a_parameter_is_read_and_written_piece_by_piece(family, tmp_path):
    model = make_model(family)
    folder = save_dense(tmp_path / "dense", family, torch.float32, max_shard_size="20KB")
    assert len(weights_bytes(folder)) > 1
    shards = Shards(folder).adopt(model)
    for name, parameter in model.named_parameters():
        assert shards.describe(name) == (torch.float32, tuple(parameter.shape))
        assert torch.equal(shards.read(name), parameter), name
    owner = next(name for name, _ in model.named_parameters() if name.endswith("0.mlp.experts.down_proj")
                 or name.endswith("0.block_sparse_moe.experts.down_proj"))  # fmt: skip
    third = owner.replace("experts.", "experts.2.") + ".weight"
    assert torch.equal(shards.read(third), model.get_parameter(owner)[2])
    changed = torch.randn_like(model.get_parameter(owner))
    shards.write({owner: changed})
    assert torch.equal(Shards(folder).adopt(model).read(third), changed[2])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), changed if name == owner else parameter), name


def test_a_routers_buffer_is_read_from_another_name(tmp_path):
    """MiniMax-M2's correction of the router's choice is stored under the name of another module."""
    name, model = "model.layers.1.mlp.e_score_correction_bias", every_class.build("minimax_m2")
    model.get_buffer(name).copy_(torch.tensor([0.5, -1.0, 0.25, 2.0]))
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert name not in tensors
    assert name.replace("mlp", "block_sparse_moe") in tensors
    _, pruned = prune(tmp_path / "dense", tmp_path / "pruned", {"offload": "disk"}, {"source": "tokens"})
    assert verify(pruned).problems == []
    pack(pruned, tmp_path / "packed", "bitmap")
    for loaded in (AutoModelForCausalLM.from_pretrained(pruned), load_packed(tmp_path / "packed")):
        assert torch.equal(loaded.get_buffer(name), model.get_buffer(name))


def test_transposed_experts_are_read_from_a_packed_folder(tmp_path):
    """GPT-OSS stores an expert's matrix as ``[d_in, d_out]``."""
    every_class.build("gpt_oss").save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    _, pruned = prune(tmp_path / "dense", tmp_path / "pruned", calibration={"source": "tokens"}, pattern="2:4")
    pack(pruned, tmp_path / "packed", "bitmap")
    name = "model.layers.1.mlp.experts.2.gate_up_proj.weight"
    found = [shards.adopt(AutoModelForCausalLM.from_pretrained(pruned)).read(name)
             for shards in (Shards(pruned), PackedShards(tmp_path / "packed"))]  # fmt: skip
    assert torch.equal(*found)
    assert verify(tmp_path / "packed").problems == []


def test_tensors_of_another_shape_are_no_part(tmp_path):
    """Tensors are not combined if the files do not hold all parts in the right shape."""
    model = make_model("mixtral")
    shards = Shards(save_dense(tmp_path / "dense", "mixtral", torch.float32))
    entry = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    shards.entries[entry] = shards.entries.pop(entry.replace("2.w1", "2.w2"))  # [32, 48] in place of [48, 32]
    shards.adopt(model)
    assert "model.layers.1.mlp.experts.gate_up_proj" not in shards
    assert "model.layers.1.mlp.experts.down_proj" not in shards
    assert "model.layers.0.mlp.experts.gate_up_proj" in shards


def test_experts_that_no_token_reaches_are_cut_by_magnitude():
    model, tokens = make_model("qwen3-moe"), make_tokens()
    with torch.no_grad():
        for block in find_blocks(model):
            gate = block.module.mlp.gate
            gate.top_k = 1
            gate.weight[:] = gate.weight[0] * torch.tensor([[1.0], [-1.0], [0.5], [0.0]])  # the last is never on top
    dense = experts_module(model).down_proj.detach().clone()
    report = prune_model(model, tokens, PruneConfig("wanda"))
    unseen = [matrix for matrix in report.matrices if not matrix.tokens]
    assert any(matrix.name == "model.layers.0.mlp.experts.3.down_proj" for matrix in unseen)
    assert f"{len(unseen)} experts' matrices saw no calibration token" in report.table()
    pruned = experts_module(model).down_proj[3]
    kept = dense[3].abs() >= dense[3].abs().topk(12, dim=1).values[:, -1:]
    assert torch.equal(pruned != 0, kept)
    json.loads(report.to_json())
    for config in ({"method": "wanda", "group": "model"}, {"method": "allocate + wanda"}):
        with pytest.raises(InputError, match=r"experts\.\d.* saw no calibration token"):
            prune_model(model, tokens, PruneConfig(**config))


@pytest.mark.parametrize(
    "config",
    [
        {"method": "collect(order=block) + wanda", "group": "model"},
        {"method": "collect(order=block) + allocate + wanda"},
    ],
    ids=str,
)
def test_experts_that_no_token_reached_are_not_compared_by_statistics_of_a_file(config):
    model, stored = make_model("qwen3-moe"), {}
    sink = SimpleNamespace(block=lambda name, stats: stored.update({name: copy.deepcopy(stats)}))
    source = SimpleNamespace(block=lambda name, children, device: stored[name])
    with torch.no_grad():
        for block in find_blocks(model):
            gate = block.module.mlp.gate
            gate.weight[:] = gate.weight[0] * torch.tensor([[4.0], [3.0], [-3.0], [-4.0]])
    method, few = "collect(order=block) + wanda", make_tokens()[:1, :2]
    report = prune_model(copy.deepcopy(model), few, method=method, context=RunContext(sink=sink))
    assert not all(matrix.tokens for matrix in report.matrices)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(InputError, match=r"experts\.\d.* saw no calibration token"):
        prune_model(model, few, PruneConfig(**config), context=RunContext(source=source))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_experts_of_a_model_that_is_not_walked_are_not_compared_unseen():
    torch.manual_seed(0)
    model, tokens = every_class.build("zaya"), torch.randint(3, 30, (2, 2))
    with pytest.raises(InputError, match=r"experts\.\d.* saw no calibration token"):
        prune_model(model, tokens, method="wanda", group="model")


@pytest.mark.parametrize("method", ["wanda + quantize(bits=4)", "quantize(bits=4)"])
def test_experts_that_no_token_reaches_are_rounded_to_the_grid(method):
    model, tokens = make_model("qwen3-moe"), make_tokens()
    with torch.no_grad():
        for block in find_blocks(model):
            gate = block.module.mlp.gate
            gate.top_k = 1
            gate.weight[:] = gate.weight[0] * torch.tensor([[1.0], [-1.0], [0.5], [0.0]])
    dense, config = experts_module(model).down_proj[3].detach().clone(), PruneConfig(method)
    report = prune_model(model, tokens, config)
    (matrix,) = [m for m in report.matrices if m.name == "model.layers.0.mlp.experts.3.down_proj"]
    assert (matrix.tokens, matrix.solution) == (0, None)
    rounded = experts_module(model).down_proj[3].detach()
    assert config.method.quantize.grid.recover(rounded) is not None
    assert not torch.equal(rounded, dense)
    assert (rounded - dense).abs().max() <= dense.abs().max()
    assert matrix.keep == matrix.size * (0.5 if config.method.prunes else 1)
    assert matrix.nonzero == int((rounded != 0).sum()) <= matrix.keep


def test_skip_by_name():
    model = make_model("mixtral")
    (first, *_) = find_blocks(model, skip=[r"experts\.1\.", r"layers\.0\.self_attn"])
    assert set(first.linears) == {f"mlp.experts.{e}.{n}" for e in (0, 2, 3) for n in ("gate_up_proj", "down_proj")}
    (first, *_) = find_blocks(model, skip=[r"experts\.down_proj"])
    assert not any(child.endswith("down_proj") for child in first.linears)
    (first, *_) = find_blocks(model, skip=[r"experts"])
    assert not first.experts
    prune_model(model, make_tokens(), PruneConfig("wanda", skip=(r"experts\.1\.",)))
    weight = experts_module(model).gate_up_proj
    assert [round(float(zeros(w)), 2) for w in weight] == [0.5, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(("keeps_forwards", "passes"), [(True, 4 + 3), (False, 3 * 3)], ids=["lockstep", "steps"])
def test_a_stage_takes_all_experts(keeps_forwards, passes):
    """Three batches go through the experts once; before that, a trial of two of them, one after the other and in
    lockstep. In steps they do for all gates, for all downs, and to go on; the steps before end before the experts."""
    model, seen = make_model("mixtral"), []
    handle = experts_module(model).register_forward_pre_hook(lambda *_: seen.append(1))
    context = RunContext(keeps_forwards=keeps_forwards)
    prune_model(model, make_tokens(), PruneConfig("collect(batch_tokens=32) + wanda"), context=context)
    handle.remove()
    tried = 3  # on a few tokens: what a block returns, the model, block by block
    assert len(seen) == tried + 2 + passes  # two to see what a block returns and who reads what


@pytest.mark.parametrize("seqlen", [16, 2], ids=["all-reached", "some-reached"])
def test_statistics_and_plan_know_them(seqlen, tmp_path):
    dense = save_dense(tmp_path / "dense", "qwen3-moe")
    planned = planned_matrices(find_blocks(make_model("qwen3-moe")), PruneConfig("wanda"))
    text = {"source": "tokens", "nsamples": 1, "seqlen": seqlen}
    keep, method = {"save_stats": tmp_path / "stats.safetensors"}, "collect(order=block) + wanda"
    report, kept = prune(dense, tmp_path / "kept", keep, text, method=method)
    assert [(m.name, m.shape, m.shape[0] * m.keep) for m in planned] == [
        (m.name, m.shape, m.keep) for m in report.matrices
    ]
    _, again = prune(dense, tmp_path / "again", {"stats": tmp_path / "stats.safetensors"}, text, method=method)
    assert weights_bytes(again) == weights_bytes(kept)
    assert all(matrix.tokens for matrix in report.matrices) == (seqlen == 16)


def test_values_of_a_linear_call_are_untouched():
    """Only products with the experts' own matrices are redirected."""
    model = make_model("mixtral")
    (call,) = capture_calls(model, find_blocks(model), [{"input_ids": make_tokens()}])
    block = find_blocks(model)[0]
    called = []
    linear = block.linears["mlp.experts.0.down_proj"]
    linear.register_forward_pre_hook(lambda *_: called.append(1))
    functional.linear(torch.ones(1, 48), linear.weight)
    assert not called
    run_block(block, call.hidden, call.others[0])
    assert called == [1]


def test_few_shapes_reach_half_precision_products():
    """Row counts are padded by less than a quarter beyond 256 rows, and the padding is removed from the result."""
    counts = [filled_rows(n) for n in range(1, 16385)]
    assert len(set(counts)) <= 32
    assert all(n <= filled < n + 64 or (n > 256 and filled < 1.25 * n) for n, filled in enumerate(counts, 1))
    weight = torch.randn(24, 40)
    for rows in (0, 1, 100, 1000):
        x = torch.randn(rows, 40)
        for dtype in (torch.float32, torch.bfloat16):
            found = filled_linear(x.to(dtype), weight.to(dtype))
            torch.testing.assert_close(found, functional.linear(x.to(dtype), weight.to(dtype)))
