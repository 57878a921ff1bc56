"""Pruning does not depend on units: inputs and weights times a power of two give the same masks and losses."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ace_ext import InputError, PruneConfig
from ace_ext.engine.matrix_report import Measurements, mean_cosine, output_of, relative_error
from ace_ext.pruning import statistics
from ace_ext.pruning.gram import GramState, RelativeLoss
from ace_ext.pruning.masks import keep_budget
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.scaling import ORDINARY_EXPONENT, InputScale, exponent_of, exponent_on_device, times_power
from ace_ext.pruning.sketch import SketchState
from ace_ext.pruning.statistics import LinearStatistics, MomentState

ROWS, COLS, TOKENS = 6, 48, 200

SETTINGS = {
    "wanda": {"method": "wanda"},
    "fast": {"method": "admm(damping=1.0, iterations=10, relaxation=1, gram=sketch)"},
    "balanced": {"method": "admm"},
    "balanced 2:4": {"method": "admm", "pattern": "2:4"},
    "obs": {"method": "obs", "group": "row"},
    "obs 2:4": {"method": "obs", "pattern": "2:4"},
    "obs in the matrix": {"method": "obs", "group": "matrix"},
    "swaps": {"method": "wanda + swaps"},
    "swaps + admm": {"method": "wanda + swaps + admm"},
    "alps": {"method": "alps", "group": "row"},
    "alps 2:4": {"method": "alps", "pattern": "2:4"},
    "thanos": {"method": "thanos(block=20)", "group": "row"},
    "thanos 2:4": {"method": "thanos(block=20)", "pattern": "2:4"},
    "dsnot": {"method": "wanda + dsnot"},
    "mean": {"method": "wanda + mean-swaps + mean-update"},
}


def make_case() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs. Some inputs are much larger than others, and some are always zero."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(COLS, COLS, generator=random) / COLS**0.5 + torch.eye(COLS)
    x = (torch.randn(TOKENS, COLS, generator=random) + 0.5) @ mix * (torch.rand(COLS, generator=random) * 3).exp()
    x[:, [3, 20]] = 0.0
    return torch.randn(ROWS, COLS, generator=random), x


def statistics_of(x: torch.Tensor, config: PruneConfig, parts: int = 2) -> LinearStatistics:
    """The plain statistics of inputs that come in several calls."""
    gram = SketchState(COLS) if getattr(config.method.solve, "gram", "") == "sketch" else GramState(COLS)
    stats = LinearStatistics(MomentState(COLS), None, None, gram, len(x), [x[::2]])
    for part in x.chunk(parts):
        stats.input.update(part)
        gram.update(part)
    return stats


def pruned(weight, x, setting):
    """The pruned weight, the figures of its stages, and those of the report."""
    config = PruneConfig(**SETTINGS[setting])
    stats, weight = statistics_of(x, config), weight.clone()
    dense = output_of(stats, weight)
    solution = prune_linear_(weight, stats, config)
    measurements = Measurements()
    report = measurements.measure("m", weight, stats, dense, keep_budget(weight, config))
    measurements.read_()
    losses = None if solution is None else (solution.loss_before, solution.loss_after)
    return weight, losses, report


def loss_of_scores(weight, x, setting):
    """The loss if Wanda's scores choose the mask and the other weights stay."""
    alone, stats = weight.clone(), statistics_of(x, PruneConfig("balanced"))
    prune_linear_(alone, stats, PruneConfig(**{**SETTINGS[setting], "method": "wanda"}))
    return RelativeLoss(stats.gram.energy, weight)(alone)


ORDINARY = {}


@given(setting=st.sampled_from(list(SETTINGS)), inputs=st.integers(-90, 50), weights=st.integers(-24, 24))
@example("fast", -90, 0)
@example("balanced", -90, 0)
@example("obs", -90, 0)
@example("mean", 50, 0)
@example("wanda", -90, 0)
@settings(max_examples=60, deadline=None)
def test_a_power_of_two_changes_no_mask_and_no_loss(setting, inputs, weights):
    weight, x = make_case()
    if setting not in ORDINARY:
        ORDINARY[setting] = pruned(weight, x, setting)
    expected, losses, report = ORDINARY[setting]
    found, scaled_losses, scaled_report = pruned(times_power(weight, weights), times_power(x, inputs), setting)
    assert torch.equal(found, times_power(expected, weights))
    assert scaled_losses == losses
    assert (scaled_report.relative_error, scaled_report.cosine) == (report.relative_error, report.cosine)
    assert (scaled_report.nonzero, scaled_report.keep) == (report.nonzero, report.nonzero)


