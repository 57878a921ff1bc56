"""Distillation of a quantized model: zeros and the grid stay, whatever the dtype, the windows and the masks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MIXTURES, make_model, make_tokens

from ace_ext import PruneConfig, prune_model
from ace_ext.grids import WIDTHS, Grid
from ace_ext.healing import HealSettings, distill_
from ace_ext.healing.context import HealContext
from ace_ext.healing.trainer import BlockTrainer
from ace_ext.models.blocks import find_blocks
from ace_ext.pruning import on_grid
from ace_ext.pruning.on_grid import GridWeight

QUICK = HealSettings(learning_rate=0.01, step_tokens=64, held_out=4, passes=4)
TEXT = make_tokens(28, 16, 3)  # 24 windows to train on in 6 steps, 4 held out
GRID = Grid(4, 64)


def matrices(model):
    return {b.full_name(child): linear.weight for b in find_blocks(model) for child, linear in b.linears.items()}


@torch.no_grad()
def round_(weight, grid):
    """Rounds a matrix to a grid with scales from the largest weights, negative where the largest is positive."""
    parts = weight.split(grid.group, dim=1)
    most = torch.stack([part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0] for part in parts], 1)
    scales = (most.float() / grid.lowest).to(weight.dtype)
    weight.copy_(grid.dequantize(grid.nearest(weight, scales), scales))


def quantized_model(family="llama", dtype=torch.bfloat16, grid=GRID):
    """A tiny model with half of its weights pruned and the others on ``grid``."""
    model = make_model(family, dtype)
    prune_model(model, make_tokens(), PruneConfig("wanda"))
    for weight in matrices(model).values():
        round_(weight, grid)
    return model


# --- rounding ---------------------------------------------------------------------------------------------------------


def near_grid(grid, dtype, shape, seed):
    """A matrix on the grid, its mask, and float32 weights near and far from it; row 0 is all zeros."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draw).to(dtype)
    weight *= torch.randint(0, 2, shape, generator=draw)
    weight[:1] = 0
    round_(weight, grid)
    mask = weight != 0
    master = (weight.float() + torch.randn(shape, generator=draw)).masked_fill(~mask, 0.0)
    return weight, mask, master


@settings(deadline=None)
@given(
    st.sampled_from(WIDTHS),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.tuples(st.integers(1, 9), st.integers(1, 150)),
    st.integers(0, 2**31),
)
def test_weights_are_rounded_to_the_nearest_point_that_is_not_zero(bits, dtype, shape, seed):
    grid = Grid(bits, 64)
    weight, mask, master = near_grid(grid, dtype, shape, seed)
    found = GridWeight.of(grid, weight)
    assert found.holds(weight)
    found.write_(weight, master, mask)
    assert torch.equal(weight != 0, mask)
    assert not torch.signbit(weight[~mask]).any()
    assert found.holds(weight)
    assert grid.recover(weight) is not None
    steps = grid.widened(found.scales, shape[1]).double()
    codes = torch.tensor([code for code in range(grid.lowest, grid.highest + 1) if code])
    nearest = (master.double()[..., None] - codes * steps[..., None]).abs().amin(-1)
    rounding = torch.finfo(dtype).eps * weight.double().abs()  # of the product of code and scale, in the dtype
    assert bool(((master.double() - weight.double()).abs() <= nearest + rounding + 1e-6)[mask].all())


@pytest.mark.parametrize("rows", [1, 3])
def test_rounding_in_parts_changes_nothing(rows, monkeypatch):
    outputs = []
    for at_once in (on_grid.IN_CACHE, rows * 100):
        monkeypatch.setattr(on_grid, "IN_CACHE", at_once)
        weight, mask, master = near_grid(GRID, torch.bfloat16, (7, 100), 1)
        found = GridWeight.of(GRID, weight)
        found.write_(weight, master, mask)
        assert found.holds(weight)
        outputs.append((weight, master))
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_a_weight_between_two_points_is_not_held():
    weight, *_ = near_grid(GRID, torch.float32, (3, 100), 1)
    found = GridWeight.of(GRID, weight)
    weight[2, 5] = found.scales[2, 0] * 1.25
    assert not found.holds(weight)
    assert GridWeight.of(GRID, weight) is None


def test_a_weight_that_left_the_grid_is_found():
    block = find_blocks(quantized_model())[0]
    trainer = BlockTrainer(block, grid=GRID)
    trainer.check(block)
    weight = trainer.weights["mlp.up_proj"]
    row, col = (weight != 0).nonzero()[0]
    with torch.no_grad():
        weight[row, col] *= 1.2
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.up_proj: training moved weights off their grid"):
        trainer.check(block)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        *(("llama", bits) for bits in WIDTHS),
        *((family, 4) for family in ("opt", "mixtral")),
        *(pytest.param(family, 4, marks=pytest.mark.nightly) for family in MIXTURES if family != "mixtral"),
    ],
)
def test_zeros_and_the_grid_stay(family, bits):
    grid = Grid(bits, 64)
    dense, model = make_model(family, torch.bfloat16), quantized_model(family, grid=grid)
    before = {name: weight.detach().clone() for name, weight in matrices(model).items()}
    healing = distill_(model, dense, TEXT, QUICK, grid=grid)
    assert healing.loss_after < healing.loss_before
    changed = 0
    for name, weight in matrices(model).items():
        assert torch.equal(weight == 0, before[name] == 0)
        assert not torch.signbit(weight[weight == 0]).any()
        scales = grid.recover(before[name]).scales
        assert torch.equal(grid.dequantize(grid.nearest(weight, scales), scales), weight)
        assert grid.recover(weight) is not None
        changed += int((weight != before[name]).sum())
    assert changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(dtype, device):
    dense, model = make_model("llama", dtype).to(device), quantized_model("llama", dtype).to(device)
    healing = distill_(model, dense, TEXT, QUICK, grid=GRID)
    assert healing.loss_after < healing.loss_before
    assert all(GRID.recover(weight) is not None for weight in matrices(model).values())


