"""The walk over a model's blocks: each block is pruned, and its output becomes the next block's input."""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.collection import Collection
from ace_ext.engine.context import RunContext
from ace_ext.engine.entrances import Entrances
from ace_ext.engine.matrix_pruner import MatrixPruner
from ace_ext.engine.recorder import Recorder
from ace_ext.engine.strategies import DenseStrategy, Strategy, by_block
from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.statistics import LinearStatistics, StatisticsCollector
from ace_ext.records import BlockReport, PruneReport

if TYPE_CHECKING:
    from ace_ext.engine.block_training import BlockTraining
    from ace_ext.engine.sparsity_pass import Keeps

# Methods import the parts of the engine that few runs use.


class Walk:
    """One walk over a model's blocks.

    Args:
        blocks: provides the blocks with their weights.
        states: the calibration batches; empty with statistics from a file.
        config: what to prune and how.
        report: gets the report of each block.
        context: the optional services of the run.
        callback: called after each block with its report.
        entrances: to the parts of a model that has several.
    """

    def __init__(
        self,
        blocks: BlockSource,
        states: BatchStates,
        config: PruneConfig,
        report: PruneReport,
        context: RunContext,
        callback: Callable[[BlockReport], None] | None = None,
        entrances: Entrances | None = None,
    ) -> None:
        self.entrances = entrances
        self.blocks, self.states, self.config, self.context = blocks, states, config, context
        self.recorder = Recorder(report, context, callback)
        states.settle = self.recorder.settle
        self.collection = Collection(states, config, context)
        self.pruner = MatrixPruner(config, context.peers, states.device)
        self._walks = context.source is None
        """Whether hidden states go from block to block. If not, statistics come from elsewhere."""
        one_batch = len(states.calls) == 1 and context.peers.size == 1
        chosen = by_block(config, one_batch, keeps_forwards=True, stored=not self._walks)
        self.strategy: Strategy = chosen(states, self.collection, self.pruner, context)

    def read_whole_forwards(self, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
        """From now on statistics come from forward passes of the whole model; ``batches``: arguments of its calls.

        Raises:
            InputError: a block sees other tokens than those that are padding.
        """
        from ace_ext.engine.strategies.whole_forwards import WholeForwards

        kinds, norm = self.config.needs.read, self.config.token_norm
        collector = partial(StatisticsCollector, needs=kinds, batches=len(batches), token_norm=norm)
        self.strategy = strategy = WholeForwards(model, self.blocks.blocks, batches, collector, self.pruner)
        strategy.check_padding()
        self._walks = False

    def run(self) -> None:
        """Prunes every unfinished block.

        Raises:
            InputError: as :func:`ace_ext.prune_model`.
        """
        blocks = self.blocks.blocks
        if self.config.method.allocate is not None:
            keeps = self._allocate()
            self.pruner.keeps = {block.name: keep for block, keep in zip(blocks, keeps, strict=True)}
        training = None
        if self.config.method.train is not None and self.recorder.done < len(blocks):
            from ace_ext.engine.block_training import BlockTraining

            training = BlockTraining(self.config.method, self.states, self.context, self.entrances)
        self.recorder.start(len(blocks), self.states)
        try:
            if self.config.comparison.over_matrices:
                self._prune_whole_model()
            else:
                for index in range(self.recorder.done, len(blocks)):
                    self._run_block(index, training)
            self.recorder.settle()
        finally:
            self.recorder.close()

    def _allocate(self) -> "Keeps":
        """A resumed run reads the earlier run's result from the journal."""
        from ace_ext.engine.sparsity_pass import allocate_sparsity, measured_by_forwards

        journal = self.context.journal
        if journal is not None and "keeps" in journal.notes:
            kept: Keeps = journal.notes["keeps"]
            return kept
        if self._walks:
            rank = self.context.peers.rank
            keeps = measured_by_forwards(self.blocks, self.config, self.states, self.collection, rank, self.entrances)
        else:
            keeps = allocate_sparsity(self.blocks, self.config, self._dense.statistics)
        if journal is not None:
            journal.notes["keeps"] = keeps
        return keeps

    @property
    def _dense(self) -> DenseStrategy:
        """The strategy, if it reads all statistics of a block while the block is dense."""
        return cast(DenseStrategy, self.strategy)

    def _prune_whole_model(self) -> None:
        from ace_ext.engine.strategies.whole_model import WholeModel

        def statistics(block: Block, index: int) -> dict[str, LinearStatistics]:
            self._enter(index)
            found = self._dense.statistics(block, index)
            if self._walks:
                self.states.hidden.commit()
            return found

        blocks = self.blocks.blocks
        reports = WholeModel(statistics, self.pruner).prune_model(blocks)
        for block in blocks:
            self.recorder.finish(block, reports[block.name], self.states, [], last=True)

    def _run_block(self, index: int, training: "BlockTraining | None") -> None:
        start = time.perf_counter()
        self._enter(index)
        with self.blocks.loaded(index) as block:
            report = BlockReport(block.name, 0.0)
            if training is not None:
                training.run_dense(block, index)
            matrices = self.strategy.prune(block, index)
            self.pruner.measurements.read_()
            report.matrices.extend(filter(None, (matrices[child] for child in block.linears)))
            if training is not None:
                report.tuning = training.train_(block, index)
            self.pruner.check(block.name, [linear.weight for linear in block.linears.values()])
            moving = [self.states.hidden] if self._walks else []
            moving += [] if training is None else [training.dense]
            report.seconds = time.perf_counter() - start
            last = index + 1 == len(self.blocks.blocks) or (self.entrances is not None and self.entrances.ends(index))
            self.recorder.finish(block, report, self.states, moving, last=last)

    def _enter(self, index: int) -> None:
        """Goes on to the part of block ``index``, if the model has parts."""
        if self.entrances is not None:
            self.entrances.enter(index, self.states)
