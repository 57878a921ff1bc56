"""The steps of a walk that all strategies share: collect statistics, prune a matrix, run the block, report."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ace_ext import ops
from ace_ext.engine.context import RunContext
from ace_ext.engine.finite import NOT_FINITE, is_finite, read_at_once, refusal
from ace_ext.engine.matrix_report import Measurements, output_of
from ace_ext.errors import InputError
from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.left_dense import any_of
from ace_ext.models.lockstep import forwards_fit, keeps_no_state
from ace_ext.models.order import calls_in
from ace_ext.models.replay import BlockCall, run_block, run_until_called
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.masks import as_rows, keep_budget, prune_weight_, scored_weight
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.statistics import LinearStatistics, StatisticsCollector
from ace_ext.records import BlockReport, MatrixReport, PruneReport


class Steps:
    """The state of one walk over a model's blocks, and its steps.

    Args:
        blocks: provides the blocks with their weights.
        calls: the arguments with which each batch enters the blocks.
        hidden: the batches' hidden states before the current block; None with statistics from a file.
        config: the configuration of the run.
        report: gets the report of each block.
        context: the optional services of the run.
        callback: called after each block with its report.
    """

    def __init__(
        self,
        blocks: BlockSource,
        calls: list[BlockCall],
        hidden: HiddenStates | None,
        config: PruneConfig,
        report: PruneReport,
        context: RunContext | None = None,
        callback: Callable[[BlockReport], None] | None = None,
    ) -> None:
        self.blocks, self.calls, self.config, self.report = blocks, calls, config, report
        self._hidden = hidden
        self.context = context or RunContext()
        self.callback = callback
        self.needs = config.needs.prune if self.context.sink is None else config.needs.kept
        self.device = self.context.device or torch.device("cpu")
        self.keeps: list[dict[str, int]] | None = None
        """How many weights of a row to keep, by block and Linear; None: as the sparsity says."""
        self.measurements = Measurements()
        self._finite: list[Tensor] = []
        self.dense: HiddenStates | None = None
        """The dense model's hidden states, the targets of training."""

    @property
    def hidden(self) -> HiddenStates:
        """The batches' hidden states before the current block."""
        assert self._hidden is not None  # a walk with statistics from a file never reads them
        return self._hidden

    def collector(self, linears: dict[str, nn.Linear]) -> StatisticsCollector:
        """A collector of the kinds of statistics that this run needs."""
        batches = len(self.calls) * self.context.peers.size
        return StatisticsCollector(linears, self.needs, batches, self.config.token_norm)

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
        hidden = hidden or self.hidden
        collector = self.collector({child: block.linears[child] for child in children})
        collector.alone = self.repeated(block, index)
        again = collector.alone.intersection(children)  # their first call is not the last
        collector.needs = needs or collector.needs
        with collector:
            for i, call in enumerate(self.calls):
                collector.token_mask = call.token_mask
                with self.naming(block, index, i, hidden):
                    if advance or again:
                        output = run_block(block, hidden[i], call.others[index])
                    else:
                        run_until_called(block, hidden[i], call.others[index], children)
                if advance:
                    self.put(block, index, i, output, hidden)
        self.check_outputs(block)
        return self.complete(block, collector)

    def complete(self, block: Block, collector: StatisticsCollector) -> dict[str, LinearStatistics]:
        """The statistics of all of a collector's Linears over all processes, by name.

        Raises:
            InputError: a Linear saw no token (see :meth:`check_seen`).
        """
        children = list(collector.linears)
        self.context.peers.merge_(collector.stats, children, collector.empty)
        for child in children:
            self.check_seen(block, child, collector)
        return collector.stats

    def put(self, block: Block, index: int, i: int, output: Tensor, hidden: HiddenStates | None = None) -> None:
        """Makes a block's output for batch ``i`` the next block's input, in the walk's hidden states or in others. Once
        all are put, :meth:`check_outputs` is to be called.

        Raises:
            InputError: as :meth:`check_outputs`, on the CPU, where nothing has to be waited for. The block's input is
                still there, so the message also names the module in which the numbers arise.
        """
        self.settle()  # the states that are replaced may be on their way to the disk
        hidden, call = hidden or self.hidden, self.calls[i]
        finite = is_finite(output, call.token_mask)
        if read_at_once(finite) and not bool(finite):
            raise refusal(block, NOT_FINITE, (hidden[i], call.others[index]))
        self._finite.append(finite)
        hidden.put(i, output)

    def check_outputs(self, block: Block) -> None:
        """Checks the outputs that were put: one read of a GPU for all batches.

        Raises:
            InputError: one of them holds NaN or infinity in a token that is no padding; all that follows would.
        """
        finite, self._finite = self._finite, []
        if finite and not bool(torch.stack(finite).all()):
            raise refusal(block, NOT_FINITE)

    @contextmanager
    def naming(self, block: Block, index: int, i: int, hidden: HiddenStates | None = None) -> Iterator[None]:
        """Within this context an op that refuses what a Linear of the block gets from batch ``i`` raises
        :class:`InputError`, which names the module whose output is not finite."""
        try:
            yield
        except InputError:
            raise
        except ValueError as error:
            raise refusal(block, f"{error}", ((hidden or self.hidden)[i], self.calls[i].others[index])) from error

    def statistics_of(self, block: Block, index: int, *, advance: bool) -> dict[str, LinearStatistics]:
        """Statistics of all Linears of a dense block: read from a file, or collected (and stored if the run saves its
        statistics)."""
        if self.context.source is not None:
            return self.context.source.block(block.name, block.linears, self.device)
        stats = self.collect(block, index, list(block.linears), advance=advance)
        if self.context.sink is not None:
            self.context.sink.block(block.name, stats)
        return stats

    def advance(self, block: Block, index: int, collector: StatisticsCollector | None = None) -> None:
        """Runs every batch through the block with its present weights; the outputs become the next block's inputs."""
        for i, call in enumerate(self.calls):
            if collector is not None:
                collector.token_mask = call.token_mask
            with self.naming(block, index, i):
                output = run_block(block, self.hidden[i], call.others[index])
            self.put(block, index, i, output)
        self.check_outputs(block)

    def repeated(self, block: Block, index: int) -> frozenset[str]:
        """The Linears that a call of the block calls more than once."""
        uses = self.context.uses.get(block.name)
        if uses is None:  # the block was not tried in its model
            uses = calls_in(block, self.hidden[0], self.calls[0].others[index])
            self.context.uses = {**self.context.uses, block.name: uses}
        return frozenset(child for child, count in uses.items() if count > 1)

    def check_seen(self, block: Block, child: str, collector: StatisticsCollector) -> None:
        """Gives a Linear that saw no token empty statistics: an expert is then pruned by magnitude, any other stays
        dense.

        Raises:
            InputError: its scores would be compared with those of other matrices.
        """
        if child in collector.stats and collector.stats[child].tokens:
            return
        compared = self.config.comparison.over_matrices or self.config.allocation != "uniform"
        if compared:
            found = "saw no calibration token; give more or other calibration text, or skip it"
            if not block.is_expert(child):
                found = f"is not used by a text call, so it has no scores; leave it dense: --skip {any_of([child])}"
            raise InputError(f"{block.full_name(child)} {found} (skip= in Python)")
        collector.stats[child] = collector.empty(child)

    def can_take_turns(self, block: Block, index: int) -> bool:
        """Whether the block can be pruned in lockstep: what the batches' unfinished forwards hold fits into memory, the
        block calls each Linear once and with its bias, and no module of it keeps state of its own (tried once for each
        kind of block)."""
        fits = self.context.keeps_forwards
        if fits is None:
            fits = forwards_fit(block, self.hidden, self.device)
        if not fits or block.leaves_biases or self.repeated(block, index):
            return False
        kind = tuple((name, type(module)) for name, module in block.module.named_modules())
        if kind not in self.context.stateless:
            some = (0, len(self.calls) - 1)
            calls, hidden = [self.calls[i] for i in some], [self.hidden[i] for i in some]
            self.context.stateless[kind] = keeps_no_state(block, index, calls, hidden)
        return self.context.stateless[kind]

    def prune_stage(
        self, block: Block, index: int, stats: dict[str, LinearStatistics]
    ) -> dict[str, MatrixReport | None]:
        """Prunes the Linears of these statistics, by name; each one's statistics are freed once it is pruned."""
        return {child: self.prune_matrix(block, index, child, stats.pop(child)) for child in list(stats)}

    def prune_matrix(self, block: Block, index: int, child: str, stats: LinearStatistics) -> MatrixReport | None:
        """Prunes one Linear's weight and measures the change of its output. None for one that saw no token and is no
        expert; it stays dense.

        Raises:
            InputError: as :func:`ace_ext.pruning.prune_linear.prune_linear_`, with the matrix's name.
        """
        weight = block.linears[child].weight
        name = block.full_name(child)
        keep_row = None if self.keeps is None else self.keeps[index][child]
        if not stats.tokens:
            return self._prune_unseen(name, weight) if block.is_expert(child) else None
        dense = output_of(stats, weight)
        try:
            solution = prune_linear_(weight, stats, self.config, keep_row, self.context.peers)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        report = self.measurements.measure(name, weight, stats, dense, keep_budget(weight, self.config, keep_row))
        report.solution = solution
        return report

    def _prune_unseen(self, name: str, weight: torch.Tensor) -> MatrixReport:
        """Prunes an expert's weight by magnitude, because no token was routed to it."""
        config = PruneConfig("magnitude", self.config.sparsity, self.config.pattern, self.config.group)
        with as_rows(weight) as rows:
            prune_weight_(scored_weight(rows, None, config), config)
        return self.measurements.unseen(name, weight, keep_budget(weight, config))

    def check_finite(self, where: str, weights: Iterable[Tensor]) -> None:
        """Reads the GPUs' flags for non-finite values, once per block. On the CPU the ops themselves raise.

        Args:
            where: what was pruned, for the message.
            weights: its weights; with a ``device_map`` they may lie on other GPUs than the run's.

        Raises:
            InputError: an op met NaN, infinity or an overflow.
        """
        devices = dict.fromkeys([self.device, *(weight.device for weight in weights)])
        # Every flag is read, and so cleared, before the first is reported.
        for op in filter(None, [ops.take_not_finite(device) for device in devices]):
            raise InputError(f"{where}: {op} met NaN, infinity or an overflow in activations or scores")

    def finish(
        self, block: Block, block_report: BlockReport, commits: Sequence[Callable[[], None]] | None = ()
    ) -> None:
        """Reports a block and records it as done, once ``commits`` have brought the hidden states to the disk; None:
        they stay in memory this time."""
        context = self.context
        self.report.blocks.append(block_report)
        if context.journal is not None:
            if context.peers.size > 1:  # first those of all ranks: the state on the disk counts on them
                for commit in commits or ():
                    commit()
                commits = ()
            layouts = context.peers.gather(None if self._hidden is None else vars(self._hidden.layout))
            context.journal.block_done(block, block_report, dict(enumerate(layouts)), commits)
            if context.peers.size > 1:  # no rank may overwrite hidden states before the state on the disk is updated
                self.settle()
                context.peers.wait()
        context.observer.block(block_report, self.report)
        if self.callback is not None:
            self.callback(block_report)

    def settle(self) -> None:
        """Waits until all finished blocks are recorded."""
        if self.context.journal is not None:
            self.context.journal.settle()
