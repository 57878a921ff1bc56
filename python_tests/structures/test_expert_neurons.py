"""Removed neurons of experts: each expert keeps its own, and what contributes nothing goes unnoticed."""

import every_class
import pytest
import torch
from tiny_models import MIXTURES, make_model, make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models.blocks import find_blocks
from ace_ext.pruning import removal
from ace_ext.structures import units
from ace_ext.structures.search import find_neurons

KINDS = ["mixtral", "gpt_oss", "llama4", "deepseek_v3", "jetmoe", "granitemoeshared"]
"""Matrices of an expert one above the other and with alternating rows, stored as they are and transposed, with experts
that see all tokens and without, in modules that know the router's choice and that do not."""
ALTERNATING = {"gpt_oss"}


def logits(model, tokens, **more):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, **more).logits


def found_in(model, kind):
    found = find_neurons(model, find_blocks(model))
    return found.layouts[1 if kind in ALTERNATING else 0]


def silence_(model, kind, dead):
    """Zeroes what makes the neurons ``dead(place)``, of each place in the list of a block's units."""
    parameters = dict(model.named_parameters())
    for block in found_in(model, kind).parts:
        for place, own in enumerate(block):
            for row in own.rows:
                tensor = parameters[row.name].data
                tensor = tensor if own.expert is None else tensor[own.expert]
                dim = row.dim - (own.expert is not None)
                for copy in range(row.copies):
                    first = dead(place) * row.width + copy * own.count
                    for offset in range(row.width):
                        tensor.index_fill_(dim, first + offset, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["obs", "variance", "cosine"])
def test_each_expert_loses_its_own_silent_neurons(kind, score):
    model = every_class.build(kind)
    count = found_in(model, kind).count
    assert count == 48
    silence_(model, kind, lambda place: (torch.arange(0, 48, 4) + place) % 48)
    tokens = make_tokens(16, 32)
    expected = logits(model, tokens)
    report = prune_model(model, tokens, remove=f"neurons=0.25(score={score})")
    assert (report.removed[0].before, report.removed[0].after) == (48, 36)
    assert all(block.error < 1e-5 for block in report.removed[0].cut)
    assert float((logits(model, tokens) - expected).norm() / expected.norm()) < 1e-3


def test_the_fit_is_that_of_each_expert():
    """Twins: a neuron that equals another one goes, and the other takes its place."""
    model = every_class.build("mixtral")
    for block in find_blocks(model):
        gate_up, down = (fused.tensor for fused in block.experts)
        for expert in range(len(gate_up)):
            twin = (torch.arange(36, 48) + expert) % 48
            for half in (0, 48):
                gate_up.data[expert, half + twin] = gate_up.data[expert, half + (twin + 12) % 48]
        assert down.shape == (len(gate_up), 32, 48)
    tokens = make_tokens(24, 32)
    expected = logits(model, tokens)
    prune_model(model, tokens, remove="neurons=0.25(score=obs)")
    assert float((logits(model, tokens) - expected).norm() / expected.norm()) < 0.02


def test_padding_does_not_count():
    tokens, noise = make_tokens(16, 16), make_tokens(16, 8, seed=3)
    mask = torch.ones(16, 24, dtype=torch.long)
    mask[:, 16:] = 0
    plain, padded = every_class.build("mixtral"), every_class.build("mixtral")
    prune_model(plain, {"input_ids": tokens}, remove="neurons=0.25")
    prune_model(padded, {"input_ids": torch.cat([tokens, noise], 1), "attention_mask": mask}, remove="neurons=0.25")
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, padded.state_dict()[name], atol=1e-5), name


def test_padding_that_cannot_be_told_apart_is_refused():
    model, mask = every_class.build("jetmoe"), torch.ones(8, 16, dtype=torch.long)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask[:, 12:] = 0
    with pytest.raises(InputError, match="do not say which tokens they see, so padding would count"):
        prune_model(model, {"input_ids": make_tokens(8, 16), "attention_mask": mask}, remove="neurons=0.25")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_expert_without_tokens_keeps_the_neurons_with_the_largest_weights():
    model = every_class.build("mixtral")
    block = find_blocks(model)[0]
    own = found_in(model, "mixtral").parts[0][3]
    weight = block.linears[own.last].weight
    large = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:36].sort().values
    weight.data[:, large] *= 100
    nothing = units.Moments(48, weight.device)
    cut = units.choose(removal.Neurons(0.25), block, own, 36, nothing, nothing, torch.zeros(48))
    assert torch.equal(cut.units, large)
    assert torch.equal(cut.fit.weight, weight[:, large].float())


def test_how_many_experts_are_read_in_a_pass_changes_nothing(monkeypatch):
    states = []
    for limit in (units.MOMENTS_BYTES, 1):
        monkeypatch.setattr(units, "MOMENTS_BYTES", limit)
        model = every_class.build("deepseek_v3")
        prune_model(model, make_tokens(8, 16), remove="neurons=0.25")
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_processor_that_is_slow_at_the_dtype(family, dtype, monkeypatch):
    """The trial reads experts through their Linears, and these multiply in float32."""
    monkeypatch.setattr("ace_ext.models.products.slow_dtypes", lambda: frozenset({dtype}))
    report = prune_model(make_model(family, dtype), make_tokens(8, 24), remove="neurons=0.34(multiple=8)")
    assert report.removed[0].after < report.removed[0].before


@pytest.mark.parametrize("runs", [0, 1], ids=["trial", "run"])
def test_a_width_that_the_class_does_not_run_with(runs, monkeypatch):
    """The kernel may depend on the number of tokens, so the trial's few can run where a sample does not."""
    model = make_model("qwen3-moe")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    monkeypatch.setattr(units, "fill_", fails_to_run(units.fill_, runs))
    words = r"does not run without these neurons: strides .*; leave out neurons, or remove another number"
    with pytest.raises(InputError, match=words):
        prune_model(model, make_tokens(8, 24), remove="neurons=0.34(multiple=8)")
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def fails_to_run(fill, runs):
    """``fill_``, after which the smaller model's forward fails as torch's kernel of experts does, but not of the first
    ``runs`` models."""
    filled_models = []

    def filled(smaller, *rest):
        def forward(*_, **__):
            raise RuntimeError("strides should be multiple of 16 bytes")

        fill(smaller, *rest)
        filled_models.append(smaller)
        if len(filled_models) > runs:
            smaller.forward = forward

    return filled
