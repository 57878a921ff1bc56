"""The collector against the float64 reference, on a block whose Linears partly share inputs."""

import pytest
import torch
from torch import nn

from ace_ext import InputError
from ace_ext.ops import reference
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, INPUT, MOMENT, OWN_GRAMS, ROUNDING_GRAM, SHARED_GRAM, WEIGHTED
from ace_ext.pruning.metrics import METRICS, column_factor
from ace_ext.pruning.statistics import MomentState, StatisticsCollector, token_scales

ALL = frozenset({INPUT, WEIGHTED, MOMENT, COSINE_GRAM})


class Pair(nn.Module):
    """q and k read the same tensor, o reads a different one."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(6, 5), nn.Linear(6, 4, bias=False), nn.Linear(5, 6)

    def forward(self, x):
        return self.o(self.q(x) + self.k(x).sum(-1, keepdim=True))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Pair().requires_grad_(False)


def collect(block, batches, needs=ALL, mask=None, starts=None):
    linears = {name: module for name, module in block.named_children() if isinstance(module, nn.Linear)}
    with StatisticsCollector(linears, needs, len(batches)) as collector:
        collector.token_mask, collector.starts = mask, starts
        for x in batches:
            block(x)
    return collector


@pytest.mark.parametrize("metric", [name for name, metric in METRICS.items() if metric.column])
def test_column_factors_equal_the_oracle(block, metric):
    x = torch.randn(4, 7, 6) + 3
    stats = collect(block, [x[:1], x[1:]]).stats["q"]
    dense = x.flatten(0, 1) @ block.q.weight.T
    expected = reference.column_factor(metric, x.flatten(0, 1), dense)
    torch.testing.assert_close(column_factor(metric, stats, 0.5).double(), expected, rtol=1e-5, atol=0)


def test_moment_equals_the_oracle(block):
    x = torch.randn(4, 7, 6)
    stats = collect(block, [x]).stats["q"]
    expected = reference.cosine_moment(x.flatten(0, 1), x.flatten(0, 1) @ block.q.weight.T)
    torch.testing.assert_close(stats.moment.double(), expected, rtol=1e-5, atol=1e-9)


def test_one_input_is_counted_once(block):
    stats = collect(block, [torch.randn(2, 3, 6)]).stats
    assert stats["q"].input is stats["k"].input
    assert stats["q"].input is not stats["o"].input
    assert stats["q"].weighted is not stats["k"].weighted
    assert float(stats["k"].input.weight_sum) == 6
    assert stats["k"].tokens == 6


def test_plain_gram_is_counted_once(block):
    x = torch.randn(2, 3, 6)
    stats = collect(block, [x], needs=frozenset({GRAM})).stats
    assert stats["q"].gram is stats["k"].gram
    assert stats["q"].gram is not stats["o"].gram
    assert stats["k"].gram.tokens == 6
    torch.testing.assert_close(stats["k"].gram.matrix, x.flatten(0, 1).T @ x.flatten(0, 1))


@pytest.mark.parametrize("kind", [SHARED_GRAM, COSINE_GRAM])
def test_tokens_of_a_gram_matrix_are_weighted_by_the_output_without_bias(block, kind):
    x = torch.randn(2, 3, 6)
    x[1, 0] = 0.0  # its output is zero but for the bias
    stats = collect(block, [x[:1], x[1:]], needs=frozenset({kind})).stats
    assert (stats["q"].gram is stats["k"].gram) == (kind == SHARED_GRAM)
    assert stats["q"].gram is not stats["o"].gram
    assert stats["k"].gram.tokens == 6
    rows = x.flatten(0, 1)
    for name in ("q", "k"):
        read = block.q if kind == SHARED_GRAM else getattr(block, name)
        scaled = rows * token_scales(rows @ read.weight.T)[:, None]
        torch.testing.assert_close(stats[name].gram.matrix, scaled.T @ scaled)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [ROUNDING_GRAM, COSINE_GRAM, SHARED_GRAM, GRAM])
def test_first_tokens_count_sixteen_times_for_rounding(block, kind, padded):
    x = torch.randn(2, 5, 6)
    starts = torch.tensor([False, True, False, False, False, True, False, False, False, False])
    mask = torch.tensor([False, True, True, True, True] + 5 * [True]) if padded else None
    found = collect(block, [x], frozenset({INPUT, kind}), mask, starts).stats["k"].gram
    used = torch.ones(10, dtype=torch.bool) if mask is None else mask
    rows, first = x.flatten(0, 1)[used], starts[used]
    read = block.k if kind in OWN_GRAMS else block.q
    scale = torch.ones(len(rows)) if kind == GRAM else token_scales(rows @ read.weight.T)
    square = rows[:, :, None] * rows[:, None, :] * scale[:, None, None] ** 2
    expected = square.sum(0) + (15 * square[first].sum(0) if kind == ROUNDING_GRAM else 0)
    torch.testing.assert_close(found.matrix, expected)


def test_no_factor_of_a_first_token_is_infinite(block):
    block.q.weight.fill_(2.0**-126)
    block.q.bias.zero_()
    x, needs = torch.full((1, 2, 6), 2.0**-20), frozenset({INPUT, ROUNDING_GRAM})
    plain, other = (collect(block, [x], needs, starts=s).stats["q"].gram for s in (None, torch.tensor([True, False])))
    assert float(plain.matrix[0, 0]) > 0
    assert torch.equal(other.matrix, plain.matrix)  # each token has the largest factor already


def test_token_scales_are_powers_of_two_near_the_inverse_norms(random):
    dense = torch.randn(200, 30, generator=random) * torch.logspace(-9, 9, 200)[:, None]
    scale = token_scales(dense)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    product = scale.double() * dense.double().norm(dim=1)
    assert (product >= 2**-0.5 - 1e-9).all()
    assert (product <= 2**0.5 + 1e-9).all()


def test_token_scales_of_outputs_without_a_norm():
    dense = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0], [3e38, 3e38], [1e-45, 0.0]])
    scale = token_scales(dense)
    assert scale[0] == 0
    assert scale[1:3].isnan().all()
    assert torch.equal(scale[3:], torch.tensor([2.0**-126, 2.0**126]))


@pytest.mark.parametrize("exponent", [-80, 80])
def test_outputs_whose_weight_float32_cannot_hold_are_refused(block, exponent):
    x = torch.randn(2, 7, 6) * 2.0**exponent
    x[0, 0] = 0.0  # this output is zero and has weight 0
    block.q.bias.zero_()
    with pytest.raises(InputError, match=r"q: token weights .* need a norm between 1e-19 and 1e\+16 \(got .*as wanda"):
        collect(block, [x], frozenset({WEIGHTED}))
    collect(block, [x], frozenset({INPUT, COSINE_GRAM}))


def test_a_weight_that_is_not_finite_is_left_to_the_op(block):
    x = torch.randn(2, 7, 6)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="update_moments_: token_weight must be finite"):
        collect(block, [x], frozenset({WEIGHTED}))


def test_padded_tokens_do_not_count(block):
    x = torch.randn(1, 6, 6)
    mask = torch.tensor([True, True, False, True, False, False])
    masked = collect(block, [x], mask=mask).stats["k"]
    alone = collect(block, [x[:, mask]]).stats["k"]
    assert masked.tokens == 3
    torch.testing.assert_close(masked.norm, alone.norm)
    torch.testing.assert_close(masked.weighted_deviation, alone.weighted_deviation)
    torch.testing.assert_close(masked.moment, alone.moment)
    torch.testing.assert_close(masked.gram.matrix, alone.gram.matrix)


def test_only_what_is_needed_is_kept(block):
    stats = collect(block, [torch.randn(1, 2, 6)], needs=frozenset({INPUT})).stats["q"]
    assert stats.weighted is None
    assert stats.moment is None
    assert stats.gram is None


def test_sample_rows_are_bounded(block):
    batches = [torch.randn(2, 300, 6) for _ in range(3)]
    rows = torch.cat(collect(block, batches).stats["q"].sampled)
    assert len(rows) == StatisticsCollector.SAMPLE_ROWS // 3 * 3


def test_hooks_are_removed_after_an_error(block):
    with pytest.raises(RuntimeError, match="shapes"):
        collect(block, [torch.randn(2, 3, 7)])
    assert not block.q._forward_hooks


def test_empty_state_has_no_variance():
    assert (MomentState(3).variance == 0).all()
