"""The solvers ``refine="mean"`` and ``update="mean"``, which read means and variances and no Gram matrix."""

import pytest
import torch
from tiny_models import make_model, make_tokens

from ace_ext import PruneConfig, ops, prune_model
from ace_ext.ops import mean_reference
from ace_ext.pruning.gram import GramState, RelativeLoss
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, INPUT, WEIGHTED
from ace_ext.pruning.masks import keep_budget, metric_mask, scored_weight
from ace_ext.pruning.moment_gram import MomentGram
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.solvers import mean_update
from ace_ext.pruning.statistics import LinearStatistics, MomentState

ROWS, COLS, TOKENS = 12, 64, 400

SETTINGS = [{"refine": "mean"}, {"update": "mean"}, {"refine": "mean", "update": "mean"}]
GROUPS = [{"group": "row"}, {"group": "matrix"}, {"pattern": "2:4"}, {"pattern": "4:8"}]


def make_case(dtype=torch.float32, cosine=False):
    """A weight, inputs with means as large as their deviations, and the statistics of them that the solvers need."""
    random = torch.Generator().manual_seed(0)
    scale = torch.randn(COLS, generator=random).exp()
    x = (torch.randn(TOKENS, COLS, generator=random) + torch.randn(COLS, generator=random)) * scale
    weight = torch.randn(ROWS, COLS, generator=random).to(dtype)
    state = MomentState(COLS)
    state.update(x, ops.inverse_square_norm(x @ weight.float().T) if cosine else None)
    plain = MomentState(COLS)
    plain.update(x)
    stats = LinearStatistics(plain, state if cosine else None, None)
    return weight, x, stats


@pytest.mark.parametrize("metric", ["wanda", "varp", "magnitude"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_they_keep_exactly_k_and_lower_the_error(setting, group, metric, dtype):
    weight, x, stats = make_case(dtype)
    dense, config = weight.clone(), PruneConfig(metric, **setting, **group)
    mask = metric_mask(scored_weight(weight, stats, config), config)
    solution = prune_linear_(weight, stats, config)
    assert weight.dtype == dtype
    assert int((weight != 0).sum()) == keep_budget(weight, config)
    counts = config.comparison.counts(weight)
    assert torch.equal(counts, config.comparison.counts(mask.float()))
    assert not torch.signbit(weight[weight == 0]).any()
    if "refine" not in setting:
        assert torch.equal(weight != 0, mask)
    if "update" not in setting:
        assert torch.equal(weight[weight != 0], dense[weight != 0])
    assert solution.loss_after < 0.9 * solution.loss_before
    assert solution.solver == "mean"
    change = (x @ (weight - dense).float().T).square().sum() / (x @ (dense * ~mask).float().T).square().sum()
    assert change < 0.95  # measured by all inputs and not only by their moments


def test_the_mask_is_that_of_the_op(random):
    weight, _, stats = make_case()
    config = PruneConfig("varp", refine="mean", mean_rounds=3)
    expected = metric_mask(scored_weight(weight, stats, config), config)
    moments = MomentGram.of(stats.input)
    expected, swaps = mean_reference.balance_mean(expected, weight, moments.variance, moments.mean, rounds=3)
    assert (swaps > 0).any()
    prune_linear_(weight, stats, config)
    assert torch.equal(weight != 0, expected)


def test_the_update_restores_the_mean_of_each_row():
    weight, x, stats = make_case()
    dense = weight.clone()
    prune_linear_(weight, stats, PruneConfig("varp", update="mean"))
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


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_they_need_moments_alone(setting):
    assert PruneConfig("wanda", **setting).needs.prune == {INPUT}
    assert PruneConfig("magnitude", **setting).needs.prune == {INPUT}
    assert PruneConfig("wanda", **setting, gram="cosine").needs.prune == {INPUT, WEIGHTED}
    assert PruneConfig("magnitude", **setting | {"update": "admm"}).needs.prune >= {GRAM}
    both = PruneConfig("magnitude", **{"refine": "mean"}, update="admm", gram="cosine")
    assert both.needs.prune == {WEIGHTED, COSINE_GRAM}
    assert PruneConfig("magnitude", refine="swaps").needs.prune == {GRAM}


def test_weighted_tokens_are_those_of_the_weighted_moments():
    weight, _, stats = make_case(cosine=True)
    plain = weight.clone()
    prune_linear_(weight, stats, PruneConfig("wanda", update="mean", gram="cosine"))
    prune_linear_(plain, stats, PruneConfig("wanda", update="mean"))
    assert torch.equal(weight != 0, plain != 0)
    assert not torch.equal(weight, plain)


def test_statistics_that_lack_the_moments_are_told():
    weight, _, stats = make_case()
    dense = weight.clone()
    stats.input = None
    with pytest.raises(ValueError, match="needs the moments of the inputs"):
        prune_linear_(weight, stats, PruneConfig("magnitude", refine="mean"))
    assert torch.equal(weight, dense)


def test_a_model_is_pruned_with_both():
    model = make_model("llama")
    report = prune_model(model, make_tokens(), PruneConfig("wanda", refine="mean", update="mean", mean_rounds=2))
    assert report.config["refine"] == report.config["update"] == "mean"
    assert report.config["mean_rounds"] == 2
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    solutions = [matrix.solution for matrix in report.matrices]
    assert {solution.solver for solution in solutions} == {"mean"}
    assert all(solution.loss_after < solution.loss_before for solution in solutions)
