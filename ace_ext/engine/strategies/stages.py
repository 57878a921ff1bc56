"""Order sequential, several batches or processes: a forward pass of all batches for each set of Linears that read the
same input."""

from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.collection import Collection
from ace_ext.engine.matrix_pruner import MatrixPruner, Reports
from ace_ext.engine.protocols import Peers
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes, same_inputs
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block


@dataclass(frozen=True)
class StageOrder:
    """A block's Linears in the order in which the first batch calls them, grouped by the tensor that they read. Those
    of fused experts are grouped by the weight tensor that they are part of."""

    stages: list[list[str]]
    """The same on all ranks."""
    complete: bool
    """Whether the first batch called all Linears on this rank; if not, the others are the last stage."""


class Stages:
    """Each stage takes a forward pass of all batches, up to its last Linear; one more puts the outputs."""

    def __init__(self, states: BatchStates, collection: Collection, pruner: MatrixPruner) -> None:
        self._states, self._collection, self._pruner = states, collection, pruner

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block."""
        return self.prune_in(
            block, index, stage_order(self._states, self._collection, self._pruner.peers, block, index)
        )

    def prune_in(self, block: Block, index: int, order: StageOrder) -> Reports:
        """Prunes the block in a known order."""
        done: Reports = {}
        for stage in order.stages:
            done |= self._pruner.prune_all(block, self._collection.collect(block, index, stage, advance=False))
        self._states.advance(block, index)
        return done

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The statistics of Linears with the same input, or of all experts of a fused tensor."""
        together = [(block, stage) for block in sizes.blocks for stage in block.expert_stages()]
        together += [some for block in sizes.blocks for some in same_inputs(block)]
        return StrategyBytes(sizes.most_statistics(together), sizes.forward())


def stage_order(states: BatchStates, collection: Collection, peers: Peers, block: Block, index: int) -> StageOrder:
    """The order of a block's stages, found by a forward pass of the first batch.

    Raises:
        InputError: a Linear is called twice with different inputs.
    """
    stages: list[list[str]] = []
    last: list[Tensor] = []
    together = {child: stage for stage in block.expert_stages() for child in stage}
    repeated = collection.repeated(block, index)

    def note(child: str, x: Tensor) -> None:
        if child in repeated:
            if [child] not in stages:
                stages.append([child])
            last.clear()
            return
        if child not in together and any(child in stage for stage in stages):
            raise InputError(
                f"{block.full_name(child)} is called twice in its block; write collect(order=block) in the method"
            )
        if child in together:
            if together[child] not in stages:
                stages.append(together[child])
        elif last and last[0] is x:
            stages[-1].append(child)
        else:
            stages.append([child])
        last[:] = [x]

    with ExitStack() as hooks:
        for child, linear in block.linears.items():
            handle = linear.register_forward_pre_hook(lambda _, args, child=child: note(child, args[0]))
            hooks.callback(handle.remove)
        states.run(block, index, 0)
    called = {child for stage in stages for child in stage}
    unseen = [child for child in block.linears if child not in called]  # a later batch may call them
    stages = [*stages, unseen] if unseen else stages
    first: list[list[str]] = peers.gather(stages)[0]  # with experts ranks may differ: rank 0 decides
    return StageOrder(first, not unseen)
