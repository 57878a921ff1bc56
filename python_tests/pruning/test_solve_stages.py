"""``obs``, ``admm`` and ``swaps`` against their definitions in float64: explicit inverses, least squares."""

import pytest
import torch

from ace_ext import InputError, PruneConfig, ops
from ace_ext.pruning import gram
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.masks import keep_budget, keep_of_group, scored_weight
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.stages import Admm, Problem, admm, obs
from ace_ext.pruning.statistics import LinearStatistics, MomentState
from ace_ext.records import Solution

ROWS, COLS, TOKENS = 6, 24, 50

UPDATES = ["obs", "admm", "alps", "thanos"]

SETTINGS = [
    {"method": "wanda + swaps"},
    {"method": "obs", "group": "row"},
    {"method": "obs", "group": "matrix"},
    {"method": "admm"},
    {"method": "admm(saliency=magnitude)"},
    {"method": "admm(iterations=1)"},
    {"method": "wanda + swaps + obs", "group": "row"},
    {"method": "wanda + swaps + admm"},
    {"method": "alps", "group": "row"},
    {"method": "alps", "group": "matrix"},
    {"method": "thanos(block=10)", "group": "row"},
    {"method": "thanos(block=10)", "group": "matrix"},
]
PATTERNS = [{"method": s["method"], "pattern": "2:4"} for s in SETTINGS]


def make_case(dtype=torch.float32, columns=COLS, tokens=TOKENS, seed=0):
    """A weight and the statistics of correlated inputs. Some inputs are much larger than others."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=random) @ mix * (torch.rand(columns, generator=random) * 3).exp()
    weight = torch.randn(ROWS, columns, generator=random).to(dtype)
    return weight, x, statistics_of(x, weight)


def statistics_of(x, weight) -> LinearStatistics:
    token_weight = ops.inverse_square_norm(x @ weight.float().T)
    stats = LinearStatistics(MomentState(x.shape[1]), MomentState(x.shape[1]), None, GramState(x.shape[1]), len(x))
    stats.input.update(x)
    stats.weighted.update(x, token_weight)
    stats.gram.update(x)
    return stats


def group_counts(weight, config):
    kept = (weight != 0).int()
    if config.pattern:
        return kept.view(-1, config.pattern.group_m).sum(1)
    return kept.sum(1) if config.group == "row" else kept.sum()


OVERFLOWING = [s for s in SETTINGS + PATTERNS if s["method"] != "wanda + swaps"] + [{"method": "wanda + mean-update"}]


@pytest.mark.parametrize("setting", OVERFLOWING, ids=str)
def test_an_update_that_the_dtype_cannot_hold_is_refused(setting):
    """Inputs are nearly equal, so the kept half of the weights doubles to replace the other half: more than 65504."""
    random = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(200, 1, generator=random) + 0.1 * torch.randn(200, COLS, generator=random)
    dense = (50000 + 5000 * torch.rand(ROWS, COLS, generator=random)).half()
    stats, weight = statistics_of(x, dense * 1e-4), dense.clone()
    with pytest.raises(
        InputError,
        match=r"(obs|admm|alps|thanos|mean-update) overflowed with damping .*; raise damping, or load .* as bfloat16",
    ):
        prune_linear_(weight, stats, PruneConfig(**setting))
    assert torch.equal(weight, dense)
    weight = dense.bfloat16()
    prune_linear_(weight, stats, PruneConfig(**setting))
    assert weight.isfinite().all()
    assert weight.max() > torch.finfo(torch.float16).max


def loss_of_scores(dense, x, stats, config):
    """The relative squared error of the outputs if the scores choose the mask: Wanda's if the method has none."""
    dropped = ~config.comparison.mask(scored_weight(dense, stats, config), keep_of_group(dense, config))
    return float((x @ (dense * dropped).float().T).square().sum() / (x @ dense.float().T).square().sum())


@pytest.mark.parametrize("setting", SETTINGS + PATTERNS, ids=str)
def test_every_method_keeps_exactly_k_and_beats_the_scores_alone(setting, dtype):
    weight, x, stats = make_case(dtype)
    dense = weight.clone()
    config = PruneConfig(**setting)
    solution = prune_linear_(weight, stats, config)
    assert weight.dtype == dtype
    assert int((weight != 0).sum()) == keep_budget(weight, config)
    if config.group == "row":
        assert len(set(group_counts(weight, config).tolist())) == 1
    assert not torch.signbit(weight[weight == 0]).any()
    error = float((x @ (weight - dense).float().T).square().sum() / (x @ dense.float().T).square().sum())
    assert solution.loss_after == pytest.approx(error, rel=1e-3)
    alone = loss_of_scores(dense, x, stats, config)
    assert solution.loss_after < alone
    assert solution.loss_before == (None if config.method.score is None else pytest.approx(alone, rel=1e-3))
    assert solution.solver == setting["method"].split("(")[0].removeprefix("wanda + ")


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.get("group") != "matrix"], ids=str)
@pytest.mark.parametrize("keep", [0, 1, 7, COLS])
def test_keep_replaces_the_sparsity(setting, keep):
    weight, _, stats = make_case()
    dense = weight.clone()
    config = PruneConfig(**setting)
    solution = prune_linear_(weight, stats, config, keep)
    assert ((weight != 0).sum(1) == keep).all()
    if keep == COLS:
        assert torch.equal(weight, dense)
        assert solution == Solution(config.method.name, damping=0, attempts=0, loss_before=None, loss_after=0)


