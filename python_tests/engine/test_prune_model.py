"""The loop on tiny models of several families: counts, orders, and agreement with the oracle."""

import pytest
import torch
from tiny_models import DENSE_FAMILIES, make_model, make_tokens
from torch.nn import functional

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.engine.distillation import Distillation
from ace_ext.models.blocks import find_blocks
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.ops import reference
from ace_ext.pruning.groups import keep_count
from ace_ext.pruning.kinds import MOMENT
from ace_ext.pruning.metrics import METRICS
from ace_ext.pruning.stages import Score


def weights_of(model):
    return {
        block.full_name(child): linear.weight for block in find_blocks(model) for child, linear in block.linears.items()
    }


def oracle_prune_first_block(model, tokens, metric, sparsity):
    """Masks of the first block in the order block, from the dense block's inputs, all in float64."""
    block = find_blocks(model)[0]
    (call,) = capture_calls(model, [*find_blocks(model)], [{"input_ids": tokens}])
    inputs = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, child=child: inputs.__setitem__(child, args[0].flatten(0, 1)))
        for child, linear in block.linears.items()
    ]
    with torch.no_grad():
        run_block(block, call.hidden, call.others[0])
    for handle in handles:
        handle.remove()
    masks = {}
    for child, linear in block.linears.items():
        x, weight = inputs[child], linear.weight.detach()
        dense = functional.linear(x, weight)
        column = reference.column_factor(metric, x, dense) if METRICS[metric].column else None
        moment = reference.cosine_moment(x, dense) if MOMENT in METRICS[metric].needs else None
        score = reference.score(weight, METRICS[metric].op_formula, column, moment)
        masks[block.full_name(child)] = reference.keep_mask(score, keep_count(weight.shape[1], sparsity), "row")
    return masks


@pytest.mark.parametrize("metric", METRICS)
def test_masks_are_the_oracles(metric):
    model, tokens = make_model("qwen2"), make_tokens()
    masks = oracle_prune_first_block(model, tokens, metric, 0.5)
    dense = {name: weight.clone() for name, weight in weights_of(model).items()}
    prune_model(model, tokens, PruneConfig(f"collect(order=block) + {metric}"))
    for name, mask in masks.items():
        weight = weights_of(model)[name]
        differing = (weight != 0) != mask
        # Float32 statistics may swap two scores that agree to six digits; anything else is a fault.
        assert differing.float().mean() < 2e-3, name
        assert torch.equal(weight[weight != 0], dense[name][weight != 0])


@pytest.mark.parametrize("family", DENSE_FAMILIES)
@pytest.mark.parametrize("order", ["block", "sequential"])
@pytest.mark.parametrize("batch_tokens", [16, 10_000])
def test_every_row_keeps_exactly_k(family, order, batch_tokens):
    model = make_model(family, torch.bfloat16)
    untouched = {
        n: p.clone() for n, p in model.named_parameters() if n.removesuffix(".weight") not in weights_of(model)
    }
    method = f"collect(order={order}, batch_tokens={batch_tokens}) + wanda"
    report = prune_model(model, make_tokens(), PruneConfig(method, sparsity=0.6))
    weights = weights_of(model)
    for name, weight in weights.items():
        assert (weight.count_nonzero(dim=1) == keep_count(weight.shape[1], 0.6)).all(), name
    assert [matrix.name for matrix in report.matrices] == list(weights)
    assert report.sparsity == pytest.approx(0.6, abs=0.02)
    assert all(0 < m.relative_error < 1 and 0 < m.cosine < 1 and m.tokens == 96 for m in report.matrices)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in untouched.items())


