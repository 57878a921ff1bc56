"""The stages ``mean-swaps`` and ``mean-update``, which read means and variances and no Gram matrix."""

import pytest
import torch
from tiny_models import make_model, make_tokens

from ace_ext import PruneConfig, ops, prune_model
from ace_ext.ops import mean_reference
from ace_ext.pruning.gram import GramState, RelativeLoss
from ace_ext.pruning.kinds import GRAM, INPUT, SHARED_GRAM
from ace_ext.pruning.masks import keep_budget, keep_of_group, scored_weight
from ace_ext.pruning.moment_gram import MomentGram
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.stages import mean_update
from ace_ext.pruning.statistics import LinearStatistics, MomentState

ROWS, COLS, TOKENS = 12, 64, 400

STAGES = ["mean-swaps", "mean-update", "mean-swaps + mean-update"]
GROUPS = [{"group": "row"}, {"group": "matrix"}, {"pattern": "2:4"}, {"pattern": "4:8"}]


def make_case(dtype=torch.float32):
    """A weight, inputs whose means are as large as their deviations, and the statistics that the stages need."""
    random = torch.Generator().manual_seed(0)
    scale = torch.randn(COLS, generator=random).exp()
    x = (torch.randn(TOKENS, COLS, generator=random) + torch.randn(COLS, generator=random)) * scale
    weight = torch.randn(ROWS, COLS, generator=random).to(dtype)
    state = MomentState(COLS)
    state.update(x)
    return weight, x, LinearStatistics(state, None, None)


@pytest.mark.parametrize("metric", ["wanda", "varp", "magnitude"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("stages", STAGES)
def test_they_keep_exactly_k_and_lower_the_error(stages, group, metric, dtype):
    weight, x, stats = make_case(dtype)
    dense, config = weight.clone(), PruneConfig(f"{metric} + {stages}", **group)
    mask = config.comparison.mask(scored_weight(weight, stats, config), keep_of_group(weight, config))
    solution = prune_linear_(weight, stats, config)
    assert weight.dtype == dtype
    assert int((weight != 0).sum()) == keep_budget(weight, config)
    counts = config.comparison.counts(weight)
    assert torch.equal(counts, config.comparison.counts(mask.float()))
    assert not torch.signbit(weight[weight == 0]).any()
    if "mean-swaps" not in stages:
        assert torch.equal(weight != 0, mask)
    if "mean-update" not in stages:
        assert torch.equal(weight[weight != 0], dense[weight != 0])
    assert solution.loss_after < 0.9 * solution.loss_before
    assert solution.solver == stages
    change = (x @ (weight - dense).float().T).square().sum() / (x @ (dense * ~mask).float().T).square().sum()
    assert change < 0.95  # measured by all inputs and not only by their moments


def test_the_mask_is_that_of_the_op(random):
    weight, _, stats = make_case()
    config = PruneConfig("varp + mean-swaps(rounds=3)")
    expected = config.comparison.mask(scored_weight(weight, stats, config), keep_of_group(weight, config))
    moments = MomentGram.of(stats.input)
    expected, swaps = mean_reference.balance_mean(expected, weight, moments.variance, moments.mean, rounds=3)
    assert (swaps > 0).any()
    prune_linear_(weight, stats, config)
    assert torch.equal(weight != 0, expected)


def test_the_update_restores_the_mean_of_each_row():
    weight, x, stats = make_case()
    dense = weight.clone()
    prune_linear_(weight, stats, PruneConfig("varp + mean-update"))
    cut = torch.where(weight != 0, dense, 0.0)
    mean = x.mean(0)
    assert ((weight - dense) @ mean).norm() < 0.1 * ((cut - dense) @ mean).norm()


def test_the_update_is_bounded_by_the_floor():
    variance = torch.tensor([4.0, 1.0, 1e-12, 0.0])
    moments = MomentGram(variance, torch.tensor([1.0, 0.0, 3.0, -1e-6]))
    direction = mean_update.direction(moments)
    floor = 4.0 * mean_update.VARIANCE_FLOOR
    torch.testing.assert_close(direction, moments.mean / torch.tensor([4.0, 1.0, floor, floor]))
    constant = MomentGram(torch.zeros(4), moments.mean)
    assert torch.equal(mean_update.direction(constant), torch.zeros(4))
    weight, mask = torch.ones(1, 4), torch.tensor([[False, True, True, True]])
    ops.restore_mean_(weight, mask, moments.mean, direction)
    assert (weight - 1.0).abs()[mask[0][None]].max() <= 1.0 / (2 * floor**0.5)


def test_losses_are_those_of_the_moments():
    weight, _, stats = make_case()
    moments = MomentGram.of(stats.input)
    gram = GramState(COLS)
    gram.matrix = moments.variance.diag() + moments.mean.outer(moments.mean)
    pruned = torch.where(weight.abs() > 0.5, weight, 0.0)
    assert RelativeLoss(moments.energy, weight)(pruned) == pytest.approx(
        RelativeLoss(gram.energy, weight)(pruned), rel=1e-5
    )
    assert RelativeLoss(moments.energy, torch.zeros(2, COLS))(torch.zeros(2, COLS)) == 0.0


@pytest.mark.parametrize("stages", STAGES)
def test_they_need_moments_alone(stages):
    assert PruneConfig(f"wanda + {stages}").needs.prune == {INPUT}
    assert PruneConfig(f"magnitude + {stages}").needs.prune == {INPUT}
    assert PruneConfig("magnitude + mean-swaps + admm").needs.prune == {INPUT, SHARED_GRAM}
    assert PruneConfig("magnitude + mean-swaps + admm(gram=plain)").needs.prune == {INPUT, GRAM}
    assert PruneConfig("magnitude + swaps").needs.prune == {SHARED_GRAM}


def test_statistics_that_lack_the_moments_are_told():
    weight, _, stats = make_case()
    dense = weight.clone()
    stats.input = None
    with pytest.raises(ValueError, match="needs the moments of the inputs"):
        prune_linear_(weight, stats, PruneConfig("magnitude + mean-swaps"))
    assert torch.equal(weight, dense)


def test_a_model_is_pruned_with_both():
    model = make_model("llama")
    report = prune_model(model, make_tokens(), PruneConfig("wanda + mean-swaps(rounds=2) + mean-update"))
    assert report.config["method"] == "wanda + mean-swaps(rounds=2) + mean-update"
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    solutions = [matrix.solution for matrix in report.matrices]
    assert {solution.solver for solution in solutions} == {"mean-swaps + mean-update"}
    assert all(solution.loss_after < solution.loss_before for solution in solutions)
