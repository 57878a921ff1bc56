"""Some models append positions to their tokens, up to a multiple of a window. These do not count."""

import other_classes
import pytest
import torch

from ace_ext import prune_model

TOKENS = 24
FIRST = {
    "longformer": "longformer.encoder.layer.0.attention.self.query",
    "led": "led.encoder.layers.0.self_attn.longformer_self_attn.query",
}


def inputs(model, padded):
    ids = torch.randint(8, 60, (3, TOKENS), generator=torch.Generator().manual_seed(2))
    found = {"input_ids": ids}
    if padded:
        found["attention_mask"] = (torch.arange(TOKENS) < torch.tensor([[24], [17], [9]])).long()
    return found | ({"decoder_input_ids": ids.clone()} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", FIRST)
def test_appended_positions_do_not_count(kind, padded):
    """Wanda's mask of an early matrix is that by its inputs at the tokens alone. Longformer's attention reads them with
    the samples on the second axis."""
    model = other_classes.build(kind)
    given, seen = inputs(model, padded), []
    linear = model.get_submodule(FIRST[kind])
    dense = linear.weight.detach().clone()
    handle = linear.register_forward_hook(lambda _, args, output: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**given)
    handle.remove()
    report = prune_model(model, [given], method="collect(order=block) + wanda", sparsity=0.5, max_dense=0.9)
    used = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    matrix = next(matrix for matrix in report.matrices if matrix.name == FIRST[kind])
    assert matrix.tokens == int(used.sum())
    states = seen[0] if len(seen[0]) == len(used) else seen[0].transpose(0, 1)
    assert states.shape[1] > TOKENS
    norm = states[:, :TOKENS][used].norm(dim=0)
    keep = (dense.abs() * norm).topk(dense.shape[1] // 2, dim=1).indices
    expected = torch.zeros_like(dense).scatter_(1, keep, 1.0).bool()
    assert ((linear.weight != 0) != expected).float().mean() < 2e-3
