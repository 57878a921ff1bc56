"""The check that a smaller model computes what it should."""

import copy

import pytest
import torch
from tiny_models import make_model, make_tokens

from ace_ext.errors import InputError
from ace_ext.structures.smaller import CLOSE, check_same, output_of


def of_few_digits():
    """A model in bfloat16 whose logits are small differences of large numbers, so that rounding moves them far."""
    model = make_model("llama", torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer the embeddings
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight += 8.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        first, second = model.lm_head.weight.chunk(2, dim=1)
        second.copy_(-first)
    return model


def distance(one, other, tokens) -> float:
    with torch.no_grad():
        expected = output_of(one, tokens).float()
        return float((output_of(other, tokens).float() - expected).norm() / expected.norm())


@torch.no_grad()
def test_rounding_alone_is_no_reason_to_refuse():
    model, tokens = of_few_digits(), make_tokens(1, 16)
    other = copy.deepcopy(model)
    up = torch.rand(other.model.embed_tokens.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    other.model.embed_tokens.weight += up * 0.0625  # the distance of two neighbours
    assert distance(model, other, tokens) > CLOSE
    check_same("neurons", model, other, tokens)
    assert not model.model.embed_tokens._forward_hooks


@torch.no_grad()
def test_more_than_rounding_is():
    model, tokens = of_few_digits(), make_tokens(1, 16)
    other = copy.deepcopy(model)
    other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    with pytest.raises(InputError, match="does not compute the same"):
        check_same("neurons", model, other, tokens)
