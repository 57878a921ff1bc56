"""The stage ``quantize`` against its definition: grids, GPTQ with explicit inverses, coordinate descent, and methods
that only quantize."""

import pytest
import torch

from ace_ext import PruneConfig
from ace_ext.grids import Grid
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.groups import GROUPS
from ace_ext.pruning.masks import keep_budget
from ace_ext.pruning.method import quantize_of
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.stages import Problem, Quantize, quantize
from ace_ext.pruning.stages.quantize import best_scales, nearest_codes
from ace_ext.pruning.statistics import LinearStatistics, MomentState

ROWS, COLS, TOKENS = 7, 200, 400  # a last group that is narrower


def make_case(dtype=torch.float32, rows=ROWS, cols=COLS, size=1.0):
    """A weight and the statistics of correlated inputs. Some are much larger than others, and one is always zero."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(cols, cols, generator=random) / cols**0.5 + torch.eye(cols)
    x = torch.randn(TOKENS, cols, generator=random) @ mix * (torch.rand(cols, generator=random) * 3).exp()
    x[:, 3] = 0.0
    stats = LinearStatistics(MomentState(cols), None, None, GramState(cols), len(x))
    stats.input.update(x)
    stats.gram.update(x)
    return (torch.randn(rows, cols, generator=random) * size).to(dtype), x, stats


def loss_of(x, weight, dense) -> float:
    return float((x @ (weight.float() - dense.float()).T).square().sum() / (x @ dense.float().T).square().sum())


METHODS = [
    {"method": "balanced + quantize(bits=4)"},
    {"method": "fast + quantize(bits=8)"},
    {"method": "wanda + swaps + obs + quantize(bits=3, group=64)"},
    {"method": "wanda + quantize(bits=4, sweeps=0)"},
    {"method": "magnitude + mean-update + quantize(bits=8, group=192)", "group": "matrix"},
    {"method": "balanced + quantize", "pattern": "2:4"},
    {"method": "quantize(bits=4)"},
    {"method": "balanced + quantize(bits=4)", "sparsity": 0.0},
]


@pytest.mark.parametrize("size", [1.0, 2.0**-18, 2.0**-40])
@pytest.mark.parametrize("setting", METHODS, ids=str)
def test_every_value_is_on_the_grid_in_the_weights_dtype(setting, size, dtype):
    if dtype == torch.float16 and size == 2.0**-40:
        size = 2.0**-22  # subnormal numbers
    weight, x, stats = make_case(dtype, size=size)
    dense, config = weight.clone(), PruneConfig(**setting)
    solution = prune_linear_(weight, stats, config)
    assert weight.dtype == dtype
    assert config.method.quantize.grid.recover(weight) is not None
    assert int((weight != 0).sum()) <= keep_budget(weight, config)
    assert not torch.signbit(weight[weight == 0]).any()
    assert solution.loss_after < solution.loss_unquantized + {8: 0.01, 4: 0.03, 3: 0.1}[config.method.quantize.bits]
    if size == 1.0:
        assert solution.loss_after == pytest.approx(loss_of(x, weight, dense), rel=1e-3)


@pytest.mark.parametrize("method", ["wanda", "balanced"])
def test_zeros_stay_zeros(method):
    pruned, _, stats = make_case()
    weight = pruned.clone()
    prune_linear_(pruned, stats, PruneConfig(method))
    prune_linear_(weight, stats, PruneConfig(f"{method} + quantize(bits=8)"))
    assert not ((pruned == 0) & (weight != 0)).any()
    again = pruned.clone()
    solution = prune_linear_(again, stats, PruneConfig("quantize(bits=8)"))  # of a model that was pruned before
    assert torch.equal(again == 0, weight == 0)
    assert (solution.loss_before, solution.loss_unquantized) == (None, 0.0)


def explicit(weight, mask, gram, damping, grid, problem):
    """GPTQ's definition: the inverse over a column and all later ones compensates for each rounding error."""
    weight, hessian = weight.double().clone(), gram.double()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = hessian.diagonal()[~dead].mean()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    whole = [torch.linalg.inv(hessian[c:, c:]) for c in range(len(hessian))]
    importance = torch.stack([1 / inverse[0, 0] for inverse in whole]).float()
    values = torch.zeros_like(weight)
    for c, inverse in enumerate(whole):
        if c % grid.group == 0:
            group = slice(c, c + grid.group)
            scale = best_scales((weight * mask)[:, group].float(), importance[group], grid, problem)
        code = nearest_codes(weight[:, c].float(), scale, grid) * mask[:, c]
        values[:, c] = code * scale
        weight[:, c:] -= ((weight[:, c] - values[:, c]) / inverse[0, 0])[:, None] * inverse[0]
    return values


