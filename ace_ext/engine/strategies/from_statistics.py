"""Statistics of an earlier run: no forward pass is run."""

from ace_ext.engine.matrix_pruner import Reports
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes, WalkStrategy
from ace_ext.models.blocks import Block
from ace_ext.pruning.statistics import LinearStatistics


class FromStatistics(WalkStrategy):
    """Prunes each block with the statistics of the run's context."""

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block."""
        stats = self.statistics(block, index)
        return {child: self._pruner.prune(block, child, stats.pop(child)) for child in block.linears}

    def statistics(self, block: Block, index: int) -> dict[str, LinearStatistics]:
        """Statistics of all Linears of the block."""
        assert self._context.source is not None  # else the run collects statistics
        return self._context.source.block(block.name, block.linears, self._states.device)

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The statistics of a block, twice while they are read; then the outputs of a matrix's sample rows too."""
        return StrategyBytes(sizes.forward(), sizes.forward(), sizes.sample_outputs())
