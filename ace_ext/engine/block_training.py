"""Training of each pruned block towards the dense one's outputs, and the extra hidden states that it needs."""

from collections.abc import Sequence

from torch import Tensor

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.context import RunContext
from ace_ext.engine.entrances import Entrances
from ace_ext.engine.strategies import RunSizes
from ace_ext.models.blocks import Block
from ace_ext.models.handed_on import with_own_dicts
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import BlockCall, run_block
from ace_ext.pruning.method import Method
from ace_ext.pruning.on_grid import scale_bytes, working_bytes
from ace_ext.pruning.stages import BlockSizes, TrainBlock
from ace_ext.records import Tuning


class BlockTraining:
    """Trains each block once it is pruned; the targets are the dense model's hidden states.

    Args:
        method: its stage ``train`` trains a block.
        states: the walk's.
        context: of the run; a resumed run finds the dense model's hidden states in its journal's folder.
        entrances: to the parts of a model that has several.
    """

    def __init__(
        self, method: Method, states: BatchStates, context: RunContext, entrances: Entrances | None = None
    ) -> None:
        self._method, self._states, self._entrances = method, states, entrances
        self._calls: Sequence[BlockCall] = list(map(with_own_dicts, states.calls))
        """The dense model's calls."""
        self._name = f"dense-{context.peers.rank}"
        done = 0 if context.journal is None else context.journal.finished
        resumed = done > 0
        if entrances is not None:
            self._calls = entrances.dense(done)[0]
            resumed = not entrances.starts(done)
        self.dense: HiddenStates = states.hidden.sibling(self._name) if resumed else states.hidden.fork(self._name)
        """The dense model's hidden states before the current block."""
        self._inputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    def run_dense(self, block: Block, index: int) -> None:
        """Keeps the inputs of a block that is not pruned yet, and runs the dense model through it for the targets."""
        states = self._states
        if self._entrances is not None and self._entrances.starts(index):
            self._calls, dense = self._entrances.dense(index)
            self.dense = states.hidden.beside(self._name, (dense[i] for i in range(len(dense))))
        self._inputs = [states.hidden[i] for i in range(len(states.calls))]
        for i, call in enumerate(self._calls):
            self._targets.append(run_block(block, self.dense[i], call.others[index]))
            states.put(block, index, i, self._targets[-1], hidden=self.dense)
        states.check_outputs(block)

    def train_(self, block: Block, index: int) -> Tuning:
        """Trains the block, which is pruned now; its outputs become the next block's inputs."""
        states, calls = self._states, self._states.calls
        inputs, targets, self._inputs, self._targets = self._inputs, self._targets, [], []
        masks = {child: linear.weight != 0 for child, linear in block.linears.items()}
        others = [call.others[index] for call in calls]
        given = list(zip(inputs, others, strict=True))
        token_masks = [call.token_mask for call in calls]
        shapes = calls[0].sample_shapes
        sample = None if shapes is None else shapes[index]
        trained = _stage(self._method).train_(block, given, targets, masks, token_masks, self._method.grid, sample)
        for i, hidden in enumerate(inputs):
            states.put(block, index, i, run_block(block, hidden, others[i]), given=hidden)
        states.check_outputs(block)
        return trained


def training_bytes(method: Method, sizes: RunSizes) -> int:
    """Bytes that training a block holds in addition to the block, its inputs and its targets."""
    stage, itemsize = _stage(method), sizes.shape.itemsize
    step = min(sizes.batch, stage.step_samples(sizes.seqlen) * sizes.seqlen)
    activations = sizes.shape.training_bytes(step, sizes.seqlen)
    entries = [[linear.weight.numel() for linear in block.linears.values()] for block in sizes.blocks]
    trained, largest = max(map(sum, entries)), max(map(max, filter(None, entries)))
    rounding = int(trained * scale_bytes(method.grid, itemsize)) + working_bytes(method.grid, largest)
    rounding += 0 if method.grid is None else trained  # masks without the kept weights that were rounded to zero
    return rounding + stage.working_bytes(BlockSizes(trained, largest, itemsize, activations))


def _stage(method: Method) -> TrainBlock:
    assert method.train is not None  # only methods that train get here
    return method.train
