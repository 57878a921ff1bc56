"""Padding does not count in a mixture of experts: a padded batch is pruned as its samples alone are."""

import copy

import every_class
import pytest
import torch
from tiny_models import make_model, make_tokens

from ace_ext import InputError, prune_model

LENGTHS = (12, 5, 9)
METHODS = {
    "one forward": "wanda",
    "lockstep": "collect(batch_tokens=24) + wanda",
    "dense order": "collect(order=block) + wanda",
    "gram": "obs(gram=plain)",
}


def padded(*lengths, seed=0):
    """A batch whose samples end in padding."""
    tokens, mask = make_tokens(len(lengths), max(lengths), seed=seed), torch.zeros(len(lengths), max(lengths)).long()
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def alone(batch):
    return [
        {"input_ids": tokens[None, : int(mask.sum())]}
        for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "granite-moe"])
def test_a_padded_batch_is_pruned_as_its_samples(family, method):
    dense = make_model(family, dtype=torch.float32)
    batches = [padded(*LENGTHS)] if "batch_tokens" not in method else [padded(12, 5), padded(9, 4, seed=1)]
    found, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune_model(found, batches, method=method, sparsity=0.5)
    other = prune_model(expected, [one for batch in batches for one in alone(batch)], method=method, sparsity=0.5)
    tokens = [{matrix.name: matrix.tokens for matrix in each.matrices} for each in (report, other)]
    assert tokens[0] == tokens[1]
    assert any(0 < count < sum(LENGTHS) for name, count in tokens[0].items() if ".experts." in name)
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name] == 0, weight == 0), name


@pytest.mark.parametrize("kind", ["dbrx", "jetmoe", "llama4_text"])
def test_experts_that_cannot_leave_padding_out(kind):
    model = every_class.build(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"padding would count in the experts of \S+: .* such as one sample each"):
        prune_model(model, [padded(*LENGTHS)], method="wanda", sparsity=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prune_model(model, alone(padded(*LENGTHS)), method="wanda", sparsity=0.5)


def test_blocks_that_see_patches_of_tokens():
    model = every_class.build("blt")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"attention_mask must have an entry for each token .* without padding"):
        prune_model(model, [padded(*LENGTHS)], method="wanda", sparsity=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
