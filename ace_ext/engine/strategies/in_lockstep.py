"""Order sequential, several batches or processes: all batches stop at each Linear until it is pruned."""

from itertools import groupby

from torch import Tensor

from ace_ext.engine.matrix_pruner import Reports
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes, WalkStrategy, output_of_linear, same_inputs
from ace_ext.engine.strategies.in_steps import InSteps, step_order
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.lockstep import PAUSED_BYTES, Lockstep, forwards_fit, keeps_no_state
from ace_ext.models.padded_experts import run_call, without_padding
from ace_ext.models.replay import BlockCall
from ace_ext.pruning.statistics import StatisticsCollector


class InLockstep(WalkStrategy):
    """All batches go on to their next Linear, the first step that one of them has come to is pruned, and so on: one
    forward pass of each batch in all. A block that it does not serve is pruned in steps, to the same bytes."""

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block."""
        states, collection, peers = self._states, self._collection, self._pruner.peers
        order = step_order(states, collection, peers, block, index)
        if not all(peers.gather(order.complete and bool(order.steps) and self.serves(block, index))):
            return InSteps(states, collection, self._pruner, self._context).prune_in(block, index, order)
        return self._prune_in(block, index, one_by_one(block, order.steps))

    def serves(self, block: Block, index: int) -> bool:
        """Whether what the batches' unfinished forwards hold fits into memory, the block calls each Linear once and
        with its bias, and no module of it keeps state of its own (tried once for each kind of block)."""
        states, stateless = self._states, self._context.stateless
        fits = self._context.keeps_forwards
        if fits is None:
            fits = forwards_fit(block, states.hidden, states.device)
        if not fits or block.leaves_biases or self._collection.repeated(block, index):
            return False
        kind = tuple((name, type(module)) for name, module in block.module.named_modules())
        if kind not in stateless:
            some = (0, len(states.calls) - 1)
            calls, hidden = [states.calls[i] for i in some], [states.hidden[i] for i in some]
            stateless[kind] = keeps_no_state(block, index, calls, hidden)
        return stateless[kind]

    def _prune_in(self, block: Block, index: int, steps: list[list[str]]) -> Reports:
        states = self._states
        done: Reports = {}
        place = {child: number for number, step in enumerate(steps) for child in step}
        forwards = [
            lambda i=i, call=call: run_call(block, states.hidden[i], call, index) for i, call in enumerate(states.calls)
        ]
        with without_padding(block), Lockstep(block, forwards, states.device) as lockstep:
            ready = [*range(len(forwards))]
            while True:
                for i in ready:
                    output = lockstep.run(i)
                    if output is not None:
                        states.put(block, index, i, output)
                stops = [(i, stop) for i in range(len(forwards)) if (stop := lockstep.stop_of(i)) is not None]
                first = min((place[child] for _, (child, _) in stops), default=len(steps))
                first = min(self._pruner.peers.gather(first))
                if first == len(steps):
                    break
                step = steps[first]
                if step[0] in done:
                    raise InputError(
                        f"{block.full_name(step[0])} is called twice in its block, or in another order by a later "
                        "batch; write collect(order=block) in the method"
                    )
                collector = self._collector(block, step)
                ready = []
                for i, (child, x) in stops:
                    if place[child] == first:
                        ready.append(i)
                        with states.naming(block, index, i):
                            observe(collector, step, x, states.calls[i])
                        lockstep.admit(i, step, x)
                del stops  # and so the inputs
                done |= self._pruner.prune_all(block, self._collection.complete(block, collector))
        states.check_outputs(block)
        for step in steps:
            if step[0] not in done:  # experts that no token was routed to
                collector = self._collector(block, step)
                done |= self._pruner.prune_all(block, self._collection.complete(block, collector))
        return done

    def _collector(self, block: Block, step: list[str]) -> StatisticsCollector:
        return self._collection.collector({child: block.linears[child] for child in step})

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The statistics of Linears with the same input, or of one expert; and the unfinished forwards: one batch runs,
        the others wait."""
        alone = [(block, [child]) for block in sizes.blocks for step in block.expert_steps() for child in step]
        together = alone + [some for block in sizes.blocks for some in same_inputs(block)]
        waiting = sizes.shape.waiting_bytes
        pending = sizes.pending(waiting(sizes.tokens))
        forward = max(sizes.forward() + waiting(sizes.tokens - sizes.batch), pending)
        stacks = PAUSED_BYTES * -(-sizes.tokens // sizes.batch)
        return StrategyBytes(sizes.most_statistics(together), forward, pending, stacks)


def observe(collector: StatisticsCollector, step: list[str], x: Tensor, call: BlockCall) -> None:
    """Adds one input of the Linears of a step, which have not run yet; ``call``: of its batch."""
    collector.enter(call)
    for child in step:
        output = output_of_linear(collector.linears[child], x) if collector.wants_output else None
        collector.observe(child, x, output)


def one_by_one(block: Block, steps: list[list[str]]) -> list[list[str]]:
    """The steps with fused experts taken apart, as a forward calls them: one expert's matrices, then the next's."""
    number = {child: expert for fused in block.experts for expert, child in enumerate(fused.linears)}
    owner = {child: id(fused.owner) for fused in block.experts for child in fused.linears}
    found: list[list[str]] = []
    for mixture, group in groupby(steps, key=lambda step: owner.get(step[0])):
        if mixture is None:
            found.extend(group)
        else:  # sorting keeps the order of one expert's matrices
            found.extend(
                [child] for child in sorted((child for step in group for child in step), key=number.__getitem__)
            )
    return found
