"""Weights that are not plain parameters of their own: pruning them would leave the model as dense as before, so they
are refused before anything changes. And numbers that are not finite: where they arise is named."""

import pytest
import torch
from tiny_models import make_model, make_tokens
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ace_ext import InputError, PruneConfig, prune_model


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(model, message, **config):
    before = states(model)
    with pytest.raises(InputError, match=message):
        prune_model(model, make_tokens(), PruneConfig(**config))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Adapted(nn.Module):
    """As an adapter library wraps a Linear."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.fixture
def model():
    return make_model("llama")


def up(model):
    return model.model.layers[1].mlp.up_proj


def test_adapters(model):
    model.model.layers[1].mlp.up_proj = Adapted(up(model))
    refused(model, r"layers\.1\.mlp\.up_proj is a layer with an adapter; merge it first")


@pytest.mark.parametrize(
    "derive",
    [
        parametrizations.weight_norm,
        lambda linear: parametrize.register_parametrization(linear, "weight", Half()),
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    ],
    ids=["weight_norm", "parametrization", "prune"],
)
def test_weights_that_are_computed(derive, model):
    derive(up(model))
    refused(model, r"layers\.1\.mlp\.up_proj: its weight is computed from other tensors")
    report = prune_model(model, make_tokens(), PruneConfig("magnitude", skip=["1.mlp.up_proj"]))
    assert report.sparsity == 0.5


def test_a_pruning_of_torch_that_was_made_permanent(model):
    prune.l1_unstructured(up(model), "weight", 0.25)
    prune.remove(up(model), "weight")
    prune_model(model, make_tokens(), PruneConfig("magnitude"))
    assert (up(model).weight == 0).float().mean() == 0.5


def test_a_linear_tied_to_the_embedding(model):
    model.model.layers[1].mlp.tied = nn.Linear(32, 64, bias=False)
    model.model.layers[1].mlp.tied.weight = model.model.embed_tokens.weight
    refused(model, r"layers\.1\.mlp\.tied\.weight is the same tensor as model\.embed_tokens\.weight")


@pytest.mark.parametrize("metric", ["magnitude", "wanda"])
def test_numbers_that_are_not_finite_are_named(metric):
    model = make_model("llama", torch.float16)
    model.model.layers[1].input_layernorm.weight.data[:] = 60000.0
    with pytest.raises(InputError, match=r"model\.layers\.1"):
        prune_model(model, make_tokens(), PruneConfig(metric))
    assert bool((model.model.layers[2].mlp.up_proj.weight != 0).all())


def test_a_nan_in_a_norm_is_found_before_anything_changes(model):
    model.model.layers[2].input_layernorm.weight.data[3] = float("nan")
    before = states(model)
    with pytest.raises(InputError, match=r"layers\.2\.input_layernorm\.weight must be finite"):
        prune_model(model, make_tokens(), PruneConfig("magnitude"))
    assert all(torch.equal(before[name].nan_to_num(), t.nan_to_num()) for name, t in model.state_dict().items())


def test_tokens_that_the_model_does_not_know(model):
    tokens = make_tokens()
    tokens[1, 2] = 64
    with pytest.raises(InputError, match=r"ids from \d+ to 64 found, but the model knows those from 0 to 63"):
        prune_model(model, tokens, PruneConfig("magnitude"))


def test_skip_that_matches_nothing(model):
    refused(model, "skip 'no-such-layer' matches no weight", skip=["q_proj", "no-such-layer"])
