"""Statistics of a block's Linears: collected over all batches and processes, and complete for every Linear."""

from collections.abc import Mapping

from torch import nn

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.context import RunContext
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.left_dense import any_of
from ace_ext.models.padded_experts import padding, run_call, without_padding
from ace_ext.models.replay import run_until_called
from ace_ext.models.trial import calls_in
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.statistics import LinearStatistics, StatisticsCollector


class Collection:
    """Collects the kinds of statistics that a run needs.

    Args:
        states: the batches.
        config: names the kinds.
        context: the other processes, and how often blocks call their Linears, as far as it is known.
    """

    def __init__(self, states: BatchStates, config: PruneConfig, context: RunContext) -> None:
        self.states, self._peers = states, context.peers
        self._uses = dict(context.uses)
        self._needs = config.needs.prune if context.sink is None else config.needs.kept
        self._token_norm = config.token_norm
        self._compares = config.comparison.over_matrices or config.method.allocate is not None

    def collector(self, linears: Mapping[str, nn.Linear], needs: frozenset[str] | None = None) -> StatisticsCollector:
        """A collector for these Linears; ``needs``: other kinds of statistics than the run's, for an extra pass."""
        batches = len(self.states.calls) * self._peers.size
        return StatisticsCollector(dict(linears), needs or self._needs, batches, self._token_norm)

    def collect(
        self,
        block: Block,
        index: int,
        children: list[str],
        *,
        advance: bool,
        hidden: HiddenStates | None = None,
        needs: frozenset[str] | None = None,
    ) -> dict[str, LinearStatistics]:
        """Statistics of the named Linears over all batches and processes, by name.

        Args:
            block: a block whose weights are in memory.
            index: its place among the blocks.
            children: the Linears' names in the block.
            advance: put the outputs, as the next block's inputs.
            hidden: other hidden states than the walk's, for an extra pass.
            needs: other kinds of statistics than the run's, for an extra pass.

        Raises:
            InputError: a Linear saw no token (see :meth:`check_seen`).
        """
        states = self.states
        hidden = hidden or states.hidden
        collector = self.collector({child: block.linears[child] for child in children}, needs)
        collector.alone = self.repeated(block, index)
        again = collector.alone.intersection(children)  # their first call is not the last
        with collector, without_padding(block):
            for i, call in enumerate(states.calls):
                collector.enter(call)
                with states.naming(block, index, i, hidden):
                    if advance or again:
                        output = run_call(block, hidden[i], call, index)
                    else:
                        with padding(call.token_mask):
                            run_until_called(block, hidden[i], call.others[index], children)
                if advance:
                    states.put(block, index, i, output, hidden=hidden)
        states.check_outputs(block)
        return self.complete(block, collector)

    def complete(self, block: Block, collector: StatisticsCollector) -> dict[str, LinearStatistics]:
        """The statistics of all of a collector's Linears over all processes, by name.

        Raises:
            InputError: a Linear saw no token (see :meth:`check_seen`).
        """
        children = list(collector.linears)
        self._peers.merge_(collector.stats, children, collector.empty)
        for child in children:
            self.check_seen(block, child, collector)
        return collector.stats

    def repeated(self, block: Block, index: int) -> frozenset[str]:
        """The Linears that a call of the block calls more than once."""
        if block.name not in self._uses:  # the block was not tried in its model
            states = self.states
            self._uses[block.name] = calls_in(block, states.hidden[0], states.calls[0].others[index])
        return frozenset(child for child, count in self._uses[block.name].items() if count > 1)

    def check_seen(self, block: Block, child: str, collector: StatisticsCollector) -> None:
        """Gives a Linear that saw no token empty statistics: an expert is then pruned by magnitude, any other stays
        dense.

        Raises:
            InputError: its scores would be compared with those of other matrices.
        """
        if child in collector.stats and collector.stats[child].tokens:
            return
        if self._compares:
            raise _not_seen(block, child)
        collector.stats[child] = collector.empty(child)


def check_all_seen(block: Block, stats: Mapping[str, LinearStatistics]) -> None:
    """To be called before scores of different matrices are compared: a matrix that saw no token has none.

    Raises:
        InputError: a Linear of the block saw no token.
    """
    for child in block.linears:
        if not stats[child].tokens:
            raise _not_seen(block, child)


class UnseenExpertError(InputError):
    """An expert that no token reached is to be compared with other matrices. More tokens may reach it."""


def _not_seen(block: Block, child: str) -> InputError:
    name, end = block.full_name(child), "(skip= in Python)"
    if block.is_expert(child):
        return UnseenExpertError(
            f"{name} saw no calibration token; give more or other calibration text, or skip it {end}"
        )
    return InputError(
        f"{name} is not called with these inputs and has no scores; leave it dense: --skip {any_of([child])} {end}"
    )
