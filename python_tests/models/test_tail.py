"""From the last block's output to logits, for every family, with caps and factors on the logits, and from files."""

import pytest
import torch
import transformers
from folders import save_dense
from tiny_models import _SMALL, FAMILIES, VOCABULARY, make_model, make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models.block_store import OffloadedBlocks
from ace_ext.models.blocks import find_blocks
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.models.safetensors_files import Shards
from ace_ext.models.skeleton import skeleton
from ace_ext.models.tail import Tail

SCALED = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=2.0)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**_SMALL, logit_scale=0.25)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**_SMALL, logits_scaling=4.0)),
}
"""Families whose forward does more with the logits than the LM head."""

_GPT = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
SHAPED = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT)),
    "gpt-bigcode": lambda: transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**_GPT)),
}
"""Families that give the last block's output the shape of the model's input."""


def last_output(model, blocks, tokens):
    """The last block's output ``[batch, seqlen, d_model]``, and how a block's output is wrapped."""
    call = next(iter(capture_calls(model, blocks, [{"input_ids": tokens}])))
    hidden = call.hidden
    for index, block in enumerate(blocks):
        hidden = run_block(block, hidden, call.others[index])
    return hidden, call.wrap


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED, *SHAPED])
@torch.no_grad()
def test_logits_are_those_of_the_model(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, (FAMILIES | SCALED | SHAPED)[family])
    model = make_model(family)
    blocks, tokens = find_blocks(model), make_tokens()
    hidden, wrap = last_output(model, blocks, tokens)
    found = Tail(model, blocks, wrap).logits(hidden.flatten(0, 1))
    assert torch.equal(found, model(tokens, use_cache=False).logits.flatten(0, 1))


def reads_other_tokens(model):
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0].cumsum(1),))


def reads_the_embedding(model):
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda *args: seen.append(args[-1]))
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + seen[-1],))


def loses_tokens(model):
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0][:1],))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reads_other_tokens, "they depend on more than"),
        (reads_the_embedding, "they depend on more than"),
        (loses_tokens, "3 tokens have the logits of 1"),
    ],
)
def test_a_model_with_other_logits_is_refused_before_it_changes(change, message):
    model = make_model("llama")
    change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"LlamaForCausalLM cannot be distilled: .*{message}"):
        prune_model(model, make_tokens(), method="wanda + distill(tokens=32)")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_are_those_of_the_model(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma2", SCALED["gemma2"])
    model = make_model("gemma2")
    blocks = find_blocks(model)
    hidden, wrap = last_output(model, blocks, make_tokens())
    weight = torch.randn(hidden.shape[0] * hidden.shape[1], 64, generator=torch.Generator().manual_seed(0))
    x = hidden.detach().flatten(0, 1).requires_grad_(True)
    (Tail(model, blocks, wrap).logits(x) * weight).sum().backward()
    y = hidden.detach().flatten(0, 1).requires_grad_(True)
    capped = torch.tanh(model.lm_head(model.model.norm(y)) / 2.0) * 2.0
    (capped * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_one_block_is_enough():
    config = transformers.LlamaConfig(**{**_SMALL, "num_hidden_layers": 1})
    model = transformers.LlamaForCausalLM(config).eval()
    blocks, tokens = find_blocks(model), make_tokens()
    with torch.no_grad():
        hidden, wrap = last_output(model, blocks, tokens)
        found = Tail(model, blocks, wrap).logits(hidden.flatten(0, 1))
        assert torch.equal(found, model(tokens, use_cache=False).logits.flatten(0, 1))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt"])
@torch.no_grad()
def test_from_files_only_what_follows_the_blocks_is_loaded(family, tmp_path):
    dense = save_dense(tmp_path / "dense", family, torch.float32)
    whole = make_model(family)
    blocks = find_blocks(whole)
    hidden, wrap = last_output(whole, blocks, make_tokens())
    expected = Tail(whole, blocks, wrap).logits(hidden.flatten(0, 1))
    shards = Shards(dense)
    model = skeleton(dense, shards)
    blocks = find_blocks(model, check=False)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with OffloadedBlocks(blocks, shards, "cpu").way_out(model):
        assert torch.equal(Tail(model, blocks, wrap).logits(hidden.flatten(0, 1)), expected)
        assert all(p.is_meta for block in blocks for p in block.module.parameters())
        assert model.get_input_embeddings().weight.is_meta is not tied
    assert all(p.is_meta for p in model.parameters())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
