"""Order sequential, several batches or processes: a forward pass of all batches for each set of Linears that read the
same input."""

from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.collection import Collection
from ace_ext.engine.matrix_pruner import Reports
from ace_ext.engine.protocols import Peers
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes, WalkStrategy, same_inputs
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.replay import run_block


@dataclass(frozen=True)
class StepOrder:
    """A block's Linears in steps. The Linears of one step read the same tensor, so they are pruned at the same time;
    those of fused experts are in one step if they are part of one weight tensor. The first batch calls the steps in
    this order."""

    steps: list[list[str]]
    """The same on all ranks."""
    complete: bool
    """Whether the first batch called all Linears on this rank; if not, the others are the last step."""


class InSteps(WalkStrategy):
    """Each step takes a forward pass of all batches, up to its last Linear; one more puts the outputs."""

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block."""
        return self.prune_in(block, index, step_order(self._states, self._collection, self._pruner.peers, block, index))

    def prune_in(self, block: Block, index: int, order: StepOrder) -> Reports:
        """Prunes the block in a known order."""
        done: Reports = {}
        for step in order.steps:
            done |= self._pruner.prune_all(block, self._collection.collect(block, index, step, advance=False))
        self._states.advance(block, index)
        return done

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The statistics of Linears with the same input, or of all experts of a fused tensor."""
        together = [(block, step) for block in sizes.blocks for step in block.expert_steps()]
        together += [some for block in sizes.blocks for some in same_inputs(block)]
        return StrategyBytes(sizes.most_statistics(together), sizes.forward())


def step_order(states: BatchStates, collection: Collection, peers: Peers, block: Block, index: int) -> StepOrder:
    """The order of a block's steps, found by a forward pass of the first batch.

    Raises:
        InputError: a Linear is called twice with different inputs.
    """
    steps: list[list[str]] = []
    last: list[Tensor] = []
    together = {child: step for step in block.expert_steps() for child in step}
    repeated = collection.repeated(block, index)

    def note(child: str, x: Tensor) -> None:
        if child in repeated:
            if [child] not in steps:
                steps.append([child])
            last.clear()
            return
        if child not in together and any(child in step for step in steps):
            raise InputError(
                f"{block.full_name(child)} is called twice in its block; write collect(order=block) in the method"
            )
        if child in together:
            if together[child] not in steps:
                steps.append(together[child])
        elif last and last[0] is x:
            steps[-1].append(child)
        else:
            steps.append([child])
        last[:] = [x]

    with ExitStack() as hooks:
        for child, linear in block.linears.items():
            handle = linear.register_forward_pre_hook(lambda _, args, child=child: note(child, args[0]))
            hooks.callback(handle.remove)
        run_block(block, states.hidden[0], states.calls[0].others[index])
    called = {child for step in steps for child in step}
    unseen = [child for child in block.linears if child not in called]  # a later batch may call them
    steps = [*steps, unseen] if unseen else steps
    first: list[list[str]] = peers.gather(steps)[0]  # with experts ranks may differ: rank 0 decides
    return StepOrder(first, not unseen)
