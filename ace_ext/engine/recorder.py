"""Records what a walk did: in the report, in the journal of a resumable run, and to whoever observes it."""

from collections.abc import Callable, Sequence

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.context import RunContext
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.records import BlockReport, PruneReport


class Recorder:
    """Records finished blocks.

    Args:
        report: gets the report of each block.
        context: names the journal, the observer and the other processes.
        callback: called after each block with its report.
    """

    def __init__(
        self, report: PruneReport, context: RunContext, callback: Callable[[BlockReport], None] | None = None
    ) -> None:
        self.report, self._callback = report, callback
        self._journal, self._observer, self._peers = context.journal, context.observer, context.peers
        self.done = 0
        """How many blocks an earlier run finished."""
        if self._journal is not None:
            self.done = self._journal.finished
            report.blocks.extend(self._journal.blocks)

    def start(self, blocks: int, states: BatchStates) -> None:
        """Tells the observer how many blocks there are, and how many tokens go through each."""
        self._observer.start(blocks, self.done, sum(self._peers.gather(states.tokens)))

    def finish(
        self, block: Block, block_report: BlockReport, states: BatchStates, moving: Sequence[HiddenStates], last: bool
    ) -> None:
        """Reports a block and records it as done, once its weights and the hidden states are on the disk.

        Args:
            block: the pruned block.
            block_report: its report.
            states: the walk's.
            moving: hidden states whose outputs become the next block's inputs now, on the disk too if they are due.
            last: the last block, whose hidden states are due.
        """
        self.report.blocks.append(block_report)
        if self._journal is not None:
            several = self._peers.size > 1
            due = last or several or self._journal.wants_states()
            commits = [hidden.commit_later() for hidden in moving] if due else None
            if several:  # first those of all ranks: the state on the disk counts on them
                for commit in commits or ():
                    commit()
                commits = []
            layouts = self._peers.gather(states.layout)
            self._journal.block_done(block, block_report, dict(enumerate(layouts)), commits)
            if several:  # no rank may overwrite hidden states before the state on the disk is updated
                self.settle()
                self._peers.wait()
        self._observer.block(block_report, self.report)
        if self._callback is not None:
            self._callback(block_report)

    def settle(self) -> None:
        """Waits until all finished blocks are recorded."""
        if self._journal is not None:
            self._journal.settle()

    def close(self) -> None:
        """Ends the observation, also after an error."""
        self._observer.close()