@pytest.mark.parametrize("weights", [-100, 100])
@pytest.mark.parametrize("setting", SETTINGS)
def test_so_do_weights_of_any_size(setting, weights):
    weight, x = make_case()
    expected, losses, report = pruned(weight, x, setting)
    found, scaled_losses, scaled_report = pruned(times_power(weight, weights), x, setting)
    assert torch.equal(found, times_power(expected, weights))
    assert scaled_losses == losses
    assert (scaled_report.relative_error, scaled_report.cosine) == (report.relative_error, report.cosine)
    assert 0.0 < report.relative_error < 1.0


@pytest.mark.parametrize("setting", SETTINGS)
def test_inputs_beyond_the_squares_of_float32_are_solved(setting):
    weight, x = make_case()
    expected, losses, _ = pruned(weight, x, setting)
    found, scaled_losses, _ = pruned(weight, times_power(x, 80), setting)
    assert torch.equal(found, expected)
    assert scaled_losses == losses


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dead", [COLS, COLS - 1, COLS - 5, 2 * COLS // 3])
def test_dead_inputs_leave_exactly_k(setting, dead):
    weight, x = make_case()
    x[:, torch.randperm(COLS, generator=torch.Generator().manual_seed(1))[:dead]] = 0.0
    found, losses, report = pruned(weight, x, setting)
    config = PruneConfig(**SETTINGS[setting])
    assert report.nonzero == report.keep == keep_budget(weight, config)
    counts = config.comparison.counts(found)
    assert (counts == counts[0]).all()
    assert losses is None or losses[1] < loss_of_scores(weight, x, setting) + 1e-12
    kept_dead = (found != 0) & (x == 0).all(0)
    assert torch.equal(found[kept_dead], weight[kept_dead])
    if dead == COLS:
        assert (report.relative_error, report.cosine) == (0.0, 1.0)