@pytest.mark.parametrize("group", ["row", "model"])
@pytest.mark.parametrize("method", ["ace", "cosp", "cosvar"])
@pytest.mark.parametrize("factor", [1e-22, 1e20, 1e30])
def test_outputs_whose_tokens_float32_cannot_weight_are_refused(factor, method, group):
    """Token weights and their products would be infinite, or lose their digits: the mask would be wrong."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(factor)
    with pytest.raises(InputError, match=r"q_proj: token weights .* between 1e-19 and 1e\+16 .* such as wanda"):
        prune_model(model, make_tokens(), method=method, group=group)


def test_one_forward_equals_stages():
    """Sequential order: pruning inside one forward and in steps over batches see the same inputs."""
    one, several = make_model("llama"), make_model("llama")
    prune_model(one, make_tokens(), PruneConfig("collect(batch_tokens=10000) + wanda"))
    prune_model(several, make_tokens(), PruneConfig("collect(batch_tokens=32) + wanda"))
    for name, weight in weights_of(one).items():
        assert ((weight != 0) != (weights_of(several)[name] != 0)).float().mean() < 2e-3, name


def test_sequential_order_sees_pruned_inputs():
    """o_proj's statistics differ between the orders, q_proj's do not, in the first block."""
    block, sequential = make_model("llama"), make_model("llama")
    prune_model(block, make_tokens(), PruneConfig("collect(order=block) + wanda"))
    prune_model(sequential, make_tokens(), PruneConfig("collect(order=sequential) + wanda"))
    name = "model.layers.0.self_attn.{}_proj"
    assert torch.equal(weights_of(block)[name.format("q")], weights_of(sequential)[name.format("q")])
    assert not torch.equal(weights_of(block)[name.format("o")], weights_of(sequential)[name.format("o")])


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:16"])
def test_patterns(pattern):
    model = make_model("llama")
    keep, of = map(int, pattern.split(":"))
    prune_model(model, make_tokens(), PruneConfig("wanda", pattern=pattern))
    for weight in weights_of(model).values():
        assert (weight.unflatten(1, (-1, of)).count_nonzero(dim=2) == keep).all()


@pytest.mark.parametrize("metric", ["magnitude", "norm-cosvar", "cosp"])
def test_whole_model_group(metric):
    model = make_model("llama")
    report = prune_model(model, make_tokens(), PruneConfig(metric, 0.37, group="model"))
    size = sum(weight.numel() for weight in weights_of(model).values())
    assert sum(int(w.count_nonzero()) for w in weights_of(model).values()) == keep_count(size, 0.37)
    shares = [matrix.sparsity for matrix in report.matrices]
    assert max(shares) - min(shares) > 0.01


def test_matrix_group():
    model = make_model("llama")
    prune_model(model, make_tokens(), PruneConfig("wanda", group="matrix", sparsity=0.3))
    for weight in weights_of(model).values():
        assert int(weight.count_nonzero()) == keep_count(weight.numel(), 0.3)


def test_callable_metric_equals_the_built_in_one():
    def my_wanda(weight, stats):
        return weight.abs().float() * stats.norm.float()

    mine, built_in = make_model("llama"), make_model("llama")
    prune_model(mine, make_tokens(), PruneConfig(Score(my_wanda)))
    prune_model(built_in, make_tokens(), PruneConfig("wanda"))
    assert all(torch.equal(weight, weights_of(built_in)[name]) for name, weight in weights_of(mine).items())


def test_callable_metric_can_ask_for_the_moment():
    def my_cosp(weight, stats):
        return stats.moment

    my_cosp.needs_moment = True
    prune_model(make_model("llama"), make_tokens(), PruneConfig(Score(my_cosp)))


@pytest.mark.parametrize(
    ("score", "found"),
    [
        (lambda weight: weight.where(weight < weight.max(), torch.nan), "finite scores (got nan at "),
        (lambda weight: weight.float() / 0.0, "finite scores (got "),
        (lambda weight: torch.full_like(weight, 1e300, dtype=torch.float64), "finite scores (got inf at [0, 0]"),
        (lambda weight: weight[:1], "a float tensor of the weight's shape [32, 32] (got torch.float32 [1, 32])"),
        (lambda weight: weight != 0, "a float tensor of the weight's shape [32, 32] (got torch.bool [32, 32])"),
    ],
    ids=["nan", "inf", "too-large-for-float32", "shape", "bool"],
)
def test_what_a_callable_metric_must_return(score, found):
    with pytest.raises(InputError) as caught:
        prune_model(make_model("llama"), make_tokens(), method=Score(lambda weight, _: score(weight)))
    assert f"q_proj: metric must return {found}" in str(caught.value)


def test_padding_does_not_count():
    padded, plain = make_model("llama"), make_model("llama")
    tokens = make_tokens(2, 12)
    longer = torch.cat([tokens, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    mask = (torch.arange(17) < 12).long().expand(2, -1)
    prune_model(padded, [{"input_ids": longer, "attention_mask": mask}], method="wanda")
    prune_model(plain, tokens, method="wanda")
    for name, weight in weights_of(plain).items():
        assert ((weight != 0) != (weights_of(padded)[name] != 0)).float().mean() < 2e-3, name


def test_same_seed_same_bits():
    first, second = make_model("llama", torch.bfloat16), make_model("llama", torch.bfloat16)
    prune_model(first, make_tokens(), method="wanda")
    prune_model(second, make_tokens(), method="wanda")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_float16_model_is_put_back_whole_after_an_error():
    model = make_model("llama", torch.float16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def stop(_):
        raise RuntimeError("stopped")

    method = "wanda + train(epochs=2, learning_rate=0.05, held_out=0)"
    with pytest.raises(RuntimeError, match="stopped"):
        prune_model(model, make_tokens(), method=method, callback=stop)
    assert [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])] == []


def test_tables_of_a_float16_model_are_put_back_too(monkeypatch):
    model = make_model("llama", torch.float16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def stop(_):
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
        raise RuntimeError("stopped")

    monkeypatch.setattr(Distillation, "train_", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        prune_model(model, make_tokens(), method="wanda + quantize(bits=8, embeddings=8) + distill(tokens=64)")
    assert [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])] == []


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_what_follows_the_blocks_must_be_finite(name):
    model = make_model("llama")
    with torch.no_grad():
        model.get_parameter(name)[0] = torch.nan
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(InputError, match="LlamaForCausalLM: its logits hold NaN or infinity"):
        prune_model(model, make_tokens(), method="wanda + distill(tokens=64)")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_callback_and_training_mode():
    model = make_model("llama").train()
    seen = []
    prune_model(model, make_tokens(), PruneConfig("wanda"), callback=lambda block: seen.append(block.name))
    assert seen == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert model.training


def test_zeros_are_positive():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, :20] = -0.0  # more zeros than a tenth: the mask keeps some
    report = prune_model(model, make_tokens(), PruneConfig("wanda", sparsity=0.1))
    assert not any(((w == 0) & torch.signbit(w)).any() for w in weights_of(model).values())
    (matrix,) = [m for m in report.matrices if m.name == "model.layers.0.mlp.up_proj"]
    assert matrix.nonzero < matrix.keep


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.long), "calibration must have at least one token"),
        ([], "calibration must have at least one token"),
        (
            [{"input_ids": make_tokens(), "attention_mask": torch.zeros_like(make_tokens())}],
            r"calibration must have at least one token whose attention_mask is not 0 \(got none\)",
        ),
        (torch.zeros(4, dtype=torch.long), r"calibration tokens must be \[nsamples, seqlen\] \(got shape \[4\]\)"),
        (make_tokens().to("meta"), "calibration tokens must be an ordinary tensor with data .* on the meta device"),
        (make_tokens().to_sparse(), r"calibration tokens must be an ordinary tensor .* torch\.sparse_coo"),
        (
            [{"input_ids": make_tokens(), "attention_mask": make_tokens().to("meta")}],
            "calibration input attention_mask must be an ordinary tensor with data",
        ),
        (
            [{"input_ids": make_tokens(), "attention_masks": torch.zeros_like(make_tokens())}],
            "calibration input attention_masks is none of LlamaForCausalLM's; did you mean attention_mask",
        ),
    ],
    ids=["zero-rows", "no-batch", "padding-alone", "one-dimension", "meta", "sparse", "meta-mask", "misspelt"],
)
def test_bad_calibration_changes_nothing(tokens, message):
    model = make_model("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        prune_model(model, tokens, method="wanda")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_inputs_that_tokenizers_return_are_accepted():
    inputs = {"input_ids": make_tokens(), "token_type_ids": torch.zeros_like(make_tokens()), "labels": make_tokens()}
    assert prune_model(make_model("llama"), inputs, method="wanda").sparsity == 0.5


def test_pattern_must_divide_the_columns():
    model = make_model("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match=r"pattern 2:5 needs columns in whole groups of 5 \(got 32 in model"):
        prune_model(model, make_tokens(), PruneConfig("wanda", pattern="2:5"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_large_linear_that_text_does_not_use_is_an_error():
    """A small one stays dense, and is listed."""
    for order in ("block", "sequential"):
        model = make_model("llama")
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        model.model.layers[1].idle = torch.nn.Linear(32, 32)
        with pytest.raises(InputError, match=r"model\.layers\.1\.idle.* is not called with these inputs: 12% of"):
            prune_model(model, make_tokens(), PruneConfig(f"collect(order={order}) + wanda"))
        assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in before.items())
        report = prune_model(model, make_tokens(), PruneConfig(f"collect(order={order}) + wanda", max_dense=0.2))
        assert [(w.name, w.reason) for w in report.dense] == [("model.layers.1.idle.weight", "not called")]
        assert model.model.layers[1].idle.weight.all()


def test_the_configuration_is_one_or_its_arguments():
    model = make_model("llama")
    with pytest.raises(InputError, match=r"config must be a PruneConfig \(got 'balanced'\); .* by name"):
        prune_model(model, make_tokens(), "balanced")
    with pytest.raises(TypeError, match="give config, or method, not both"):
        prune_model(model, make_tokens(), PruneConfig("wanda"), method="balanced")
    with pytest.raises(TypeError, match=r"^there is no argument sparsty; did you mean sparsity\?$"):
        prune_model(model, make_tokens(), sparsty=0.5)
    with pytest.raises(TypeError, match=r"^there is no argument iterations; iterations is an option of admm and alps"):
        prune_model(model, make_tokens(), iterations=3)
    by_name = prune_model(model, make_tokens(), method="wanda", sparsity=0.25)
    assert by_name.config == PruneConfig("wanda", 0.25).to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "a folder"}, r"model must be a model, as from_pretrained returns it \(got str\)"),
        ({"model": torch.nn.Sequential(torch.nn.Linear(4, 4))}, r"transformers, with a config \(got Sequential\)"),
        ({"batches": None}, r"calibration must be tokens, or batches of a model's inputs \(got NoneType\)"),
        ({"callback": "print"}, r"callback must be a function \(got str\)"),
    ],
    ids=["model", "wrapper", "batches", "callback"],
)
def test_arguments_of_other_types_change_nothing(arguments, message):
    model = make_model("llama")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        prune_model(**{"model": model, "batches": make_tokens(), "method": "wanda", **arguments})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
