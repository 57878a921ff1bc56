"""Order sequential, all tokens in one batch: hooks prune each Linear when it is called."""

from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.collection import Collection
from ace_ext.engine.matrix_pruner import MatrixPruner, Reports
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes, output_of_linear
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block


class OneForward:
    """One forward pass collects statistics, prunes, and computes the next block's inputs.

    A Linear returns the output of its pruned weight. If the statistics do not read the dense output, the Linear is
    pruned before its forward, which then runs only once.
    """

    def __init__(self, states: BatchStates, collection: Collection, pruner: MatrixPruner) -> None:
        self._states, self._collection, self._pruner = states, collection, pruner

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block, which calls each Linear at most once."""
        collector = self._collection.collector(block.linears)
        done: Reports = {}

        def prune(child: str, linear: nn.Linear, args: tuple[Tensor], output: Tensor | None = None) -> Tensor | None:
            """A hook: before the forward of a Linear, or after it with the dense output, which it replaces."""
            collector.observe(child, args[0], output)
            if child in done:  # not in the sample that Collection.repeated tried
                raise InputError(
                    f"{block.full_name(child)} is called twice in its block; write collect(order=block) in the method"
                )
            if collector.stats[child].tokens:
                done[child] = self._pruner.prune(block, child, collector.stats.pop(child))
            return None if output is None else output_of_linear(linear, args[0])

        with ExitStack() as hooks:
            for child, linear in block.linears.items():
                register = linear.register_forward_hook if collector.wants_output else linear.register_forward_pre_hook
                hooks.callback(register(partial(prune, child)).remove)
            self._states.advance(block, index, collector)
        for child in block.linears:
            if child not in done:
                self._collection.check_seen(block, child, collector)
                done[child] = self._pruner.prune(block, child, collector.stats.pop(child))
        return done

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The statistics of one Linear, and the forward, which is not finished while a matrix is pruned."""
        alone = ((block, [child]) for block in sizes.blocks for child in block.linears)
        pending = sizes.pending(sizes.shape.pending_bytes(sizes.tokens))
        return StrategyBytes(sizes.most_statistics(alone), sizes.forward(), pending)
