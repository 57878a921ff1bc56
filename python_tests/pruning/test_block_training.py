"""Block training on real decoder blocks of tiny models."""

import copy
from dataclasses import replace

import every_class
import pytest
import torch
from tiny_models import FAMILIES, make_model, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.grids import Grid
from ace_ext.models.blocks import find_blocks
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.pruning import block_training
from ace_ext.pruning.block_training import Training, train_block_
from ace_ext.pruning.masks import keep_of_group, scored_weight
from ace_ext.pruning.stages.quantize import Quantize
from ace_ext.pruning.trained_weight import kept_gradient
from ace_ext.records import Tuning

CONFIG = PruneConfig("magnitude")
TRAINING = Training(epochs=10, learning_rate=1e-2, step_tokens=1024, held_out=0.0)
SMALL_STEPS = replace(TRAINING, step_tokens=32)
MEASURE = replace(TRAINING, epochs=0)


def make_case(family="llama", dtype=torch.float32, skip=(), padded=False):
    """The second block at a sparsity of a half, its inputs, its dense outputs and its masks."""
    model = make_model(family, dtype)
    blocks = find_blocks(model, skip)
    batch = {"input_ids": make_tokens()}
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :5] = 0
    calls = list(capture_calls(model, blocks, [batch, {"input_ids": make_tokens(2, 16, 1)}]))
    block = blocks[1]
    inputs = [(call.hidden, call.others[1]) for call in calls]
    with torch.no_grad():
        targets = [run_block(block, *given) for given in inputs]
        for linear in block.linears.values():
            CONFIG.comparison.prune_(scored_weight(linear.weight, None, CONFIG), keep_of_group(linear.weight, CONFIG))
    masks = {child: linear.weight != 0 for child, linear in block.linears.items()}
    return block, inputs, targets, masks, [call.token_mask for call in calls]


def divided(block, inputs, targets, token_masks, training):
    return block_training._divided(block, inputs, targets, token_masks, torch.ones(targets[0].shape[-1]), training)


def state(block):
    return {name: value.clone() for name, value in block.module.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_the_mask_stays(family):
    block, inputs, targets, masks, _ = make_case(family)
    before = state(block)
    with torch.no_grad():
        trained = train_block_(block, inputs, targets, masks, training=SMALL_STEPS)
    assert trained.loss_after < 0.8 * trained.loss_before
    for child, linear in block.linears.items():
        assert torch.equal(linear.weight != 0, masks[child])
        assert not torch.signbit(linear.weight[~masks[child]]).any()
    for name, value in block.module.state_dict().items():
        chooses = any(part in name for part in (".gate.", ".router.", ".shared_expert_gate.", ".expert_bias"))
        assert torch.equal(value, before[name]) == chooses, name


def test_loss_is_relative_to_what_the_block_adds():
    block, inputs, targets, masks, _ = make_case()
    with torch.no_grad():
        outputs = [run_block(block, *given) for given in inputs]
        trained = train_block_(block, inputs, targets, masks, training=MEASURE)  # only measures
    channels = 1 / torch.cat([(t.square() / t.square().sum(-1, keepdim=True)).flatten(0, 1) for t in targets]).mean(0)
    relative = [
        ((out - target).square() * channels).double().sum(-1)
        / ((target - given[0]).square() * channels).double().sum(-1)
        for out, target, given in zip(outputs, targets, inputs, strict=True)
    ]
    assert trained.loss_before == pytest.approx(float(torch.cat(relative).mean()), rel=1e-5)


def test_weights_of_channels():
    """The inverse of a channel's mean share of a token's square, whatever its size; padded tokens do not count."""
    small = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 0.0])
    target = torch.stack([small, 1000 * small, torch.full_like(small, 7.0)])[None]
    found = block_training.channel_weights([target], [torch.tensor([True, True, False])])
    assert found[:5].tolist() == pytest.approx([8 / 6] * 4 + [2 / 6])
    assert found[5] == pytest.approx(1e6)
    assert torch.equal(block_training.channel_weights([torch.ones(2, 3, 4)], [None]), torch.ones(4))