def test_keep_replaces_the_sparsity_of_scores_alone():
    for group in ("row", "matrix"):
        weight, _, stats = make_case()
        assert prune_linear_(weight, stats, PruneConfig("wanda", group=group), 5) is None
        assert int((weight != 0).sum()) == 5 * ROWS


@pytest.mark.parametrize("method", ["wanda", "wanda + swaps"])
def test_without_update_kept_weights_are_untouched(method):
    weight, _, stats = make_case()
    dense = weight.clone()
    prune_linear_(weight, stats, PruneConfig(method))
    assert torch.equal(weight, torch.where(weight != 0, dense, torch.zeros(())))


def explicit_obs(dense, mask, gram, damping):
    """SparseGPT's definition: the inverse over a column and all later ones compensates for each removed weight."""
    weight, hessian = dense.double().clone(), gram.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        removed = torch.where(mask[:, column], 0.0, weight[:, column])
        weight[:, column:] -= removed[:, None] / inverse[0, 0] * inverse[0]
        weight[~mask[:, column], column] = 0.0
    return weight


@pytest.mark.parametrize("columns", [8, 20])  # one block; two and a rest
def test_obs_equals_explicit_inverses(monkeypatch, columns):
    monkeypatch.setattr(obs, "OBS_BLOCK", 8)
    weight, _, stats = make_case(columns=columns)
    dense = weight.clone()
    prune_linear_(weight, stats, PruneConfig("obs", group="row"))
    expected = explicit_obs(dense, weight != 0, stats.gram.matrix, 0.01)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_obs_shares_of_the_blocks_add_up(monkeypatch):
    monkeypatch.setattr(obs, "OBS_BLOCK", 8)
    weight, _, stats = make_case(columns=20)
    prune_linear_(weight, stats, PruneConfig("obs", 0.45, group="row"))
    assert ((weight != 0).sum(1) == 11).all()
    assert [int((part != 0).sum()) for part in weight.split(8, 1)] == [4 * ROWS, 4 * ROWS, 3 * ROWS]


def test_obs_blocks_hold_whole_groups(monkeypatch):
    monkeypatch.setattr(obs, "OBS_BLOCK", 8)
    weight, _, stats = make_case(columns=21)
    config = PruneConfig("obs", pattern="1:3")
    prune_linear_(weight, stats, config)
    assert (group_counts(weight, config) == 1).all()


@pytest.mark.parametrize("entries", [COLS, 2 * COLS, 5 * COLS - 1, 5 * COLS])
@pytest.mark.parametrize("setting", [("admm",), ("admm", None, "2:4"), ("wanda + swaps + admm",)], ids=str)
def test_admm_of_some_rows_at_a_time_is_that_of_all(setting, entries, monkeypatch):
    config = PruneConfig(*setting)
    weight, _, stats = make_case()
    parts = weight.clone()
    prune_linear_(weight, stats, config)
    monkeypatch.setattr(admm, "PART_ENTRIES", entries)
    prune_linear_(parts, stats, config)
    assert torch.equal(parts == 0, weight == 0)
    torch.testing.assert_close(parts, weight)


@pytest.mark.parametrize("relaxation", [1.0, 1.6])
def test_admm_with_its_mask_fixed_nears_least_squares(relaxation):
    weight, _, stats = make_case()
    config = PruneConfig(f"admm(iterations=3000, relaxation={relaxation}, damping=0.1)")
    factor = stats.gram.admm_factor(0.1, relaxation=relaxation)
    mask = config.comparison.mask(scored_weight(weight, stats, config), keep_of_group(weight, config))
    problem = Problem(weight, stats.gram, config.comparison, config.comparison.keep(ROWS, COLS, 0.5), mask)
    found = admm.iterate(problem, factor, config.method.solve) * factor.norm
    norm = factor.norm.double()
    hessian, dense = stats.gram.matrix.double() / norm / norm[:, None], (weight * factor.norm).double()
    hessian += 0.1 * torch.eye(COLS)
    for row in range(ROWS):
        kept = mask[row]
        best = torch.linalg.solve(hessian[kept][:, kept], (hessian @ dense[row])[kept])
        torch.testing.assert_close(found[row, kept].double(), best, rtol=1e-2, atol=1e-2 * float(best.abs().max()))