@pytest.mark.parametrize("group", [64, 128])
def test_gptq_equals_explicit_inverses(group, monkeypatch):
    monkeypatch.setattr(quantize, "BLOCK", 48)  # two blocks and a rest in a group
    weight, _, stats = make_case()
    pruned = weight.clone()
    prune_linear_(pruned, stats, PruneConfig("wanda"))
    stage, problem = Quantize(bits=4, group=group, sweeps=0), Problem(weight, stats.gram, GROUPS["row"], COLS)
    expected = explicit(pruned, pruned != 0, stats.gram.matrix.clone(), stage.damping, stage.grid, problem)
    found = stage.quantize(problem, pruned).weight
    assert (found.double() - expected).abs().max() < 1e-5


def test_descent_ends_where_no_code_has_a_better_value():
    weight, _, stats = make_case(rows=3)
    stage, problem = Quantize(bits=4, sweeps=60), Problem(weight, stats.gram, GROUPS["row"], COLS)
    values = stage.quantize(problem, weight).weight
    found = stage.grid.recover(values)
    scales = stage.grid.widened(found.scales, COLS)
    diagonal = stats.gram.matrix.diagonal()
    hessian = stats.gram.matrix.double() + stage.damping * diagonal[diagonal > 0].mean() * torch.eye(COLS).double()

    def loss(candidate):
        change = (candidate - weight).double()
        return ((change @ hessian) * change).sum(1)

    least = loss(values)
    for column in torch.arange(0, COLS, 7).tolist():
        for step in (-1, 1):
            moved = values.clone()
            code = (found.codes[:, column] + step).clamp(stage.grid.lowest, stage.grid.highest)
            moved[:, column] = code * scales[:, column]
            assert (loss(moved) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize(("bits", "sweeps"), [(8, 0), (4, 2), (3, 2)])
def test_sweeps_where_they_gain(bits, sweeps):
    by_default, named = (make_case() for _ in range(2))
    for (weight, _, stats), method in (
        (by_default, f"quantize(bits={bits})"),
        (named, f"quantize(bits={bits}, sweeps={sweeps})"),
    ):
        prune_linear_(weight, stats, PruneConfig(method))
    assert torch.equal(by_default[0], named[0])


def test_8_bits_lose_nothing_by_the_full_scale_where_columns_count_the_same(random, monkeypatch):
    weight = torch.randn(64, 128, generator=random) / torch.rand(64, 1, generator=random)  # of Gaussian rows
    problem, importance = Problem.without_statistics(weight), torch.ones(128)
    full = best_scales(weight, importance, Grid(8, 128), problem)
    monkeypatch.setattr(quantize, "NEARLY_EXACT", 0)  # all scales are tried
    assert torch.equal(best_scales(weight, importance, Grid(8, 128), problem), full)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_each_sweep_lowers_the_loss(bits):
    losses = []
    for sweeps in (0, 1, 4):
        weight, _, stats = make_case()
        losses.append(
            prune_linear_(weight, stats, PruneConfig(f"quantize(bits={bits}, sweeps={sweeps}, damping=0)")).loss_after
        )
    assert losses[0] > losses[1] > losses[2]


def test_compensation_beats_plain_rounding():
    weight, x, stats = make_case()
    dense, plain = weight.clone(), Quantize(bits=4).round_plainly(weight)
    prune_linear_(weight, stats, PruneConfig("quantize(bits=4)"))
    assert loss_of(x, weight, dense) < 0.7 * loss_of(x, plain, dense)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_searched_scales_are_no_worse_than_those_of_the_maximum(bits):
    weight, _, _ = make_case()
    stage, problem = Quantize(bits=bits), Problem.without_statistics(weight)
    importance = torch.rand(COLS)

    def loss(scale):
        values = nearest_codes(weight, scale[:, None], stage.grid) * scale[:, None]
        return (values - weight).square() @ importance

    searched = loss(best_scales(weight, importance, stage.grid, problem))
    largest = loss(weight.abs().amax(1) / stage.grid.highest)
    assert (searched <= largest * (1 + 1e-5)).all()
    assert bits == 8 or (searched < 0.9 * largest).any()


@pytest.mark.parametrize("bits", [4, 3])
def test_the_largest_weight_of_a_group_has_a_negative_code(bits):
    """There is one more of these, so the steps can be smaller."""
    weight, _, _ = make_case(rows=200)
    stage, problem = Quantize(bits=bits), Problem.without_statistics(weight)
    scale = best_scales(weight, torch.ones(COLS), stage.grid, problem)
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))[:, 0]
    assert ((scale < 0) == (largest > 0)).all()

    def loss(scale):
        return (nearest_codes(weight, scale[:, None], stage.grid) * scale[:, None] - weight).square().sum()

    assert loss(scale) < 0.95 * loss(-scale)


