"""Removed experts: a class with fewer of them loads the result, and the router chooses among those that are left."""

import every_class
import pytest
import torch
import transformers
from tiny_models import make_model, make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models.blocks import find_blocks
from ace_ext.models.replay import capture_calls
from ace_ext.pruning.removal import removal_of
from ace_ext.structures.experts import _scores
from ace_ext.structures.remove import planned_removal


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def without(model, gone):
    """The dense Mixtral, whose routers give the removed experts no token."""
    for block, experts in zip(model.model.layers, gone, strict=True):
        gate = block.mlp.gate

        def forward(x, gate=gate, experts=experts):
            scores = torch.nn.functional.linear(x.reshape(-1, gate.hidden_dim), gate.weight)
            scores[:, experts] = -torch.inf
            values, indices = torch.topk(scores.float().softmax(-1), gate.top_k, dim=-1)
            return scores, values / values.sum(-1, keepdim=True), indices

        gate.forward = forward
    return model


def test_the_router_chooses_among_those_that_are_left(tmp_path):
    model, tokens = make_model("mixtral"), make_tokens(16, 32)
    report = prune_model(model, tokens, remove="experts=0.25")
    record = report.removed[0]
    assert (record.kind, record.setting, record.before, record.after) == ("experts", "num_local_experts", 4, 3)
    assert [len(block.experts) for block in record.gone] == [1] * len(model.model.layers)
    dense = without(make_model("mixtral"), [block.experts for block in record.gone])
    torch.testing.assert_close(logits(model, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_local_experts == 3
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_the_loss_of_the_router_counts_the_experts_that_are_left(tmp_path):
    model, tokens = make_model("mixtral"), make_tokens(4, 16)
    prune_model(model, tokens, remove="experts=0.5")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found, expected = (
        each(input_ids=tokens, labels=tokens, output_router_logits=True).aux_loss for each in (model, again)
    )
    torch.testing.assert_close(found, expected)


def test_scores_are_the_routers_weights_times_the_outputs_norms():
    model, tokens = make_model("mixtral"), make_tokens(6, 10)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    blocks = find_blocks(model)
    calls = list(capture_calls(model, blocks, [{"input_ids": tokens, "attention_mask": mask}]))
    inputs = []
    handle = blocks[0].module.mlp.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        found = _scores(blocks[0], 0, calls, 4)
        handle.remove()
        x, experts = inputs[0][mask.flatten().bool()], blocks[0].module.mlp.experts
        _, weights, chosen = blocks[0].module.mlp.gate(x)
        for expert in range(4):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            output = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
            expected = (weights[token, place] * output.norm(dim=-1)).mean() if len(token) else 0.0
            assert float(found[expert]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("family", ["afmoe", "hunyuan-moe", "qwen3-moe", "granite-moe", "deepseek-v3"])
def test_other_routers(family, tmp_path):
    model, tokens = make_model(family), make_tokens(16, 32)
    report = prune_model(model, tokens, remove="experts=0.25")
    assert report.removed[0].after == 3
    expected = logits(model, tokens)
    assert torch.isfinite(expected).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval(), tokens), expected)


@pytest.mark.parametrize("kind", ["llama4_text", "jetmoe"])
def test_experts_without_the_routers_choice_are_refused_by_shapes(kind):
    """Those of Llama 4 see all tokens, and those of JetMoe sorted ones: they would have no score."""
    model = every_class.build(kind)
    with pytest.raises(InputError, match="are not called with the router's choice"):
        planned_removal(model, find_blocks(model), removal_of("experts=0.5"))


def test_zeros_follow_on_the_smaller_mixture():
    model = make_model("mixtral")
    report = prune_model(model, make_tokens(16, 32), remove="experts=0.25 + blocks=1", sparsity=0.5)
    assert [(record.kind, record.after) for record in report.removed] == [("blocks", 2), ("experts", 3)]
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("family", "part", "words"),
    [
        ("llama", "experts=0.5", "has no experts that the router calls"),
        ("mixtral", "experts=0.75", "does not run with 1 experts"),
        ("mixtral", "experts=0.1", "no expert would be removed"),
        ("mixtral", "experts=0.9", "no expert would stay"),
    ],
)
def test_what_cannot_be_removed_is_refused_and_nothing_changes(family, part, words):
    model, tokens = make_model(family), make_tokens(4, 16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=words):
        prune_model(model, tokens, remove=part)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
