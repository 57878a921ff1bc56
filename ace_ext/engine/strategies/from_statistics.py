"""Statistics of an earlier run: no forward pass is run."""

import torch

from ace_ext.engine.matrix_pruner import MatrixPruner, Reports
from ace_ext.engine.protocols import StatisticsSource
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes
from ace_ext.engine.strategies.dense_order import DenseOrder
from ace_ext.models.blocks import Block
from ace_ext.pruning.statistics import LinearStatistics


class FromStatistics:
    """Prunes each block with statistics that a source holds."""

    def __init__(self, source: StatisticsSource, pruner: MatrixPruner, device: torch.device) -> None:
        self._source, self._pruner, self._device = source, pruner, device

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block."""
        stats = self.statistics(block)
        return {child: self._pruner.prune(block, child, stats.pop(child)) for child in block.linears}

    def statistics(self, block: Block) -> dict[str, LinearStatistics]:
        """Statistics of all Linears of the block."""
        return self._source.block(block.name, block.linears, self._device)

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """As :class:`DenseOrder`, although nothing is run: an upper bound."""
        return DenseOrder.memory(sizes)
