"""Order block: all statistics of a block come from the dense block."""

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.collection import Collection
from ace_ext.engine.matrix_pruner import MatrixPruner, Reports
from ace_ext.engine.protocols import StatisticsSink
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes, whole_blocks
from ace_ext.models.blocks import Block
from ace_ext.pruning.statistics import LinearStatistics


class DenseOrder:
    """Collects the statistics of the dense block, prunes it, and runs the pruned block.

    With a sink the dense block's outputs become the next block's inputs instead: saved statistics must not depend on
    the sparsity of the run that saved them.
    """

    def __init__(
        self, states: BatchStates, collection: Collection, pruner: MatrixPruner, sink: StatisticsSink | None = None
    ) -> None:
        self._states, self._collection, self._pruner, self._sink = states, collection, pruner, sink

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block."""
        stats = self.statistics(block, index, advance=self._sink is not None)
        done = {child: self._pruner.prune(block, child, stats.pop(child)) for child in block.linears}
        if self._sink is None:
            self._states.advance(block, index)
        return done

    def statistics(self, block: Block, index: int, *, advance: bool) -> dict[str, LinearStatistics]:
        """Statistics of all Linears of the dense block; ``advance``: its outputs become the next block's inputs."""
        stats = self._collection.collect(block, index, list(block.linears), advance=advance)
        if self._sink is not None:
            self._sink.block(block.name, stats)
        return stats

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The statistics of a whole block."""
        return StrategyBytes(sizes.most_statistics(whole_blocks(sizes.blocks)), sizes.forward())
