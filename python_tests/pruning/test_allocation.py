"""Totals are exact for all shapes. The rules follow their papers and the error curves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ace_ext import PruneConfig
from ace_ext.ops import reference
from ace_ext.pruning.allocation import CURVE_POINTS, BlockMeasure, allocate, measure_block, sparsity_grid
from ace_ext.pruning.kinds import INPUT, WEIGHTED
from ace_ext.pruning.masks import prune_weight_, scored_weight
from ace_ext.pruning.pattern import keep_count
from ace_ext.pruning.stages import Allocate, Score
from ace_ext.pruning.statistics import StatisticsCollector

SHAPES = {"q": (64, 64), "k": (16, 64), "up": (96, 64), "down": (64, 96)}


def curve(config: PruneConfig, scale: float) -> np.ndarray:
    return scale * sparsity_grid(config) ** 2


def measures_of(config: PruneConfig, numbers) -> list[BlockMeasure]:
    return [BlockMeasure(number, curve(config, number)) for number in numbers]


def total(keeps, shapes) -> int:
    return sum(rows * keeps[i][child] for i, block in enumerate(shapes) for child, (rows, _) in block.items())


def uniform_total(shapes, sparsity) -> int:
    return sum(rows * keep_count(cols, sparsity) for block in shapes for rows, cols in block.values())


shape = st.tuples(st.sampled_from([1, 3, 8]), st.integers(1, 40))
blocks = st.lists(st.dictionaries(st.sampled_from("abcd"), shape, min_size=1), min_size=1, max_size=6)


def test_errors_may_be_tiny():
    config = PruneConfig("allocate(by=error, range=0.1) + wanda", 0.6)
    keeps = [allocate(measures_of(config, scale * np.array([1.0, 3.0])), config, [SHAPES] * 2) for scale in (1, 1e-308)]
    assert keeps[0] == keeps[1]


@given(blocks, st.sampled_from(["owl", "error"]), st.floats(0, 1), st.floats(0.001, 0.4), st.data())
@settings(deadline=None, max_examples=200)
def test_totals_are_exact(shapes, by, sparsity, reach, data):
    config = PruneConfig([Allocate(by, reach), Score("wanda")], sparsity)
    numbers = data.draw(st.lists(st.floats(0, 1), min_size=len(shapes), max_size=len(shapes)))
    keeps = allocate(measures_of(config, numbers), config, shapes)
    assert total(keeps, shapes) == uniform_total(shapes, sparsity)
    assert all(0 <= keeps[i][c] <= cols for i, block in enumerate(shapes) for c, (_, cols) in block.items())
    for rows in (1, 3, 8):  # and for the matrices of as many rows alone
        part = [{c: s for c, s in block.items() if s[0] == rows} for block in shapes]
        assert total(keeps, part) == uniform_total(part, sparsity)


def test_uniform_reads_no_measure():
    keeps = allocate([], PruneConfig("wanda", 0.3), [SHAPES, SHAPES])
    assert keeps == [{"q": 45, "k": 45, "up": 45, "down": 67}] * 2


def test_owl_is_linear_in_the_outliers_over_its_range():
    config = PruneConfig("allocate(by=owl, range=0.1) + wanda")
    keeps = allocate(measures_of(config, [0.1, 0.2, 0.3]), config, [{"q": (10, 1000)}] * 3)
    assert [block["q"] for block in keeps] == [400, 500, 600]


@pytest.mark.parametrize("by", ["owl", "error"])
def test_equal_blocks_stay_uniform(by):
    config = PruneConfig(f"allocate(by={by}) + wanda")
    keeps = allocate(measures_of(config, [0.2] * 4), config, [SHAPES] * 4)
    assert keeps == [{child: cols // 2 for child, (_, cols) in SHAPES.items()}] * 4


def test_error_equalises_the_marginal_cost():
    """The errors ``c s²`` of the blocks have the slopes ``2 c s``, so the best ``s`` is proportional to ``1 / c``."""
    config = PruneConfig("allocate(by=error, range=0.1) + wanda")
    keeps = allocate(measures_of(config, [1.0, 1.5]), config, [{"q": (10, 10000)}] * 2)
    assert [block["q"] for block in keeps] == pytest.approx([4000, 6000], abs=30)


def test_error_stays_in_its_range():
    config = PruneConfig("allocate(by=error, range=0.05) + wanda")
    keeps = allocate(measures_of(config, [1e-9, 1.0, 1.0]), config, [{"q": (10, 1000)}] * 3)
    assert [block["q"] for block in keeps] == [350, 575, 575]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


def measured(config: PruneConfig):
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    block.up.weight[0] *= 20  # outliers
    linears = dict(block.named_children())
    with StatisticsCollector(linears, config.needs.measure) as collector:
        block(torch.randn(1, 300, 12))
    return linears, collector.stats, measure_block(linears, collector.stats, config)


def test_outlier_share_is_of_the_whole_block():
    config = PruneConfig("allocate(by=owl) + wanda")
    linears, stats, measure = measured(config)
    scores = torch.cat(
        [reference.score(m.weight, "scaled", stats[child].norm).flatten() for child, m in linears.items()]
    )
    assert 0 < measure.outlier_share == float((scores > 5 * scores.mean()).double().mean())
    assert measure.errors is None


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_error_curve_is_that_of_the_masks(group):
    reaches = PruneConfig("allocate(by=error, range=0.16) + wanda", group=group)
    linears, stats, measure = measured(reaches)
    grid = sparsity_grid(reaches)
    for point in (0, CURVE_POINTS // 2, CURVE_POINTS - 1):
        pruned = {child: grid[point] * linear.in_features for child, linear in linears.items()}
        low = sum(masked_error(linears[c], stats[c], group, math.floor(k)) for c, k in pruned.items())
        high = sum(masked_error(linears[c], stats[c], group, math.ceil(k)) for c, k in pruned.items())
        assert low * (1 - 1e-6) <= measure.errors[point] <= high * (1 + 1e-6)


def masked_error(linear, stats, group, pruned_of_row) -> float:
    weight = linear.weight.clone()
    config = PruneConfig("wanda", group=group)
    prune_weight_(scored_weight(weight, stats, config), config, weight.shape[1] - pruned_of_row)
    return float(((weight - linear.weight).double().square() * stats.weighted_square_sum).sum() / stats.tokens)


def test_only_error_needs_weighted_moments():
    assert PruneConfig("allocate(by=owl) + wanda").needs.measure == {INPUT}
    assert PruneConfig("allocate(by=error) + wanda").needs.measure == {INPUT, WEIGHTED}
