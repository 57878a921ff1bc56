"""``alps``, ``dsnot`` and ``thanos`` against slow versions in float64, and what their papers promise."""

from itertools import pairwise

import pytest
import torch

from ace_ext import PruneConfig
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.masks import keep_budget
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.stages import alps
from ace_ext.pruning.statistics import LinearStatistics, MomentState

ROWS, COLS, TOKENS = 8, 24, 60

TARGETS = [{}, {"group": "row"}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "1:3"}]


def make_case(rows=ROWS, dtype=torch.float32):
    """A weight, and the statistics of correlated inputs whose means are not zero, some much larger than others."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(COLS, COLS, generator=random) / COLS**0.5 + torch.eye(COLS)
    x = torch.randn(TOKENS, COLS, generator=random) + 0.5 * torch.randn(COLS, generator=random)
    x = x @ mix * (torch.rand(COLS, generator=random) * 3).exp()
    return torch.randn(rows, COLS, generator=random).to(dtype), statistics_of(x)


def statistics_of(x):
    stats = LinearStatistics(MomentState(x.shape[1]), None, None, GramState(x.shape[1]))
    stats.input.update(x)
    stats.gram.update(x)
    return stats


def pruned(method, target, rows=ROWS, shares=None):
    weight, stats = make_case(rows)
    config = PruneConfig(method, **target)
    solution = prune_linear_(weight, stats, config, shares=shares)
    assert int((weight != 0).sum()) == keep_budget(weight, config)
    assert config.pattern is None or len(config.comparison.counts(weight).unique()) == 1
    return weight, solution.loss_after


def kept_of(score, config):
    """The mask of the highest scores, by sorting."""
    if config.pattern is not None:
        parts, keep = score.view(-1, config.pattern.group_m), config.pattern.keep_n
    else:
        parts = score.flatten()[None] if config.group == "matrix" else score
        keep = keep_budget(score, config) // len(parts)
    order = parts.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(parts, dtype=torch.bool).scatter_(1, order[:, :keep], True).view_as(score)


# ALPS


def slow_alps(weight, gram, config, iterations=300):
    """Algorithm 1 with an explicit inverse for each iteration, then least squares on the mask."""
    gram = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram))
    norm = gram.diagonal().sqrt()
    hessian, dense = gram / norm / norm[:, None], weight.double() * norm
    rho, multiplier = 0.1, torch.zeros_like(dense)
    mask = before = kept_of(dense.abs(), config)
    kept = dense * mask
    for number in range(1, iterations + 1):
        whole = (dense @ hessian - multiplier + rho * kept) @ torch.linalg.inv(hessian + rho * torch.eye(len(gram)))
        mask = kept_of((whole + multiplier / rho).abs(), config)
        kept = (whole + multiplier / rho) * mask
        multiplier = multiplier + rho * (whole - kept)
        if number % 3 == 0:
            changed = float((mask != before).sum()) / float(mask.sum())
            if changed <= (3e-4 if number > 30 else 0):
                break
            before = mask
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
    for row, own in enumerate(mask):
        kept[row, own] = torch.linalg.solve(hessian[own][:, own], (dense[row] @ hessian)[own])
    return kept / norm


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_alps_equals_its_definition(target):
    weight, stats = make_case()
    expected = slow_alps(weight, stats.gram.matrix, PruneConfig("alps", **target))
    found, _ = pruned("alps(steps=40)", target)  # conjugate gradients are then as exact as least squares
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_alps_loses_less_than_those_it_was_compared_with(target):
    names = ("published-alps", "published-admm", "published-sparsegpt", "published-thanos")
    losses = {name: pruned(name, target, rows=48)[1] for name in names}
    assert min(losses, key=losses.get) == "published-alps"


@pytest.mark.parametrize("method", ["alps", "wanda + alps"])
def test_no_step_of_conjugate_gradients_raises_the_error(method):
    losses = [pruned(f"{method}(damping=0, steps={steps})", {})[1] for steps in (0, 1, 2, 5, 10)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_alps_keeps_a_mask_that_it_is_given():
    masked, _ = pruned("wanda + swaps", {"pattern": "2:4"})
    found, _ = pruned("wanda + swaps + alps", {"pattern": "2:4"})
    assert torch.equal(found != 0, masked != 0)


def test_alps_is_not_divided_among_processes():
    """Its penalty depends on the masks of all rows."""

    class Divided:
        def rows(self, count):
            pytest.fail("divided")

    expected, _ = pruned("alps", {"pattern": "2:4"})
    found, _ = pruned("alps", {"pattern": "2:4"}, shares=Divided())
    assert torch.equal(found, expected)


def test_the_penalty_rises_by_how_much_changed(monkeypatch):
    rhos = []
    real = alps._inverse
    monkeypatch.setattr(alps, "_inverse", lambda hessian, rho: rhos.append(rho) or real(hessian, rho))
    pruned("alps", {}, rows=64)
    factors = [after / before for before, after in pairwise(rhos)]
    assert rhos[0] == alps.PENALTY
    assert factors == pytest.approx(sorted(factors, reverse=True))
    assert {round(factor, 6) for factor in factors} <= {1.3, 1.2, 1.1}


# Thanos


def slow_thanos(weight, gram, config, block):
    """Rows and blocks one by one, with the inverse over all columns from the block on."""
    weight, gram = weight.double().clone(), gram.double()
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    norm, mask = gram.diagonal().sqrt(), torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        score = weight.abs() * norm
        score[:, :start] = torch.where(mask[:, :start], torch.inf, -torch.inf)
        mask[:, start:end] = kept_of(score, config)[:, start:end]
        inverse = torch.linalg.inv(hessian[start:, start:])
        for row in range(len(weight)):
            gone = (~mask[row, start:end]).nonzero().flatten()
            multipliers = torch.linalg.solve(inverse[gone][:, gone], weight[row, start + gone])
            weight[row, start:] -= multipliers @ inverse[gone]
            weight[row, start + gone] = 0.0
    return weight


@pytest.mark.parametrize("block", [1, 6, 10, COLS])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_thanos_equals_its_definition(target, block):
    weight, stats = make_case()
    config = PruneConfig("thanos", **target)
    group = 1 if config.pattern is None else config.pattern.group_m
    expected = slow_thanos(weight, stats.gram.matrix, config, max(group, block // group * group))
    found, _ = pruned(f"thanos(block={block})", target)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_thanos_with_one_column_at_a_time_is_sparsegpt_with_the_same_mask():
    found, _ = pruned("wanda + thanos(block=1)", {"group": "row"})
    expected, _ = pruned("wanda + obs", {"group": "row"})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_wider_blocks_of_thanos_lose_less_with_the_same_mask():
    losses = [pruned(f"wanda + thanos(block={block})", {}, rows=48)[1] for block in (1, 6, 12, COLS)]
    assert losses == sorted(losses, reverse=True)


def test_a_single_block_of_thanos_is_least_squares():
    weight, stats = make_case()
    found, _ = pruned("wanda + thanos(block=99)", {})
    hessian = stats.gram.matrix.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(COLS)
    for row, own in enumerate(found != 0):
        best = torch.linalg.solve(hessian[own][:, own], (weight[row].double() @ hessian)[own])
        torch.testing.assert_close(found[row, own].double(), best, rtol=1e-3, atol=1e-4)


def test_thanos_of_some_rows_at_a_time_is_that_of_all(monkeypatch):
    expected, _ = pruned("thanos(block=8)", {})
    monkeypatch.setattr("ace_ext.pruning.stages.thanos.PART_ENTRIES", 100)
    torch.testing.assert_close(pruned("thanos(block=8)", {})[0], expected)


# DSnoT


def slow_dsnot(mask, weight, mean, variance, group, cycles=50, threshold=5e-5):
    """Each row and cycle by a search through all its weights. Returns the mask and the errors before and after."""
    mask, errors = mask.clone(), []
    for row, kept in enumerate(mask):
        part = weight[row] * mean
        wanda = weight[row].abs() * (variance + mean**2).sqrt()
        error, first = part[~kept].sum(), part[~kept].sum()
        grown, once = ~kept, kept.clone()  # what may be restored and pruned: each weight moves once
        for _ in range(cycles):
            if error.abs() <= threshold * wanda.square().sum().sqrt():
                break
            grow = (part * error.sign() / variance).masked_fill(~grown, 0.0)
            restored = int(grow.argmax())
            allowed = once & (part * error.sign() < 0)
            if group:
                allowed = once & (torch.arange(len(kept)) // group == restored // group)
            if grow[restored] <= 0 or not allowed.any():
                break
            gone = int(wanda.masked_fill(~allowed, torch.inf).argmin())
            after = error - part[restored] + part[gone]
            if after.abs() >= error.abs():
                break
            error, kept[restored], kept[gone] = after, True, False
            grown[restored], once[gone] = False, False
        errors.append((first.abs(), error.abs()))
    return mask, torch.tensor(errors)


@pytest.mark.parametrize("cycles", [1, 3, 50])
@pytest.mark.parametrize("target", [{}, {"group": "matrix"}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}])
def test_dsnot_equals_its_definition(target, cycles):
    weight, stats = make_case(rows=40)
    config = PruneConfig(f"wanda + dsnot(cycles={cycles})", **target)
    plain = weight.clone()
    prune_linear_(plain, stats, PruneConfig("wanda", **target))
    group = 0 if config.pattern is None else config.pattern.group_m
    moments = stats.input.mean.double(), stats.input.variance.double()
    expected, errors = slow_dsnot(plain != 0, weight.double(), *moments, group, cycles)
    dense = weight.clone()
    prune_linear_(weight, stats, config)
    assert torch.equal(weight != 0, expected)
    assert torch.equal(weight, torch.where(expected, dense, 0.0))
    assert not torch.equal(weight, plain)
    assert (errors[:, 1] <= errors[:, 0]).all()
    assert errors[:, 1].sum() < 0.8 * errors[:, 0].sum()


@pytest.mark.parametrize("group", [{"group": "row"}, {"group": "matrix"}, {"pattern": "2:4"}], ids=str)
def test_dsnot_keeps_the_number_of_each_row_and_group(group, dtype):
    weight, stats = make_case(rows=40, dtype=dtype)
    plain, config = weight.clone(), PruneConfig("wanda + dsnot", **group)
    prune_linear_(plain, stats, PruneConfig("wanda", **group))
    prune_linear_(weight, stats, config)
    assert torch.equal(config.comparison.counts(weight), config.comparison.counts(plain))
    assert torch.equal((weight != 0).sum(1), (plain != 0).sum(1))


def test_dsnot_of_constant_and_silent_inputs():
    """A constant input has no variance, a silent one no mean."""
    weight, x = make_case()[0], torch.randn(TOKENS, COLS, generator=torch.Generator().manual_seed(1))
    x[:, 3], x[:, [0, 5]] = 2.0, 0.0
    prune_linear_(weight, statistics_of(x), PruneConfig("wanda + dsnot"))
    assert ((weight != 0).sum(1) == COLS // 2).all()
    assert (weight[:, [0, 5]] == 0).all()


def test_ties_are_broken_by_the_column():
    """Equal weights on equal inputs: the lower columns are kept."""
    for method in ("alps", "thanos", "wanda + dsnot"):
        weight = torch.ones(2, 8)
        prune_linear_(weight, statistics_of(torch.eye(8).repeat(4, 1)), PruneConfig(method, pattern="2:4"))
        expected = torch.tensor([True, True, False, False] * 2).repeat(2, 1)
        assert torch.equal(weight != 0, expected), method
