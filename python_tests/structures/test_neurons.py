"""Removed neurons: an ordinary model of the class stays, and what contributes nothing goes unnoticed."""

import pytest
import torch
import transformers
from tiny_models import make_model, make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models.blocks import find_blocks
from ace_ext.structures.choice import divergence
from ace_ext.structures.search import find_neurons

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "opt", "gemma3"]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def relative(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


def parts(family: str):
    """A model, and of each block the Linear that reads the neurons, and the parameters that make them."""
    model = make_model(family)
    found = []
    for block, own in zip(find_blocks(model), find_neurons(model, find_blocks(model)).parts, strict=True):
        (units,) = own
        last = block.linears[units.last]
        found.append((last, [model.get_parameter(cut.name) for cut in units.rows]))
    return model, found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remove": "neurons=0.2", "sparsity": 0.5, "skip": "no_such"}, "skip 'no_such' matches no weight"),
        ({"remove": "neurons=0.2", "pattern": "2:4"}, r"needs columns in whole groups of 4 \(got 38"),
        ({"remove": "blocks=1", "sparsity": 0.5, "skip": [r"layers\.2\.mlp"]}, "matches no weight of the blocks"),
    ],
    ids=str,
)
def test_zeros_that_cannot_follow_are_refused_before_the_removal(settings, message):
    model = make_model("llama")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(InputError, match=message):
        prune_model(model, make_tokens(), method="wanda", **settings)
    assert all(torch.equal(weight, before.pop(name)) for name, weight in model.named_parameters())
    assert not before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", ["obs", "variance", "cosine"])
def test_neurons_that_are_always_zero_are_the_ones_that_go(family, score):
    model, found = parts(family)
    dead = torch.arange(1, 48, 4)  # 12 of 48
    for last, rows in found:
        last.weight.data /= last.weight.data.norm(dim=0)
        for parameter in rows:
            parameter.data[dead] = 0
    tokens = make_tokens(16, 32)
    expected = logits(model, tokens)
    report = prune_model(model, tokens, remove=f"neurons=0.25(score={score})")
    assert report.removed[0].after == 36
    assert relative(logits(model, tokens), expected) < 1e-4
    if score != "obs":  # the dense weights of the neurons that stay are kept up to the fit, in their order
        alive = [neuron for neuron in range(48) if neuron not in dead.tolist()]
        new = find_neurons(model, find_blocks(model)).present[0]
        assert torch.equal(model.get_parameter(new.rows[0].name), found[0][1][0][alive])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_one_of_two_equal_neurons_goes_and_the_other_takes_its_place(family):
    """Not for OPT: its ReLU leaves some neurons of a random model nearly silent, and those go first."""
    model, found = parts(family)
    twin = torch.arange(36, 48)
    for last, rows in found:
        last.weight.data /= last.weight.data.norm(dim=0)
        for parameter in rows:
            parameter.data[twin] = parameter.data[twin - 36]
    tokens = make_tokens(64, 32)
    expected = logits(model, tokens)
    prune_model(model, tokens, remove="neurons=0.25(score=obs)")
    assert relative(logits(model, tokens), expected) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", ["", "(refit=none)", "(score=variance, refit=matrix, multiple=16)"])
def test_plain_transformers_loads_the_smaller_model(tmp_path, family, options):
    model, tokens = make_model(family), make_tokens(8, 16)
    before = sum(parameter.numel() for parameter in model.parameters())
    report = prune_model(model, tokens, remove=f"neurons=0.33{options}")
    assert report.removed[0].after == 32
    assert report.removed[0].parameters_before == before
    assert report.removed[0].parameters_after == sum(parameter.numel() for parameter in model.parameters()) < before
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {type(module).__module__.split(".")[0] for module in again.modules()} <= {"torch", "transformers"}
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_least_squares_lowers_the_error_of_the_output(family):
    tokens = make_tokens(64, 32)
    dense = logits(make_model(family), tokens)
    errors = []
    for refit in ("none", "matrix"):
        model = make_model(family)
        prune_model(model, tokens, remove=f"neurons=0.25(score=obs, refit={refit})")
        errors.append(relative(logits(model, tokens), dense))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", ["flap", "wanda-sp"])
