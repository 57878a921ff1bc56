"""Order block: all statistics of a block come from the dense block."""

from ace_ext.engine.matrix_pruner import Reports
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes, WalkStrategy, whole_blocks
from ace_ext.models.blocks import Block
from ace_ext.pruning.statistics import LinearStatistics


class DenseOrder(WalkStrategy):
    """Collects the statistics of the dense block, prunes it, and runs the pruned block.

    With a sink the dense block's outputs become the next block's inputs instead: saved statistics must not depend on
    the sparsity of the run that saved them.
    """

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block."""
        stats = self.statistics(block, index, advance=self._context.sink is not None)
        done = {child: self._pruner.prune(block, child, stats.pop(child)) for child in block.linears}
        if self._context.sink is None:
            self._states.advance(block, index)
        return done

    def statistics(self, block: Block, index: int, *, advance: bool = True) -> dict[str, LinearStatistics]:
        """Statistics of all Linears of the dense block; ``advance``: its outputs become the next block's inputs."""
        stats = self._collection.collect(block, index, list(block.linears), advance=advance)
        if self._context.sink is not None:
            self._context.sink.block(block.name, stats)
        return stats

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The statistics of a whole block."""
        return StrategyBytes(sizes.most_statistics(whole_blocks(sizes.blocks)), sizes.forward())