def test_a_loss_that_rises_is_undone():
    block, inputs, targets, masks, _ = make_case()
    before = state(block)
    trained = train_block_(block, inputs, targets, masks, training=replace(TRAINING, epochs=3, learning_rate=1e4))
    assert trained.loss_after == trained.loss_before
    assert all(torch.equal(value, before[name]) for name, value in block.module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_its_dtype(dtype):
    block, inputs, targets, masks, _ = make_case(dtype=dtype)
    trained = train_block_(block, inputs, targets, masks, training=TRAINING)
    assert trained.loss_after < trained.loss_before
    assert {p.dtype for p in block.module.parameters()} == {dtype}


def test_the_same_bits_each_time():
    block, inputs, targets, masks, _ = make_case()
    start = state(block)
    train_block_(block, inputs, targets, masks, training=SMALL_STEPS)
    first = state(block)
    block.module.load_state_dict(start)
    train_block_(block, inputs, targets, masks, training=SMALL_STEPS)
    assert all(torch.equal(value, first[name]) for name, value in block.module.state_dict().items())


def test_skipped_linears_stay():
    block, inputs, targets, masks, _ = make_case(skip=("v_proj",))
    before = state(block)
    train_block_(block, inputs, targets, masks, training=TRAINING)
    assert "self_attn.v_proj" not in block.linears
    assert torch.equal(block.module.self_attn.v_proj.weight, before["self_attn.v_proj.weight"])
    assert not torch.equal(block.module.self_attn.q_proj.weight, before["self_attn.q_proj.weight"])


def test_biases_of_skipped_matrices_that_are_stored_transposed_stay():
    model = every_class.build("gpt2").eval()
    mlp = model.transformer.h[1].mlp
    torch.nn.init.normal_(mlp.c_proj.bias)
    torch.nn.init.normal_(mlp.c_fc.bias)
    kept, trained = mlp.c_proj.bias.clone(), mlp.c_fc.bias.clone()
    prune_model(model, make_tokens(), PruneConfig("wanda + train(epochs=2)", skip=(r"\.mlp\.c_proj$",)))
    assert torch.equal(mlp.c_proj.bias, kept)
    assert not torch.equal(mlp.c_fc.bias, trained)


def test_gradients_are_left_as_they_were():
    block, inputs, targets, masks, _ = make_case()
    block.module.input_layernorm.requires_grad_(False)
    train_block_(block, inputs, targets, masks, training=TRAINING)
    required = {name: p.requires_grad for name, p in block.module.named_parameters()}
    assert [name for name, flag in required.items() if not flag] == ["input_layernorm.weight"]
    assert all(p.grad is None for p in block.module.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_steps_give_what_the_batch_gives(family):
    block, inputs, targets, _, token_masks = make_case(family, padded=True)
    steps, held = divided(block, inputs, targets, token_masks, SMALL_STEPS)  # two samples of six at a time
    assert len(steps) == 4
    assert not held
    with torch.no_grad():
        parts = torch.cat([run_block(block, step.hidden, step.others) for step in steps[:3]])
        torch.testing.assert_close(parts, run_block(block, *inputs[0]))


def test_padded_tokens_do_not_count():
    block, inputs, targets, masks, token_masks = make_case(padded=True)
    other = copy.deepcopy(targets)
    other[0][0, :5] += 100.0  # of tokens that are padding
    first = train_block_(block, inputs, targets, masks, token_masks, training=MEASURE)
    assert train_block_(block, inputs, other, masks, token_masks, training=MEASURE) == first
    assert train_block_(block, inputs, other, masks, training=MEASURE) != first


def test_the_mask_of_a_matrix_that_is_stored_transposed_stays():
    """The gradients of such a matrix have other strides than the matrix."""
    block, inputs, targets, masks, _ = make_case()
    linear = block.module.mlp.down_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().T.contiguous().T)
    plain = train_block_(block, inputs, targets, masks, training=SMALL_STEPS)
    assert torch.equal(linear.weight != 0, masks["mlp.down_proj"])
    assert plain.loss_after < 0.8 * plain.loss_before


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 4), (torch.float32, 3), (torch.float16, 8)])
def test_matrices_on_a_grid_stay_on_it(dtype, bits):
    """Also when the best weights are put back, and all their zeros stay."""
    grid = Grid(bits, 64)
    block, inputs, targets, masks, _ = make_case(dtype=dtype)
    with torch.no_grad():
        for linear in block.linears.values():
            linear.weight.copy_(Quantize(bits, 64).round_plainly(linear.weight))
    masks = {child: linear.weight != 0 for child, linear in block.linears.items()}
    before = state(block)
    training = replace(SMALL_STEPS, held_out=0.25, learning_rate=0.1)
    trained = train_block_(block, inputs, targets, masks, training=training, grid=grid)
    assert trained.loss_after < trained.loss_before
    for child, linear in block.linears.items():
        assert torch.equal(linear.weight != 0, masks[child])
        assert grid.recover(linear.weight) is not None
        assert not torch.equal(linear.weight, before[f"{child}.weight"])


