"""The pruning loop: block by block, statistics, masks, and on to the next block with the pruned one's output."""

import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext import ops
from ace_ext.engine.distributed import Alone, Peers
from ace_ext.engine.hidden_states import HiddenStates
from ace_ext.engine.progress import Progress
from ace_ext.errors import InputError
from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.models.replay import BlockCall, run_block
from ace_ext.pruning.allocation import allocate, measure_block, measure_needs
from ace_ext.pruning.block_tuning import tune_block_
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.masks import ScoredWeight, count_kept, keep_budget, prune_model_wide_, prune_weight_, scored_weight
from ace_ext.pruning.solvers import prune_linear_
from ace_ext.pruning.statistics import LinearStatistics, StatisticsCollector
from ace_ext.records import BlockReport, MatrixReport, PruneReport
from ace_ext.runs.statistics_file import SavedStatistics, StatisticsWriter, kept_kinds
from ace_ext.runs.workspace import Workspace


class Loop:
    """One walk over a model's blocks.

    Args:
        source: hands out the blocks with their weights.
        calls: how each batch enters the blocks.
        hidden: the batches' hidden states, which move from block to block; None with ``known`` statistics.
        config, report, callback: as :func:`ace_ext.prune_model` has them.
        progress: told about every block.
        journal: written to after every block, and where an earlier run stopped.
        peers: the other processes of the run.
        keeper: gets the statistics of every block, to be kept. They are the dense model's: the states that go on are
            those of the dense blocks then.
        known: statistics of an earlier run; then nothing is run forward.
    """

    def __init__(
        self,
        source: BlockSource,
        calls: list[BlockCall],
        hidden: HiddenStates | None,
        config: PruneConfig,
        report: PruneReport,
        *,
        callback: Callable[[BlockReport], None] | None = None,
        progress: Progress | None = None,
        journal: Workspace | None = None,
        peers: Peers | None = None,
        keeper: StatisticsWriter | None = None,
        known: SavedStatistics | None = None,
    ) -> None:
        self.source, self.calls, self.hidden, self.config, self.report = source, calls, hidden, config, report
        self.callback, self.progress, self.journal = callback, progress or Progress(), journal
        self.peers, self.keeper, self.known = peers or Alone(), keeper, known
        self.needs = config.needs if keeper is None else kept_kinds(config)
        self.dense: HiddenStates | None = None  # those of the dense model, which tuning aims at
        self.keeps: list[dict[str, int]] | None = None  # by block and Linear, how many weights of a row

    def run(self, device: torch.device) -> None:
        """Prunes every block that is not done yet."""
        self.device = device
        done = self.journal.finished if self.journal else 0
        if self.journal:
            self.report.blocks.extend(self.journal.blocks)
        if self.config.allocation != "uniform":
            self.keeps = self._allocate()
        if self.config.tune_epochs:
            self.dense = self._open_dense()
        tokens = sum(self.peers.gather(sum(call.tokens for call in self.calls)))
        self.progress.start(len(self.source.blocks), done, tokens)
        try:
            if self.config.group == "model":
                self._run_model_wide()
            else:
                for index in range(done, len(self.source.blocks)):
                    self._run_block(index)
        finally:
            self.progress.close()

    def _run_block(self, index: int) -> None:
        start = time.perf_counter()
        with self.source.hold(index) as block:
            block_report = BlockReport(block.name, 0.0)
            if self.dense is None:
                self._prune_block(block, index, block_report)
            else:
                self._prune_and_tune(block, index, block_report)
            self._check_finite(block.name)
            self.peers.check_same([linear.weight for linear in block.linears.values()], block.name)
            for states in (self.hidden, self.dense):
                if states is not None:
                    states.turn()
            block_report.seconds = time.perf_counter() - start
            self._finish(block, block_report)

    def _prune_block(self, block: Block, index: int, block_report: BlockReport) -> None:
        if self.known is not None:
            stats = self.known.block(block.name, block.linears, self.device)
            self._prune_all(block, index, stats, block_report)
        elif self.config.order == "block":
            self._prune_dense(block, index, block_report)
        elif len(self.calls) == 1 and self.peers.size == 1:
            self._prune_in_one_forward(block, index, block_report)
        else:
            self._prune_by_stages(block, index, block_report)

    # Order block: all statistics from the dense block, then masks, then on with the pruned block; where statistics are
    # kept, on with the dense one, since what they say of the next block must not depend on this run's sparsity.

    def _prune_dense(self, block: Block, index: int, block_report: BlockReport) -> None:
        stats = self._collect(block, index, list(block.linears), advance=self.keeper is not None)
        if self.keeper is not None:
            self.keeper.block(block.name, stats)
        self._prune_all(block, index, stats, block_report)
        if self.keeper is None:
            self._advance(block, index)

    def _prune_all(
        self, block: Block, index: int, stats: dict[str, LinearStatistics], block_report: BlockReport
    ) -> None:
        for child in block.linears:
            block_report.matrices.append(self._prune(block, index, child, stats.pop(child)))

    # Order sequential, all tokens in one batch: each Linear is pruned the moment it is called and answers with its
    # pruned output, so that one forward serves statistics, masks and propagation. Where the metric does not ask for the
    # dense output, the Linear is pruned before it computes one.

    def _prune_in_one_forward(self, block: Block, index: int, block_report: BlockReport) -> None:
        collector = self._collector(block.linears)
        done: dict[str, MatrixReport] = {}

        def prune(child: str, x: Tensor, output: Tensor | None) -> None:
            collector.observe(child, x, output)
            if child in done:
                raise InputError(f"{block.full_name(child)} is called twice in its block; use order='block'")
            if collector.stats[child].tokens:
                done[child] = self._prune(block, index, child, collector.stats.pop(child))

        def before(child: str, x: Tensor) -> None:
            prune(child, x, None)

        def after(child: str, x: Tensor, output: Tensor) -> Tensor:
            prune(child, x, output)
            return block.linears[child].forward(x)  # without the hooks

        with ExitStack() as hooks:
            for child, linear in block.linears.items():
                if collector.wants_output:
                    handle = linear.register_forward_hook(lambda _, args, out, child=child: after(child, args[0], out))
                else:
                    handle = linear.register_forward_pre_hook(lambda _, args, child=child: before(child, args[0]))
                hooks.callback(handle.remove)
            self._advance(block, index, collector)
        for child in block.linears:
            if child not in done:
                self._check_seen(block, child, collector)
                done[child] = self._prune(block, index, child, collector.stats.pop(child))
        block_report.matrices.extend(done[child] for child in block.linears)

    # Order sequential, several batches: Linears that share an input make a stage; a forward of all batches for each.

    def _prune_by_stages(self, block: Block, index: int, block_report: BlockReport) -> None:
        done: dict[str, MatrixReport] = {}
        for stage in self._stages(block, index):
            stats = self._collect(block, index, stage, advance=False)
            for child in stage:
                done[child] = self._prune(block, index, child, stats.pop(child))
        block_report.matrices.extend(done[child] for child in block.linears)
        self._advance(block, index)

    def _stages(self, block: Block, index: int) -> list[list[str]]:
        """The block's Linears in the order in which the first batch calls them, grouped by the tensor they read;
        those of fused experts by the tensor that they lie in."""
        stages: list[list[str]] = []
        last: list[Tensor] = []
        together = {child: stage for stage in block.expert_stages() for child in stage}

        def note(child: str, x: Tensor) -> None:
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
            run_block(block, self.hidden[0], self.calls[0].others[index])
        called = {child for stage in stages for child in stage}
        unseen = [child for child in block.linears if child not in called]  # perhaps by a later batch
        stages = [*stages, unseen] if unseen else stages
        return self.peers.gather(stages)[0]  # the first process's, where experts make them differ

    # Group model: every block stays dense until all statistics are in, then one cut over all weights.

    def _run_model_wide(self) -> None:
        pending: list[tuple[Block, str, LinearStatistics, ScoredWeight]] = []
        seconds = []
        for index, block in enumerate(self.source.blocks):
            start = time.perf_counter()
            if self.known is not None:
                stats = self.known.block(block.name, block.linears, self.device)
            else:
                stats = self._collect(block, index, list(block.linears), advance=True)
                self.hidden.turn()
            if self.keeper is not None:
                self.keeper.block(block.name, stats)
            for child, linear in block.linears.items():
                pending.append((block, child, stats[child], scored_weight(linear.weight, stats[child], self.config)))
            seconds.append(time.perf_counter() - start)
        dense = [self._dense_output(stats, scored.weight) for _, _, stats, scored in pending]
        prune_model_wide_([scored for *_, scored in pending], self.config.sparsity)
        self._check_finite("model")
        self.peers.check_same([scored.weight for *_, scored in pending], "model")
        reports = {block.name: BlockReport(block.name, s) for block, s in zip(self.source.blocks, seconds, strict=True)}
        for (block, child, stats, scored), before in zip(pending, dense, strict=True):
            keep = count_kept(scored.weight)
            matrix = self._measure(block.full_name(child), scored.weight, stats, before, keep)
            reports[block.name].matrices.append(matrix)
        for block in self.source.blocks:
            self._finish(block, reports[block.name])

    # Walks beside the pruning one, through dense blocks: to measure what each can give up, and to see what tuning aims
    # at.

    def _allocate(self) -> list[dict[str, int]]:
        """How many weights of a row each matrix keeps; a resumed run reads what the first one found."""
        if self.journal is not None and "keeps" in self.journal.notes:
            return self.journal.notes["keeps"]
        hidden = None if self.known is not None else self.hidden.fork(f"measure-{self.peers.rank}")
        measures, shapes = [], []
        for index in range(len(self.source.blocks)):
            with self.source.hold(index) as block:
                shapes.append({child: tuple(linear.weight.shape) for child, linear in block.linears.items()})
                if self.known is not None:
                    stats = self.known.block(block.name, block.linears, self.device)
                else:
                    needs = measure_needs(self.config)
                    stats = self._collect(block, index, list(block.linears), advance=True, hidden=hidden, needs=needs)
                    hidden.turn()
                measures.append(measure_block(block.linears, stats, self.config))
        if hidden is not None:
            hidden.remove()
        keeps = allocate(measures, self.config, shapes)
        if self.journal is not None:
            self.journal.notes["keeps"] = keeps
        return keeps

    def _open_dense(self) -> HiddenStates:
        """The states of the dense model: the pruned one's where nothing is pruned yet, or what a run left of them."""
        name = f"dense-{self.peers.rank}"
        if self.journal is not None and self.journal.finished:
            return self.hidden.sibling(name)
        return self.hidden.fork(name)

    def _prune_and_tune(self, block: Block, index: int, block_report: BlockReport) -> None:
        inputs = [self.hidden[i] for i in range(len(self.calls))]
        targets = []
        for i, call in enumerate(self.calls):
            targets.append(run_block(block, self.dense[i], call.others[index]))
            self.dense.put(i, targets[-1])
        self._prune_block(block, index, block_report)
        masks = {child: linear.weight != 0 for child, linear in block.linears.items()}
        others = [call.others[index] for call in self.calls]
        block_report.tuning = tune_block_(
            block,
            list(zip(inputs, others, strict=True)),
            targets,
            self.config,
            masks,
            [call.token_mask for call in self.calls],
        )
        for i, hidden in enumerate(inputs):
            self.hidden.put(i, run_block(block, hidden, others[i]))

    # Shared steps

    def _collector(self, linears: dict[str, nn.Linear]) -> StatisticsCollector:
        batches = len(self.calls) * self.peers.size
        return StatisticsCollector(linears, self.needs, batches, self.config.token_norm)

    def _collect(
        self,
        block: Block,
        index: int,
        children: list[str],
        *,
        advance: bool,
        hidden: HiddenStates | None = None,
        needs: frozenset[str] | None = None,
    ) -> dict[str, LinearStatistics]:
        """Statistics of the named Linears over all batches; with ``advance`` the outputs go on to the next block.

        ``hidden`` and ``needs`` are for a walk beside the pruning one, with states and kinds of its own.
        """
        hidden = hidden or self.hidden
        collector = self._collector({child: block.linears[child] for child in children})
        collector.needs = needs or collector.needs
        with collector:
            for i, call in enumerate(self.calls):
                collector.token_mask = call.token_mask
                output = run_block(block, hidden[i], call.others[index])
                if advance:
                    hidden.put(i, output)
        self.peers.merge_(collector.stats, children, collector.empty)
        for child in children:
            self._check_seen(block, child, collector)
        return collector.stats

    def _advance(self, block: Block, index: int, collector: StatisticsCollector | None = None) -> None:
        for i, call in enumerate(self.calls):
            if collector is not None:
                collector.token_mask = call.token_mask
            self.hidden.put(i, run_block(block, self.hidden[i], call.others[index]))

    def _check_seen(self, block: Block, child: str, collector: StatisticsCollector) -> None:
        """That a Linear saw a token. An expert may have seen none: it gets empty statistics and its mask from its
        weights alone, unless these are compared with others'."""
        if child in collector.stats and collector.stats[child].tokens:
            return
        if not block.is_expert(child) or self.config.group == "model" or self.config.allocation != "uniform":
            raise InputError(
                f"{block.full_name(child)} saw no calibration token; give more or other calibration text, or skip it"
            )
        collector.stats[child] = collector.empty(child)

    def _prune(self, block: Block, index: int, child: str, stats: LinearStatistics) -> MatrixReport:
        weight = block.linears[child].weight
        name = block.full_name(child)
        keep = None if self.keeps is None else self.keeps[index][child]
        if not stats.tokens:
            return self._prune_unseen(name, weight)
        dense = self._dense_output(stats, weight)
        try:
            solution = prune_linear_(weight, stats, self.config, keep)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        report = self._measure(name, weight, stats, dense, keep_budget(weight, self.config, keep))
        report.solution = solution
        return report

    def _prune_unseen(self, name: str, weight: Tensor) -> MatrixReport:
        """An expert's weight by magnitude, for want of a token that was sent there."""
        config = PruneConfig(
            metric="magnitude", sparsity=self.config.sparsity, pattern=self.config.pattern, group=self.config.group
        )
        prune_weight_(scored_weight(weight, None, config), config)
        keep = keep_budget(weight, config)
        return MatrixReport(name, tuple(weight.shape), keep, self._count_nonzero(weight, keep), 0, 0.0, 1.0)

    def _check_finite(self, where: str) -> None:
        """Asks the GPU, once a block, whether an op met something not finite; on the CPU ops raise themselves."""
        op = ops.take_not_finite(self.device)
        if op:
            raise InputError(f"{where}: {op} met NaN, infinity or an overflow in activations or scores")

    @staticmethod
    def _dense_output(stats: LinearStatistics, weight: Tensor) -> Tensor:
        """``[tokens, d_out]``: the dense outputs of the probe tokens, without bias."""
        return functional.linear(stats.probe_rows, weight)

    @staticmethod
    def _measure(name: str, weight: Tensor, stats: LinearStatistics, dense: Tensor, keep: int) -> MatrixReport:
        nonzero = Loop._count_nonzero(weight, keep)
        before = dense.float()
        after = functional.linear(stats.probe_rows, weight).float()
        error = float((after - before).norm() / before.norm().clamp_min(torch.finfo(torch.float32).tiny))
        cosine = float(functional.cosine_similarity(before, after, dim=1).mean())
        return MatrixReport(name, tuple(weight.shape), keep, nonzero, stats.tokens, error, cosine)

    @staticmethod
    def _count_nonzero(weight: Tensor, keep: int) -> int:
        nonzero = count_kept(weight)
        if nonzero < keep:  # the mask keeps zeros of the dense weight; +0.0 only, here too
            weight.masked_fill_(weight == 0, 0.0)
        return nonzero

    def _finish(self, block: Block, block_report: BlockReport) -> None:
        self.report.blocks.append(block_report)
        if self.journal is not None:
            layouts = self.peers.gather(None if self.hidden is None else vars(self.hidden.layout))
            self.journal.block_done(block, block_report, dict(enumerate(layouts)))
            self.peers.wait()  # nobody overwrites the states that the state on the disk names
        self.progress.block(block_report, self.report)
        if self.callback is not None:
            self.callback(block_report)
