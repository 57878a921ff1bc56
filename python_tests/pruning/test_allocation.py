"""Totals are exact for all shapes. The rule follows its paper."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ace_ext import PruneConfig
from ace_ext.ops import reference
from ace_ext.pruning.allocation import allocate, outlier_share
from ace_ext.pruning.groups import keep_count
from ace_ext.pruning.kinds import INPUT, WEIGHTED
from ace_ext.pruning.stages import Allocate, Score
from ace_ext.pruning.statistics import StatisticsCollector

SHAPES = {"q": (64, 64), "k": (16, 64), "up": (96, 64), "down": (64, 96)}


def total(keeps, shapes) -> int:
    return sum(rows * keeps[i][child] for i, block in enumerate(shapes) for child, (rows, _) in block.items())


def uniform_total(shapes, sparsity) -> int:
    return sum(rows * keep_count(cols, sparsity) for block in shapes for rows, cols in block.values())


shape = st.tuples(st.sampled_from([1, 3, 8]), st.integers(1, 40))
blocks = st.lists(st.dictionaries(st.sampled_from("abcd"), shape, min_size=1), min_size=1, max_size=6)


@given(blocks, st.floats(0, 1), st.floats(0.001, 0.4), st.data())
@settings(deadline=None, max_examples=200)
def test_totals_are_exact(shapes, sparsity, reach, data):
    config = PruneConfig([Allocate(reach), Score("wanda")], sparsity)
    numbers = data.draw(st.lists(st.floats(0, 1), min_size=len(shapes), max_size=len(shapes)))
    keeps = allocate(numbers, config, shapes)
    assert total(keeps, shapes) == uniform_total(shapes, sparsity)
    assert all(0 <= keeps[i][c] <= cols for i, block in enumerate(shapes) for c, (_, cols) in block.items())
    for rows in (1, 3, 8):  # and for the matrices of as many rows alone
        part = [{c: s for c, s in block.items() if s[0] == rows} for block in shapes]
        assert total(keeps, part) == uniform_total(part, sparsity)


def test_uniform_reads_no_measure():
    keeps = allocate([], PruneConfig("wanda", 0.3), [SHAPES, SHAPES])
    assert keeps == [{"q": 45, "k": 45, "up": 45, "down": 67}] * 2


def test_owl_is_linear_in_the_outliers_over_its_range():
    config = PruneConfig("allocate(range=0.1) + wanda")
    keeps = allocate([0.1, 0.2, 0.3], config, [{"q": (10, 1000)}] * 3)
    assert [block["q"] for block in keeps] == [400, 500, 600]


def test_equal_blocks_stay_uniform():
    config = PruneConfig("allocate + wanda")
    keeps = allocate([0.2] * 4, config, [SHAPES] * 4)
    assert keeps == [{child: cols // 2 for child, (_, cols) in SHAPES.items()}] * 4


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
    return linears, collector.stats, outlier_share(linears, collector.stats, config)


def test_outlier_share_is_of_the_whole_block():
    config = PruneConfig("allocate + wanda")
    linears, stats, share = measured(config)
    scores = torch.cat(
        [reference.score(m.weight, "scaled", stats[child].norm).flatten() for child, m in linears.items()]
    )
    assert 0 < share == float((scores > 5 * scores.mean()).double().mean())


def test_allocation_reads_what_the_scores_read():
    assert PruneConfig("allocate + wanda").needs.measure == {INPUT}
    assert PruneConfig("allocate + cosvar").needs.measure == {WEIGHTED}
