"""Group model: the statistics of all dense blocks, then one threshold for all weights."""

import time
from collections.abc import Callable
from contextlib import ExitStack

from ace_ext.engine.collection import check_all_seen
from ace_ext.engine.matrix_pruner import MatrixPruner
from ace_ext.engine.matrix_report import output_of
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.ops import ScoredWeight
from ace_ext.pruning.masks import as_rows, prune_model_wide_, scored_weight
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import BlockReport

DenseStatistics = Callable[[Block, int], dict[str, LinearStatistics]]
"""``(block, index) -> statistics`` of all Linears of a dense block; its outputs become the next block's inputs."""


class WholeModel:
    """Prunes all blocks at once."""

    def __init__(self, statistics: DenseStatistics, pruner: MatrixPruner) -> None:
        self._statistics, self._pruner = statistics, pruner

    def prune_model(self, blocks: list[Block]) -> dict[str, BlockReport]:
        """Prunes the blocks, whose weights are in memory; the reports by the blocks' names."""
        pending: list[tuple[Block, str, LinearStatistics, ScoredWeight]] = []
        reports, pruner = {}, self._pruner
        written_back = ExitStack()
        for index, block in enumerate(blocks):
            start = time.perf_counter()
            stats = self._statistics(block, index)
            check_all_seen(block, stats)
            for child, linear in block.linears.items():
                rows = written_back.enter_context(as_rows(linear.weight))
                pending.append((block, child, stats[child], scored_weight(rows, stats[child], pruner.config)))
            reports[block.name] = BlockReport(block.name, time.perf_counter() - start)
        dense = [output_of(stats, scored.weight) for _, _, stats, scored in pending]
        with written_back:
            try:
                prune_model_wide_([scored for *_, scored in pending], pruner.config.sparsity)
            except ValueError as error:
                raise InputError(f"model: {error}") from error
        weights = [block.linears[child].weight for block, child, *_ in pending]
        pruner.check("model", weights)
        for (block, child, stats_of_child, _), weight, before in zip(pending, weights, dense, strict=True):
            matrix = pruner.measurements.measure(block.full_name(child), weight, stats_of_child, before, None)
            reports[block.name].matrices.append(matrix)
        pruner.measurements.read_()
        return reports

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The statistics of the whole model."""
        if sizes.stored is not None:
            return StrategyBytes(sum(sizes.stored), sizes.forward())
        statistics = sum(sizes.statistics(block, list(block.linears)) for block in sizes.blocks)
        return StrategyBytes(statistics, sizes.forward())