def test_published_methods_keep_dense_weights(name):
    """By definition, in the last block: FLAP reads the dense model's states, Wanda-sp those of the smaller model."""
    dense, model, tokens = make_model("llama"), make_model("llama"), make_tokens(16, 32)
    prune_model(model, tokens, remove=f"neurons=0.5(score=published-{name})")
    whole = make_model("llama")
    if name == "wanda-sp":
        for place in (0, 1):
            whole.model.layers[place] = model.model.layers[place]
    mlp, seen = dense.model.layers[2].mlp, []
    whole.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    logits(whole, tokens)
    weight, h = mlp.down_proj.weight.detach(), seen[0]
    flap, wanda = h.var(0, correction=0) * weight.square().sum(0), weight.abs().sum(0) * h.norm(dim=0)
    kept = (flap if name == "flap" else wanda).topk(24).indices.sort().values
    new = model.model.layers[2].mlp
    assert torch.equal(new.down_proj.weight, weight[:, kept])
    assert torch.equal(new.gate_proj.weight, mlp.gate_proj.weight[kept])


def test_published_osscar_is_greedy_with_least_squares():
    """Equal neurons, as for ``obs``; and a bias is used where the class has one (OPT), by FLAP."""
    tokens = make_tokens(64, 32)
    dense = logits(make_model("opt"), tokens)
    errors = {}
    for score in ("published-osscar", "published-flap", "published-wanda-sp"):
        model = make_model("opt")
        prune_model(model, tokens, remove=f"neurons=0.25(score={score})")
        errors[score] = relative(logits(model, tokens), dense)
    assert errors["published-osscar"] < errors["published-flap"] < errors["published-wanda-sp"]


def test_distilled_towards_the_dense_model():
    dense, model = make_model("llama"), make_model("llama")
    tokens, text = make_tokens(16, 32), make_tokens(64, 32, seed=1)
    report = prune_model(model, tokens, remove="neurons=0.5", method="distill", distill_text=text)
    assert report.healing is not None
    assert report.healing.loss_after < report.healing.loss_before
    only_removed = make_model("llama")
    prune_model(only_removed, tokens, remove="neurons=0.5")
    held = {"input_ids": make_tokens(4, 32, seed=2)}
    assert divergence(dense, model, [held]) < divergence(dense, only_removed, [held])


def test_padding_is_left_out():
    tokens = make_tokens(16, 32)
    models = [make_model("llama"), make_model("llama")]
    padded = torch.cat([tokens, torch.zeros_like(tokens[:, :5])], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens[:, :5])], dim=1)
    prune_model(models[0], tokens, remove="neurons=0.25")
    prune_model(models[1], {"input_ids": padded, "attention_mask": mask}, remove="neurons=0.25")
    assert relative(logits(models[1], tokens), logits(models[0], tokens)) < 1e-4


def test_zeros_follow_on_the_smaller_model():
    model, tokens = make_model("llama"), make_tokens(16, 32)
    report = prune_model(model, tokens, method="wanda", remove="neurons=0.25", pattern="2:4")
    assert report.removed[0].after == 36
    shapes = {matrix.name.rpartition(".")[2]: matrix.shape for matrix in report.matrices}
    assert shapes["down_proj"] == (32, 36)
    assert report.sparsity == 0.5
    assert report.config["remove"] == "neurons=0.25"
    down = model.model.layers[0].mlp.down_proj.weight.view(32, 9, 4)
    assert int(down.count_nonzero(dim=2).max()) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    tokens = make_tokens(16, 32)
    model, single = make_model("llama", dtype), make_model("llama", dtype).float()
    for each in (model, single):
        prune_model(each, tokens, remove="neurons=0.25")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert relative(logits(model, tokens).float(), logits(single, tokens)) < 0.2


def test_a_model_without_a_head():
    model, tokens = make_model("llama").model, make_tokens(8, 16)
    report = prune_model(model, tokens, remove="blocks=1 + neurons=0.25")
    assert [record.after for record in report.removed] == [2, 36]
    assert torch.isfinite(model(input_ids=tokens).last_hidden_state).all()


@pytest.mark.parametrize(
    ("family", "words"),
    [("mamba", "no number in the configuration"), ("zamba", "same tensor")],
)
def test_what_cannot_be_removed_is_refused_and_nothing_changes(family, words):
    model, tokens = make_model(family), make_tokens(4, 16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=words):
        prune_model(model, tokens, remove="neurons=0.25")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_class_whose_layout_differs_from_its_configuration_is_refused():
    """Interleaved gate and up: the halves that stay would be of different neurons."""
    model = make_model("llama")
    for layer in model.model.layers:
        mlp = layer.mlp
        mix = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0]

        def forward(x, mlp=mlp, mix=mix):
            return mlp.down_proj((mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) @ mix)

        mlp.forward = forward
    with pytest.raises(InputError, match="does not compute the same"):
        prune_model(model, make_tokens(4, 16), remove="neurons=0.25")


def test_not_finite_numbers_are_refused_and_nothing_changes():
    model = make_model("llama", torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data *= 3e4
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(InputError, match=r"NaN or infinity|does not compute the same"):
        prune_model(model, make_tokens(8, 16), remove="neurons=0.25")
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
