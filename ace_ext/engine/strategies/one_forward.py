"""Order sequential, all tokens in one batch: hooks prune each Linear when it is called."""

from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from ace_ext.engine.matrix_pruner import Reports
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes, WalkStrategy, output_of_linear
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.padded_experts import run_call, without_padding


class OneForward(WalkStrategy):
    """One forward pass collects statistics, prunes, and computes the next block's inputs.

    A Linear returns the output of its pruned weight. If the statistics do not read the dense output, the Linear is
    pruned before its forward, which then runs only once. A block that calls a Linear more than once is pruned in
    lockstep.
    """

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block."""
        if self._collection.repeated(block, index):
            from ace_ext.engine.strategies.in_lockstep import InLockstep  # imported here: few blocks need it

            return InLockstep(self._states, self._collection, self._pruner, self._context).prune(block, index)
        states, call = self._states, self._states.calls[0]
        collector = self._collection.collector(block.linears)
        collector.enter(call)
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
            hooks.enter_context(without_padding(block))
            for child, linear in block.linears.items():
                register = linear.register_forward_hook if collector.wants_output else linear.register_forward_pre_hook
                hooks.callback(register(partial(prune, child)).remove)
            with states.naming(block, index, 0):
                output = run_call(block, states.hidden[0], call, index)
        states.put(block, index, 0, output)
        states.check_outputs(block)
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
