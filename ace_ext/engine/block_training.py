"""Training of each pruned block towards the dense one's outputs, and the extra hidden states that it needs."""

from collections.abc import Callable

from torch import Tensor

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.context import RunContext
from ace_ext.engine.strategies import RunSizes
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import run_block
from ace_ext.pruning.block_tuning import step_samples
from ace_ext.pruning.stages import BlockSizes, TrainBlock
from ace_ext.records import BlockReport


class BlockTraining:
    """Trains each block once it is pruned; the targets are the dense model's hidden states.

    Args:
        stage: trains a block.
        states: the walk's.
        context: of the run; a resumed run finds the dense model's hidden states in its journal's folder.
    """

    def __init__(self, stage: TrainBlock, states: BatchStates, context: RunContext) -> None:
        self._stage, self._states = stage, states
        name = f"dense-{context.peers.rank}"
        resumed = context.journal is not None and context.journal.finished
        self.dense: HiddenStates = states.hidden.sibling(name) if resumed else states.hidden.fork(name)
        """The dense model's hidden states before the current block."""

    def prune_and_train(self, block: Block, index: int, report: BlockReport, prune: Callable[[], None]) -> None:
        """Runs the dense block for its targets, calls ``prune``, and trains the block."""
        states = self._states
        calls = states.calls
        inputs = [states.hidden[i] for i in range(len(calls))]
        targets: list[Tensor] = []
        for i, call in enumerate(calls):
            targets.append(run_block(block, self.dense[i], call.others[index]))
            states.put(block, index, i, targets[-1], hidden=self.dense)
        states.check_outputs(block)
        prune()
        masks = {child: linear.weight != 0 for child, linear in block.linears.items()}
        others = [call.others[index] for call in calls]
        report.tuning = self._stage.train_(
            block,
            list(zip(inputs, others, strict=True)),
            targets,
            masks,
            [call.token_mask for call in calls],
        )
        for i, given in enumerate(inputs):
            states.put(block, index, i, run_block(block, given, others[i]), given=given)
        states.check_outputs(block)


def training_bytes(stage: TrainBlock, sizes: RunSizes) -> int:
    """Bytes that training a block holds in addition to the block, its inputs and its targets."""
    step = min(sizes.batch, step_samples(sizes.seqlen) * sizes.seqlen)
    activations = sizes.shape.training_bytes(step, sizes.seqlen)
    entries = [[linear.weight.numel() for linear in block.linears.values()] for block in sizes.blocks]
    trained, largest = max(map(sum, entries)), max(map(max, filter(None, entries)))
    return stage.working_bytes(BlockSizes(trained, largest, sizes.shape.itemsize, activations))