def test_a_matrix_off_the_grid_is_trained_as_without_one():
    dense, model = make_model("llama", torch.float32), quantized_model("llama", torch.float32)
    with torch.no_grad():
        left = matrices(model)["model.layers.1.mlp.up_proj"]
        left.mul_(torch.linspace(1, 2, left.shape[1]))
    before = {name: weight.detach().clone() for name, weight in matrices(model).items()}
    distill_(model, dense, TEXT, QUICK, grid=GRID)
    for name, weight in matrices(model).items():
        assert torch.equal(weight == 0, before[name] == 0)
        assert (GRID.recover(weight) is None) is (weight is left)
    assert not torch.equal(left, before["model.layers.1.mlp.up_proj"])


def test_a_teacher_equal_to_the_student_changes_nothing():
    """The loss is at its minimum, up to rounding: no measurement is below the one at the start."""
    model = quantized_model()
    before = copy.deepcopy(model.state_dict())
    healing = distill_(model, copy.deepcopy(model), TEXT, QUICK, grid=GRID)
    assert healing.loss_after == healing.loss_before == pytest.approx(0.0, abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("context", [{"parts": 3}, {"graphs": 3}], ids=str)
def test_windows_and_stored_activations(context):
    dense, model, other = make_model("llama", torch.bfloat16), quantized_model(), quantized_model()
    distill_(model, dense, TEXT, QUICK, grid=GRID, context=HealContext(**context))
    assert all(GRID.recover(weight) is not None for weight in matrices(model).values())
    distill_(other, dense, TEXT, QUICK, grid=GRID)
    same = all(torch.equal(*pair) for pair in zip(matrices(model).values(), matrices(other).values(), strict=True))
    assert same is ("graphs" in context)


def test_the_state_is_complete():
    """A trainer that takes over another one's state goes on with the same bits."""

    def step_(trainer, seed):
        draw = torch.Generator().manual_seed(seed)
        for each in trainer.trained.values():
            each.take(torch.randn(each.master.shape, generator=draw))
        trainer.step_(0.02)

    first, second = (BlockTrainer(find_blocks(quantized_model())[0], grid=GRID) for _ in range(2))
    step_(first, 0)
    second.restore_(copy.deepcopy(first.state()))
    for trainer in (first, second):
        assert all(each.on_grid for each in trainer.trained.values())
        step_(trainer, 1)
    for child, weight in first.weights.items():
        assert torch.equal(weight, second.weights[child])
        assert torch.equal(first.trained[child].master, second.trained[child].master)


def test_a_zero_that_a_mask_keeps_stays_zero():
    dense, model = make_model("llama", torch.bfloat16), quantized_model()
    before = {name: weight.detach().clone() for name, weight in matrices(model).items()}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in before.items()}
    distill_(model, dense, TEXT, QUICK, masks=masks, grid=GRID)
    assert all(torch.equal(weight == 0, before[name] == 0) for name, weight in matrices(model).items())


# --- where training begins --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.sampled_from(WIDTHS),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.tuples(st.integers(1, 9), st.integers(1, 150)),
    st.integers(0, 2**31),
)
def test_weights_begin_anywhere_that_rounds_to_the_same_point(bits, dtype, shape, seed):
    grid = Grid(bits, 64)
    weight, mask, _ = near_grid(grid, dtype, shape, seed)
    found = GridWeight.of(grid, weight)
    master, again = (weight.to(torch.float32, copy=True) for _ in range(2))
    found.spread_(master, mask, seed)
    found.spread_(again, mask, seed)
    assert torch.equal(master, again)
    assert bool((master[~mask] == 0).all())
    written = torch.empty_like(weight)
    found.write_(written, master, mask)
    assert torch.equal(written, weight)


def test_they_fill_the_range():
    weight, mask, _ = near_grid(GRID, torch.float32, (200, 128), 0)
    found, master = GridWeight.of(GRID, weight), weight.clone()
    found.spread_(master, mask, 1)
    places = ((master - weight) / GRID.widened(found.scales, 128))[mask]
    assert places.abs().max().item() == pytest.approx(0.5, abs=0.001)
    assert places.mean().item() == pytest.approx(0.0, abs=0.01)
    assert places.std().item() == pytest.approx(1 / 12**0.5, abs=0.01)


@pytest.mark.parametrize(("bits", "slower"), [(3, True), (4, True), (8, False)])
def test_a_coarse_grid_is_trained_more_slowly(bits, slower):
    """The larger half of normally distributed weights has a root mean square of 60 steps with 8 bits and the largest
    at the end of the grid, and of fewer than 4 with 4 bits."""
    trainer = BlockTrainer(find_blocks(quantized_model(grid=Grid(bits, 64)))[0], grid=Grid(bits, 64))
    for each in trainer.trained.values():
        rms = each.weight[each.weight != 0].float().square().mean().sqrt().item()
        steps = rms / each.on_grid.scales.float().abs().mean().item()
        assert (0.08 * steps < 1) is slower
        assert each.size == pytest.approx(rms * min(1, 0.08 * steps), rel=1e-5)


def test_training_that_starts_over_begins_at_the_same_places():
    trainer = BlockTrainer(find_blocks(quantized_model())[0], grid=GRID)
    begun = {child: each.master.clone() for child, each in trainer.trained.items()}
    best = trainer.snapshot()
    for each in trainer.trained.values():
        each.master.add_(1.0)
    trainer.restart_(best)
    assert all(torch.equal(each.master, begun[child]) for child, each in trainer.trained.items())
