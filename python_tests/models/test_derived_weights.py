"""Weights that are not plain parameters of their own: pruning them would leave the model as dense as before, so they
are refused before anything changes. And numbers that are not finite: where they arise is named."""

import pytest
import torch
from tiny_models import make_model, make_tokens
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.engine import batch_states


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(model, message, method="wanda", **config):
    before = states(model)
    with pytest.raises(InputError, match=message):
        prune_model(model, make_tokens(), PruneConfig(method, **config))
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


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Named(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def with_its_weight(kind, linear):
    made = kind(linear.in_features, linear.out_features, bias=False)
    made.weight = linear.weight
    return made


def halve_input(linear, inputs):
    return (inputs[0] / 2,)


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: setattr(mlp, "up_proj", with_its_weight(Doubled, mlp.up_proj)),
        lambda mlp: mlp.up_proj.register_forward_pre_hook(halve_input),
        lambda mlp: mlp.up_proj.register_forward_hook(lambda linear, inputs, output: output + 1),
        lambda mlp: nn.utils.weight_norm(mlp.up_proj),
    ],
    ids=["subclass", "hook before", "hook after", "old weight_norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_outputs_that_are_not_those_of_the_weight(change, model):
    change(model.model.layers[1].mlp)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj: its (output is not that of its )?weight"):
        prune_model(model, make_tokens(), PruneConfig("magnitude"))


def test_hooks_that_only_look_are_fine(model):
    seen = []
    model.model.layers[1].mlp.up_proj = with_its_weight(Named, up(model))
    up(model).register_forward_hook(lambda linear, inputs, output: seen.append(output.shape))
    assert prune_model(model, make_tokens(), PruneConfig("magnitude")).sparsity == 0.5


def test_zeros_are_those_that_the_model_computes_with(model):
    """The product with each unit vector shows the weight that is used: it has as many zeros as the report says."""
    report = prune_model(model, make_tokens(), PruneConfig("norm-cosvar", sparsity=0.6))
    for matrix in report.matrices:
        linear = model.get_submodule(matrix.name)
        used = linear(torch.eye(linear.in_features)) - (0 if linear.bias is None else linear.bias)
        assert int(used.count_nonzero()) == matrix.nonzero


def test_a_second_list_of_blocks(model):
    model.model.more_layers = nn.ModuleList([model.model.layers.pop(-1)])
    message = r"model\.more_layers\.0\..* is not called with these inputs: .* would stay dense"
    refused(model, message, method="magnitude")
    model.model.forward = type(model.model).forward.__get__(model.model)
    model.model.config.num_hidden_layers = 2
    report = prune_model(model, make_tokens(), PruneConfig("magnitude", skip=[r"model\.more_layers"]))
    assert len(report.blocks) == 2


def test_a_second_list_of_blocks_beside_the_text(model):
    """Its name says that text does not go through it."""
    model.model.vision_layers = nn.ModuleList([model.model.layers.pop(-1)])
    refused(
        model, r"second list of blocks, model\.vision_layers \(1 block\), which would stay dense", method="magnitude"
    )


def test_a_pruning_of_torch_that_was_made_permanent(model):
    prune.l1_unstructured(up(model), "weight", 0.25)
    prune.remove(up(model), "weight")
    prune_model(model, make_tokens(), PruneConfig("magnitude"))
    assert (up(model).weight == 0).float().mean() == 0.5


def test_a_linear_tied_to_the_embedding(model):
    model.model.layers[1].mlp.tied = nn.Linear(32, 64, bias=False)
    model.model.layers[1].mlp.tied.weight = model.model.embed_tokens.weight
    refused(model, r"layers\.1\.mlp\.tied\.weight is the same tensor as model\.embed_tokens\.weight")


@pytest.mark.parametrize("batch_tokens", [32, 16384])
@pytest.mark.parametrize("metric", ["magnitude", "wanda", "norm-cosvar"])
def test_numbers_that_are_not_finite_are_named(metric, batch_tokens):
    model = make_model("llama", torch.float16)
    model.model.layers[1].input_layernorm.weight.data[:] = 60000.0
    refused(model, r"^model\.layers\.1", f"collect(batch_tokens={batch_tokens}) + {metric}")


@pytest.mark.parametrize("order", ["sequential", "block"])
@pytest.mark.parametrize("batch_tokens", [32, 16384])
def test_the_module_that_overflows_is_named(order, batch_tokens):
    """And the blocks before it, which were pruned by then, are as they were."""
    model = make_model("llama", torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(60000.0)
    message = r"^model\.layers\.1: its output holds NaN or infinity, first in the output of .*\.1\.mlp\.down_proj; "
    refused(model, message, f"collect(order={order}, batch_tokens={batch_tokens}) + magnitude")


@pytest.mark.parametrize("batch_tokens", [32, 16384])
def test_the_block_that_overflows_is_named_on_a_gpu(batch_tokens, monkeypatch):
    """Where outputs are read once a block, and its inputs are gone by then. Run on the CPU."""
    monkeypatch.setattr(batch_states, "read_at_once", lambda _: False)
    model = make_model("llama", torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(60000.0)
    message = r"^model\.layers\.1: its output holds NaN or infinity; a weight in or before it is damaged"
    refused(model, message, f"collect(batch_tokens={batch_tokens}) + magnitude")


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


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (make_tokens().float(), "tokens: float32 found; use ids in int64 or int32, as a tokenizer returns them"),
        (make_tokens() > 31, "tokens: bool found"),
        ([make_tokens()[0]], r"input_ids must be \[batch, seqlen\]"),
        ({"input_ids": make_tokens().to(torch.int16)}, "tokens: int16 found"),
        (make_tokens().repeat(1, 99), r"seqlen: \d+ found, but the model has 128 positions"),
    ],
)
def test_calibration_that_is_none(batches, message, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        prune_model(model, batches, PruneConfig("magnitude"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pattern_that_takes_for_ever(model):
    """Nested repeats try each way to divide a name."""
    refused(model, r"skip '\(\(\[a-z\._0-9\]\*\)\*\)\*!' takes more than 0.25 s", skip=["(([a-z._0-9]*)*)*!"])


def test_skip_that_matches_nothing(model):
    refused(model, "skip 'no-such-layer' matches no weight", skip=["q_proj", "no-such-layer"])
