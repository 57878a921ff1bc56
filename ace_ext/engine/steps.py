"""The steps of a walk that all strategies share: collect statistics, prune a matrix, run the block, report."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ace_ext import ops
from ace_ext.engine.context import RunContext
from ace_ext.engine.matrix_report import count_nonzero_, dense_output, measure
from ace_ext.errors import InputError
from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import BlockCall, run_block
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.masks import keep_budget, prune_weight_, scored_weight
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
        collector.needs = needs or collector.needs
        with collector:
            for i, call in enumerate(self.calls):
                collector.token_mask = call.token_mask
                output = run_block(block, hidden[i], call.others[index])
                if advance:
                    check_finite_output(block, output, call)
                    hidden.put(i, output)
        self.context.peers.merge_(collector.stats, children, collector.empty)
        for child in children:
            self.check_seen(block, child, collector)
        return collector.stats

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
            output = run_block(block, self.hidden[i], call.others[index])
            check_finite_output(block, output, call)
            self.hidden.put(i, output)

    def check_seen(self, block: Block, child: str, collector: StatisticsCollector) -> None:
        """Checks that a Linear saw a token. An expert that saw none gets empty statistics, and is then pruned by
        magnitude.

        Raises:
            InputError: a Linear that is not an expert saw no token; or an expert did, where its scores would be
                compared with those of other matrices.
        """
        if child in collector.stats and collector.stats[child].tokens:
            return
        compared = self.config.comparison.over_matrices or self.config.allocation != "uniform"
        if not block.is_expert(child) or compared:
            raise InputError(
                f"{block.full_name(child)} saw no calibration token; give more or other calibration text, or skip it"
            )
        collector.stats[child] = collector.empty(child)

    def prune_matrix(self, block: Block, index: int, child: str, stats: LinearStatistics) -> MatrixReport:
        """Prunes one Linear's weight and measures the change of its output.

        Raises:
            InputError: as :func:`ace_ext.pruning.prune_linear.prune_linear_`, with the matrix's name.
        """
        weight = block.linears[child].weight
        name = block.full_name(child)
        keep_row = None if self.keeps is None else self.keeps[index][child]
        if not stats.tokens:
            return self._prune_unseen(name, weight)
        dense = dense_output(stats, weight)
        try:
            solution = prune_linear_(weight, stats, self.config, keep_row)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        report = measure(name, weight, stats, dense, keep_budget(weight, self.config, keep_row))
        report.solution = solution
        return report

    def _prune_unseen(self, name: str, weight: torch.Tensor) -> MatrixReport:
        """Prunes an expert's weight by magnitude, because no token was routed to it."""
        config = PruneConfig("magnitude", self.config.sparsity, self.config.pattern, self.config.group)
        prune_weight_(scored_weight(weight, None, config), config)
        keep = keep_budget(weight, config)
        rows, cols = weight.shape
        return MatrixReport(name, (rows, cols), keep, count_nonzero_(weight, keep), 0, 0.0, 1.0)

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

    def finish(self, block: Block, block_report: BlockReport) -> None:
        """Reports a block and records it as done."""
        context = self.context
        self.report.blocks.append(block_report)
        if context.journal is not None:
            layouts = context.peers.gather(None if self._hidden is None else vars(self._hidden.layout))
            context.journal.block_done(block, block_report, dict(enumerate(layouts)))
            context.peers.wait()  # no rank may overwrite hidden states before the state on the disk is updated
        context.observer.block(block_report, self.report)
        if self.callback is not None:
            self.callback(block_report)


def check_finite_output(block: Block, output: torch.Tensor, call: BlockCall) -> None:
    """Raises :class:`InputError` if a block's output ``[batch, seqlen, d_model]`` holds NaN or infinity in a token that
    is no padding: all that follows would."""
    rows = output.flatten(0, 1)
    finite = torch.isfinite(rows).all(dim=1)
    if call.token_mask is not None:
        finite = finite[call.token_mask.to(finite.device)]
    if not bool(finite.all()):
        dtype = str(output.dtype).removeprefix("torch.")
        raise InputError(
            f"{block.name}: its output holds NaN or infinity; a weight in or before it is damaged, or its numbers are "
            f"too large for {dtype}: pass --dtype float32 or bfloat16"
        )
