"""The walk over a model's blocks: each block is pruned, and its output becomes the next block's input.

The ways to prune a block are in :mod:`ace_ext.engine.strategies`, their common steps in :mod:`ace_ext.engine.steps`.
"""

import time

from ace_ext.engine.side_walks import allocate_sparsity, open_dense, prune_and_train
from ace_ext.engine.steps import Steps
from ace_ext.engine.strategies import prune_block, prune_whole_model
from ace_ext.records import BlockReport


class Walk(Steps):
    """One walk over a model's blocks; its arguments are those of :class:`ace_ext.engine.steps.Steps`."""

    def run(self) -> None:
        """Prunes every unfinished block.

        Raises:
            InputError: as :func:`ace_ext.prune_model`.
        """
        journal, observer = self.context.journal, self.context.observer
        done = journal.finished if journal else 0
        if journal:
            self.report.blocks.extend(journal.blocks)
        if self.config.method.allocate is not None:
            self.keeps = allocate_sparsity(self)
        if self.config.method.train is not None:
            self.dense = open_dense(self)
        tokens = sum(self.context.peers.gather(sum(call.tokens for call in self.calls)))
        observer.start(len(self.blocks.blocks), done, tokens)
        try:
            if self.config.comparison.over_matrices:
                prune_whole_model(self)
            else:
                for index in range(done, len(self.blocks.blocks)):
                    self._run_block(index)
            self.settle()
        finally:
            observer.close()

    def _run_block(self, index: int) -> None:
        start, journal = time.perf_counter(), self.context.journal
        with self.blocks.hold(index) as block:
            block_report = BlockReport(block.name, 0.0)
            if self.dense is None:
                prune_block(self, block, index, block_report)
            else:
                prune_and_train(self, block, index, block_report)
            weights = [linear.weight for linear in block.linears.values()]
            self.check_finite(block.name, weights)
            self.context.peers.check_same(weights, block.name)
            commits, last = None, index + 1 == len(self.blocks.blocks)
            if journal is not None and (last or journal.wants_states() or self.context.peers.size > 1):
                commits = [states.commit_later() for states in (self._hidden, self.dense) if states is not None]
            block_report.seconds = time.perf_counter() - start
            self.finish(block, block_report, commits)