def test_the_last_samples_are_only_measured():
    block, inputs, targets, _, token_masks = make_case(padded=True)
    held = replace(SMALL_STEPS, held_out=0.25)  # 8 samples in batches of 6 and 2: both of the second batch
    steps, measured = divided(block, inputs, targets, token_masks, held)
    assert [len(step.hidden) for step in steps] == [2, 2, 2]
    assert torch.equal(torch.cat([step.target for step in measured]), targets[1])
    over = replace(SMALL_STEPS, held_out=0.3)  # and one of the first batch
    steps, measured = divided(block, inputs, targets, token_masks, over)
    assert [len(step.hidden) for step in steps] == [2, 2, 1]
    assert torch.equal(torch.cat([step.target for step in measured]), torch.cat([targets[0][5:], targets[1]]))


def test_one_sample_is_always_trained_on():
    training = replace(TRAINING, held_out=0.99)
    assert [training.trained_samples(count) for count in (1, 2, 100)] == [1, 1, 1]


def test_weights_are_those_of_the_epoch_with_the_lowest_held_out_loss(monkeypatch):
    """The losses that are measured decide, not those that are trained on."""
    block, inputs, targets, masks, _ = make_case()
    held = replace(SMALL_STEPS, held_out=0.25, epochs=4)
    seen = []
    losses = iter((1.0, 0.5, 0.9, 0.4, 0.6))

    def measured(block, steps):
        assert torch.equal(torch.cat([step.target for step in steps]), targets[1])
        seen.append(state(block))
        return next(losses)

    monkeypatch.setattr(block_training, "_mean_loss", measured)
    assert train_block_(block, inputs, targets, masks, training=held) == Tuning(1.0, 0.4, 3)
    assert all(torch.equal(value, seen[3][name]) for name, value in block.module.state_dict().items())
    assert not torch.equal(block.module.mlp.down_proj.weight, seen[1]["mlp.down_proj.weight"])


def test_a_rate_that_is_too_high_is_lowered():
    block, inputs, targets, masks, _ = make_case()
    high = replace(SMALL_STEPS, learning_rate=3.0, held_out=0.25)
    trained = train_block_(block, inputs, targets, masks, training=high)
    assert trained.epoch > 1
    assert trained.loss_after < trained.loss_before


def test_outputs_after_training_must_be_finite(monkeypatch):
    """Like the outputs of a block without training: all later ones would be NaN."""

    def step_(trainer, *_):
        trainer._trained[0].weight.data[0, 0] = float("inf")

    losses = iter((2.0, 1.0))
    monkeypatch.setattr(block_training._Trainer, "_step_", step_)
    monkeypatch.setattr(block_training, "_mean_loss", lambda *_: next(losses))
    with pytest.raises(InputError, match=r"model\.layers\.0: its output holds NaN or infinity"):
        prune_model(make_model("llama"), make_tokens(), PruneConfig("train(epochs=1)"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_pruned_weights_are_positive_zeros(dtype):
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    mask = torch.tensor([True, False]).repeat(18)[:35].view(7, 5)
    gradient[0, 1], gradient[0, 3], gradient[1, 0] = float("nan"), float("-inf"), -1.0
    want = gradient.float().masked_fill(~mask, 0.0).contiguous()
    found = kept_gradient(gradient, mask)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.int32), want.view(torch.int32))
    whole = kept_gradient(gradient[2:], None)
    assert torch.equal(whole, gradient[2:].float())
