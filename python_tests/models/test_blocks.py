import re

import pytest
import torch
from tiny_models import DENSE_FAMILIES, FAMILIES, make_model, make_tokens
from torch import nn

from ace_ext import InputError
from ace_ext.models._transformers_layouts import eager_experts
from ace_ext.models.blocks import find_blocks
from ace_ext.models.replay import capture_calls, run_block


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_finds_every_linear_but_the_head(family):
    model = make_model(family)
    blocks = find_blocks(model)
    found = {id(linear) for block in blocks for linear in block.linears.values()}
    expected = {
        id(module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name
    }
    assert len(blocks) == 3
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_replayed_blocks_compute_what_the_model_does(family, padded):
    """Hidden states after each replayed block equal the model's own, whatever its blocks are called with."""
    model, tokens = make_model(family), make_tokens()
    batch = {"input_ids": tokens}
    if padded:
        batch["attention_mask"] = torch.ones_like(tokens)
        batch["attention_mask"][2:, 11:] = 0
    seen = []
    blocks = find_blocks(model)
    handles = [
        block.module.register_forward_hook(lambda *a: seen.append(a[2] if torch.is_tensor(a[2]) else a[2][0]))
        for block in blocks
    ]
    experts = [fused.owner for block in blocks for fused in block.experts]
    with torch.no_grad(), eager_experts(experts):  # transformers' other implementations add in another order
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    (call,) = capture_calls(model, blocks, [batch])
    hidden = call.hidden
    with torch.no_grad():
        for index, block in enumerate(blocks):
            hidden = run_block(block, hidden, call.others[index])
            torch.testing.assert_close(hidden, seen[index], rtol=0, atol=0)
    assert (call.token_mask is not None) == padded


def test_first_tokens_of_samples():
    """The second sample is padded on the left, and the third is padding throughout."""
    model, tokens = make_model("llama"), make_tokens()[:3]
    mask, blocks = torch.ones_like(tokens), find_blocks(model)
    mask[1, :3] = mask[2] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    (call,) = capture_calls(model, blocks, [batch])
    assert call.starts.view(tokens.shape).nonzero().tolist() == [[0, 0], [1, 3]]
    (call,) = capture_calls(model, blocks, [{"input_ids": tokens}])
    assert call.starts.view(tokens.shape).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
    (call,) = capture_calls(model, blocks, [batch], range(len(blocks)))  # as of a network that is no language model
    assert call.starts is None


def test_capture_leaves_the_model_as_it_was():
    model = make_model("llama")
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own  # as accelerate's hooks do
    before = model(make_tokens()).logits
    list(capture_calls(model, find_blocks(model), [{"input_ids": make_tokens()}]))
    assert "forward" not in model.model.layers[0].__dict__
    assert model.model.layers[1].__dict__["forward"] is own
    assert torch.equal(model(make_tokens()).logits, before)


def test_real_errors_come_through_the_capture():
    model = make_model("llama")

    def broken(*args, **kwargs):
        raise ValueError("a real error")

    model.model.rotary_emb.forward = broken
    with pytest.raises(ValueError, match="a real error"):
        list(capture_calls(model, find_blocks(model), [{"input_ids": make_tokens()}]))
    assert "forward" not in model.model.layers[0].__dict__


def test_skip_by_full_name():
    blocks = find_blocks(make_model("llama"), skip=[r"layers\.0\.", r"down_proj$"])
    assert not blocks[0].linears
    assert set(blocks[1].linears) == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"
    }  # fmt: skip


def test_much_that_would_stay_dense_is_an_error():
    """A matrix that the block multiplies by in a way of its own. The hint, pasted, is a way out; a little is listed."""

    def model(width):
        block = torch.nn.Module()
        block.proj, block.mixer = torch.nn.Linear(width, 8, bias=False), torch.nn.Module()
        block.mixer.mix = torch.nn.Parameter(torch.ones(8, 8))
        block.mixer.decay = torch.nn.Parameter(torch.ones(8))
        outer = torch.nn.Module()
        outer.layers = torch.nn.ModuleList([block])
        return outer

    error = r"layers\.0\.mixer\.mix \[8, 8\] is in no layout that can be pruned: 47% of layers\.0 would stay dense"
    with pytest.raises(InputError, match=error) as caught:
        find_blocks(model(8), max_dense=0.1)
    share, pattern = re.search(r"--max-dense ([\d.]+), or --skip '([^']+)'", str(caught.value)).groups()
    for options in ({"max_dense": float(share)}, {"max_dense": 0.1, "skip": [pattern]}):
        (block,) = find_blocks(model(8), **options)
        assert set(block.linears) == {"proj"}
        assert [(weight.name, weight.shape) for weight in block.dense] == [("layers.0.mixer.mix", (8, 8))]
    (block,) = find_blocks(model(100), max_dense=0.1)
    assert [weight.reason for weight in block.dense] == ["no matrix"]


def _nan(layers):
    layers[1].mlp.up_proj.weight.data.fill_(float("nan"))


def _float64(layers):
    layers[2].self_attn.q_proj.to(torch.float64)


def _meta(layers):
    layers[2].self_attn.q_proj.to("meta")


def _shared(layers):
    layers[2].mlp.up_proj.weight = layers[1].mlp.gate_proj.weight


def _same_memory(layers):
    layers[1].mlp.up_proj.weight = torch.nn.Parameter(layers[1].mlp.gate_proj.weight.detach())


def _expanded(layers):
    weight = layers[1].mlp.up_proj.weight.detach()
    layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight[:1].expand_as(weight))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_nan, r"layers\.1\.mlp\.up_proj\.weight must be finite \(got nan at index \[0, 0\]\)"),
        (_float64, r"q_proj\.weight must be loaded as float32.*float64"),
        (_meta, r"q_proj\.weight must be loaded.*without data"),
        (_shared, r"up_proj\.weight is the same tensor as model\.layers\.1\.mlp\.gate_proj\.weight"),
        (_same_memory, r"up_proj\.weight is the same tensor as model\.layers\.1\.mlp\.gate_proj\.weight"),
        (_expanded, r"layers\.1\.mlp\.up_proj\.weight must have memory for each element \(it is expanded\)"),
    ],
)
def test_weights_that_cannot_be_pruned_are_named(spoil, message):
    model = make_model("llama")
    spoil(model.model.layers)
    with pytest.raises(InputError, match=message):
        find_blocks(model)


def test_one_module_under_two_names_is_one_linear():
    model = make_model("llama")
    model.model.layers[2].mlp.up_proj = model.model.layers[2].mlp.gate_proj
    assert len(find_blocks(model)[2].linears) == 6


def test_nothing_to_prune_is_an_error():
    with pytest.raises(InputError, match="no Linear is left to prune"):
        find_blocks(make_model("llama"), skip=[""])
    with pytest.raises(InputError, match="has no list of blocks"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="skip must be regular expressions"):
        find_blocks(make_model("llama"), skip=["("])