@pytest.mark.parametrize(("method", "products"), [("admm", 1), ("admm(saliency=magnitude)", 0), ("wanda + admm", 0)])
def test_admm_computes_the_diagonal_only_to_choose_its_mask(method, products, monkeypatch):
    real, calls = gram.power_diagonals, []
    monkeypatch.setattr(gram, "power_diagonals", lambda *arguments: calls.append(arguments) or real(*arguments))
    weight, _, stats = make_case()
    prune_linear_(weight, stats, PruneConfig(method))
    assert len(calls) == products


def test_products_in_bfloat16_cost_no_quality(monkeypatch):
    def pruned(slow):
        monkeypatch.setattr(admm, "slow_dtypes", lambda: slow)
        weight, _, stats = make_case(torch.bfloat16)
        solution = prune_linear_(weight, stats, PruneConfig("admm"))
        return weight, solution.loss_after

    fast, slow = pruned(frozenset()), pruned(frozenset({torch.bfloat16}))
    assert not torch.equal(fast[0], slow[0])
    assert ((fast[0] != 0) == (slow[0] != 0)).float().mean() > 0.98
    assert fast[1] == pytest.approx(slow[1], rel=0.01)


@pytest.mark.parametrize("gram", ["plain", "sketch"])
@pytest.mark.parametrize("saliency", ["magnitude", "obs"])
def test_admm_with_the_largest_damping_is_wanda(gram, saliency):
    weight, _, stats = make_case()
    wanda = weight.clone()
    plain = Admm(gram=gram, saliency=saliency, damping=1e6, floor=0.0, iterations=20, relaxation=1.0)
    prune_linear_(weight, stats, PruneConfig(plain))
    prune_linear_(wanda, stats, PruneConfig("wanda"))
    torch.testing.assert_close(weight, wanda, rtol=1e-4, atol=0.0)


def test_a_floor_keeps_weights_of_quiet_columns():
    kept = []
    for floor in (0.0, 1.0):
        weight, x, stats = make_case()
        quiet = x.square().sum(0).argsort()[: COLS // 2]
        prune_linear_(weight, stats, PruneConfig(Admm(floor=floor)))
        kept.append(int((weight[:, quiet] != 0).sum()))
    assert kept[0] < kept[1]


def test_admm_saliency_changes_the_mask():
    masks = []
    for saliency in ("magnitude", "obs"):
        weight, _, stats = make_case()
        prune_linear_(weight, stats, PruneConfig(Admm(saliency=saliency)))
        masks.append(weight != 0)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("update", UPDATES)
def test_an_update_keeps_the_refined_mask(update):
    weight, _, stats = make_case()
    other = weight.clone()
    prune_linear_(weight, stats, PruneConfig("wanda + swaps"))
    prune_linear_(other, stats, PruneConfig(f"wanda + swaps + {update}", group="row"))
    assert torch.equal(weight != 0, other != 0)
    assert not torch.equal(weight, other)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("keep", [10, COLS - 2, COLS - 1])
def test_dead_inputs_get_weight_only_where_the_others_do_not_suffice(update, keep):
    weight, x, _ = make_case()
    dense = weight.clone()
    x[:, [0, 5]] = 0
    prune_linear_(weight, statistics_of(x, weight), PruneConfig(update, group="row"), keep)
    assert ((weight != 0).sum(1) == keep).all()
    dead, larger = weight[:, [0, 5]], dense[:, [0, 5]].abs() >= dense[:, [5, 0]].abs()
    assert torch.equal(dead, torch.where(larger, dense[:, [0, 5]], 0.0) if keep == COLS - 1 else torch.zeros(ROWS, 2))
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("update", UPDATES)
def test_inputs_that_are_all_zero_lose_nothing(update):
    weight, x, _ = make_case()
    stats = statistics_of(torch.zeros_like(x), weight)
    assert prune_linear_(weight, stats, PruneConfig(update, group="row")).loss_after == 0.0


def test_rank_deficiency_is_told_and_no_identity():
    weight, x, stats = make_case(tokens=5)
    alone = loss_of_scores(weight, x, stats, PruneConfig("obs", group="row"))
    solution = prune_linear_(weight, stats, PruneConfig("obs(damping=0)", group="row"))
    assert solution.attempts > 1
    assert solution.damping > 0
    assert solution.loss_after < alone


def test_admm_of_few_tokens_needs_no_damping():
    weight, x, stats = make_case(tokens=5)
    alone = loss_of_scores(weight, x, stats, PruneConfig("admm", group="row"))
    solution = prune_linear_(weight, stats, PruneConfig("admm(damping=0, floor=0)", group="row"))
    assert (solution.attempts, solution.damping) == (1, 0.0)
    assert solution.loss_after < alone


@pytest.mark.parametrize("update", UPDATES)
def test_a_failure_leaves_the_weight(update):
    weight, _, stats = make_case()
    dense = weight.clone()
    stats.gram.matrix[0, 0] = float("nan")
    with pytest.raises(InputError, match="Gram matrix"):
        prune_linear_(weight, stats, PruneConfig(update, group="row"))
    assert torch.equal(weight, dense)