def test_plain_rounding_is_on_the_grid(dtype):
    weight, _, _ = make_case(dtype)
    weight[:, ::2] = 0.0
    weight[2] = 0.0
    stage = Quantize(bits=8, group=64)
    rounded = stage.round_plainly(weight)
    assert stage.grid.recover(rounded) is not None
    assert (rounded[weight == 0] == 0).all()
    torch.testing.assert_close(rounded.float(), weight.float(), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("entries", [1, 3 * COLS, ROWS * COLS - 1])
def test_some_rows_at_a_time_give_what_all_give(entries, monkeypatch):
    weight, _, stats = make_case()
    parts, config = weight.clone(), PruneConfig("balanced + quantize(bits=8)")
    prune_linear_(weight, stats, config)
    monkeypatch.setattr(quantize, "PART_ENTRIES", entries)
    prune_linear_(parts, stats, config)
    torch.testing.assert_close(parts, weight, rtol=0.01, atol=0.03)  # a tie may round the other way


def test_an_overflow_is_refused():
    weight, _, stats = make_case()
    stats.gram.matrix *= 1e38 / stats.gram.matrix.max()
    dense = weight.clone()
    with pytest.raises(ValueError, match=r"quantize_block_: weight must be finite|raise damping"):
        prune_linear_(weight, stats, PruneConfig("quantize"))
    assert torch.equal(weight, dense)


def test_without_a_sparsity_nothing_is_removed():
    weight, _, stats = make_case()
    config = PruneConfig("balanced + quantize(bits=8)", sparsity=0.0)
    alone = weight.clone()
    prune_linear_(weight, stats, config)
    prune_linear_(alone, stats, PruneConfig("quantize(bits=8)"))
    assert torch.equal(weight, alone)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("admm", None),
        ("custom + quantize(bits=8)", Quantize(bits=8)),
        ("collect(order=block) + admm(damping=1e+3) + quantize(bits=3, group=64) + distill", Quantize(3, 64)),
        ("quantized", None),
    ],
)
def test_the_grid_is_read_from_a_reports_method(text, expected):
    """Also where a score is a function that has no name here."""
    assert quantize_of(text) == expected