@pytest.mark.parametrize("setting", ["fast", "balanced", "obs", "alps", "thanos"])
def test_stages_without_any_input_prune_by_magnitude(setting):
    weight, x = make_case()
    found, _, _ = pruned(weight, torch.zeros_like(x), setting)
    assert torch.equal(found, torch.where(found != 0, weight, 0.0))
    largest = weight.abs().topk(COLS // 2, dim=1).values.sum(1)
    assert (found.abs().sum(1) > 0.99 * largest).all()  # ADMM's own choice differs a little


@pytest.mark.parametrize("setting", ["fast", "balanced", "obs", "alps", "thanos"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_cannot_be_solved_is_an_input_error(setting, bad):
    weight, x = make_case()
    config = PruneConfig(**SETTINGS[setting])
    stats, dense = statistics_of(x, config), weight.clone()
    stats.gram.sums()[0][0, 0] = bad
    with pytest.raises(InputError, match="look for NaN or overflow in the activations"):
        prune_linear_(weight, stats, config)
    assert torch.equal(weight, dense)


def test_a_failure_of_linear_algebra_is_an_input_error(monkeypatch):
    weight, x = make_case()
    config = PruneConfig(**SETTINGS["fast"])
    stats = statistics_of(x, config)

    def fail(_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(InputError, match=r"cannot be factorised \(did not converge\); raise damping"):
        prune_linear_(weight, stats, config)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("exponent", [-120, -90, -21, 0, 21, 50, 80])
def test_moments_of_inputs_of_any_size(monkeypatch, exponent, waits, dtype):
    """Also with the code path of a GPU, where the size is not read."""
    monkeypatch.setattr(statistics, "reads_at_once", lambda _: waits)
    x = times_power(make_case()[1].to(dtype).float(), exponent).to(torch.float32 if dtype == torch.float16 else dtype)
    expected, state = MomentState(COLS), MomentState(COLS)
    for part in times_power(x, -exponent).split(50):
        expected.update(part)
    for part in x.split(50):
        state.update(part)
    assert torch.equal(times_power(state.mean, -exponent), expected.mean)
    assert torch.equal(times_power(state.m2, -2 * exponent), expected.m2)


@pytest.mark.parametrize("state", [GramState, SketchState])
@pytest.mark.parametrize("exponents", [(-90, 0), (0, -90), (60, -60), (-80, -70), (-30, 60)])
def test_calls_of_different_size_add_up(state, exponents):
    """The sum equals that of float64; parts of 2^-100 may vanish."""
    _, x = make_case()
    parts = [times_power(part, exponent) for part, exponent in zip(x.chunk(2), exponents, strict=True)]
    one, first, second = state(COLS), state(COLS), state(COLS)
    for part in parts:
        one.update(part)
    first.update(parts[0])
    second.update(parts[1])
    first.merge_(second)
    again = state.of_tensors(first.tensors())
    expected = sum(part.double().square().sum(0) for part in parts)
    for found in (one, first, again):
        total = found.matrix.diagonal().double() if state is GramState else found.squares
        torch.testing.assert_close(times_power(total, 2 * found.scale.power), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("state", [GramState, SketchState])
def test_sums_of_processes_are_added_in_one_scale(state):
    """As ``Ranks`` does with an all-reduce."""
    _, x = make_case()
    parts, sums = [times_power(x[:100], -60), torch.zeros(3, COLS), times_power(x[100:], -58)], []
    for part in parts:
        sums.append(state(COLS))
        sums[-1].update(part)
    known = [one.scale.exponent for one in sums if one.scale.exponent is not None]
    assert len(set(known)) == 2
    for one in sums:
        one.raise_scale_(max(known))
    total = sum(one.matrix.diagonal().double() if state is GramState else one.squares for one in sums)
    expected = sum(part.double().square().sum(0) for part in parts)
    torch.testing.assert_close(times_power(total, 2 * max(known)), expected, rtol=1e-5, atol=0.0)


def test_an_empty_state_takes_the_scale_of_the_other():
    _, x = make_case()
    empty, tiny = GramState(COLS), GramState(COLS)
    empty.update(torch.zeros_like(x))
    tiny.update(times_power(x, -90))
    empty.merge_(tiny)
    assert torch.equal(empty.matrix, tiny.matrix)
    assert empty.scale.exponent == tiny.scale.exponent < -ORDINARY_EXPONENT
    tiny.merge_(GramState(COLS))
    assert torch.equal(empty.matrix, tiny.matrix)


def test_the_scale_only_rises():
    scale = InputScale()
    assert scale.admit(torch.zeros(3, 2)) == 0
    assert scale.exponent is None
    assert scale.admit(torch.full((3, 2), 2.0**-60)) == 0
    assert scale.exponent == -59
    assert scale.admit(torch.full((3, 2), -(2.0**-50))) == 10
    assert scale.admit(torch.full((3, 2), 2.0**-60)) == 0
    assert scale.exponent == -49
    assert scale.admit(torch.ones(3, 2)) == 49
    assert scale.exponent == 0
    assert scale.admit(torch.full((3, 2), 2.0**60)) == 0  # ordinary from now on
    assert InputScale(61).raise_to(70) == 9


def test_exponents(dtype):
    for found in (torch.zeros(2, 2), torch.zeros(0, 2), torch.tensor([1.0, float("nan")]), torch.tensor([-1e-3, 9.0])):
        assert int(exponent_on_device(found.to(dtype))) == 0
    assert int(exponent_on_device(torch.tensor([2.0**-22, 0.0], dtype=dtype))) == -21
    assert int(exponent_on_device(torch.tensor([2.0**-130]))) == -120
    assert exponent_of(torch.zeros(2, 2, dtype=dtype)) is None
    assert exponent_of(torch.zeros(0, 2, dtype=dtype)) is None
    assert exponent_of(torch.tensor([1.0, float("nan")], dtype=dtype)) == 0
    assert exponent_of(torch.tensor([1.0, -float("inf")], dtype=dtype)) == 0
    assert exponent_of(torch.tensor([2.0**-21, 0.0], dtype=dtype)) == 0
    assert exponent_of(torch.tensor([2.0**-22, 0.0], dtype=dtype)) == -21
    if dtype != torch.float16:
        assert exponent_of(torch.tensor([1.0, -(2.0**20)], dtype=dtype)) == 21
        assert exponent_of(torch.tensor([1.0, -(2.0**19)], dtype=dtype)) == 0


@pytest.mark.parametrize("exponent", [-126, -70, 0, 70, 120])
def test_figures_of_the_report_have_no_unit(exponent, random):
    before = torch.randn(7, 5, generator=random)
    after = before + 0.1 * torch.randn(7, 5, generator=random)
    before[2] = after[2] = 0.0
    error, cosine = relative_error(before, after), mean_cosine(before, after)
    wide = torch.nn.functional.cosine_similarity(before.double(), after.double())[[0, 1, 3, 4, 5, 6]]
    assert float(cosine) == pytest.approx((float(wide.sum()) + 1) / 7, rel=1e-6)
    assert float(error) == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-6)
    before, after = times_power(before, exponent), times_power(after, exponent)
    assert relative_error(before, after) == pytest.approx(float(error), rel=1e-5)  # some entries are subnormal
    assert mean_cosine(before, after) == pytest.approx(float(cosine), rel=1e-5)
