"""The pruning loop: block by block, statistics, masks, and on to the next block with the pruned one's output."""

import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from . import ops
from .config import PruneConfig
from .errors import InputError
from .masks import ScoredWeight, keep_budget, prune_model_wide_, scored_weight
from .model_walk import Block, BlockCall, capture_calls, find_blocks, run_block
from .report import BlockReport, MatrixReport, PruneReport, peak_memory_bytes, versions
from .solvers import prune_linear_
from .statistics import LinearStatistics, StatisticsCollector

Batches = Tensor | Iterable[Tensor | dict[str, Tensor]]


@torch.no_grad()
def prune_model(
    model: nn.Module,
    batches: Batches,
    config: PruneConfig | None = None,
    *,
    callback: Callable[[BlockReport], None] | None = None,
    progress: bool = False,
) -> PruneReport:
    """Prunes the Linears of a causal language model's decoder blocks in place.

    Args:
        model: a Hugging Face causal language model, wherever its weights are. LM head and embeddings are left alone.
        batches: calibration tokens: ``[nsamples, seqlen]`` integer, or an iterable of such tensors or of dicts with
            ``input_ids`` and ``attention_mask`` (padded tokens then do not count).
        config: what to prune and how; default :class:`PruneConfig`.
        callback: called after each block with its report.
        progress: a bar on stderr.

    Returns:
        A :class:`PruneReport`: for each matrix the number kept and what it did to the output.

    Raises:
        InputError: for a model, tokens or weights that cannot be pruned. Everything that can be known before the first
            block is checked before any weight changes.
    """
    config = config or PruneConfig()
    start = time.perf_counter()
    blocks = find_blocks(model, config.skip)
    _check_pattern(blocks, config)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        calls = capture_calls(model, blocks, _as_batches(batches, config.batch_tokens, device))
        if not calls:
            raise InputError("calibration must have at least one token (got none)")
        report = PruneReport(config.to_dict(), str(device), str(next(model.parameters()).dtype).removeprefix("torch."))
        _Loop(blocks, calls, config, report, callback).run(progress)
    finally:
        model.train(training)
    report.seconds = time.perf_counter() - start
    report.peak_memory_bytes = peak_memory_bytes(device)
    report.versions = versions()
    return report


def _check_pattern(blocks: list[Block], config: PruneConfig) -> None:
    if config.pattern is None:
        return
    for block in blocks:
        for child, linear in block.linears.items():
            if linear.in_features % config.pattern.group_m:
                raise InputError(
                    f"pattern {config.pattern} needs columns in whole groups of {config.pattern.group_m} "
                    f"(got {linear.in_features} in {block.full_name(child)}); choose another pattern, or skip it"
                )


def _as_batches(batches: Batches, batch_tokens: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Dicts on the device, cut to at most ``batch_tokens`` tokens each (at least one sample)."""
    if isinstance(batches, Tensor):
        if batches.dim() != 2:
            raise InputError(f"calibration tokens must be [nsamples, seqlen] (got shape {list(batches.shape)})")
        batches = batches.split(max(1, batch_tokens // max(1, batches.shape[1])))
    result = []
    for batch in batches:
        batch = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        if batch["input_ids"].numel():
            result.append({name: value.to(device) for name, value in batch.items()})
    return result


class _Loop:
    """The state that moves from block to block: each batch's hidden states."""

    def __init__(
        self,
        blocks: list[Block],
        calls: list[BlockCall],
        config: PruneConfig,
        report: PruneReport,
        callback: Callable[[BlockReport], None] | None,
    ) -> None:
        self.blocks, self.calls, self.config, self.report, self.callback = blocks, calls, config, report, callback
        self.needs = config.needs

    def run(self, progress: bool) -> None:
        if self.config.group == "model":
            return self._run_model_wide(progress)
        with self._bar(progress) as bar:
            for index, block in enumerate(self.blocks):
                start = time.perf_counter()
                block_report = BlockReport(block.name, 0.0)
                if self.config.order == "block":
                    self._prune_dense(index, block_report)
                elif len(self.calls) == 1:
                    self._prune_in_one_forward(index, block_report)
                else:
                    self._prune_by_stages(index, block_report)
                self._check_finite(block.name)
                block_report.seconds = time.perf_counter() - start
                self._finish(block_report, bar)
        return None

    # Order block: all statistics from the dense block, then masks, then on with the pruned block.

    def _prune_dense(self, index: int, block_report: BlockReport) -> None:
        block = self.blocks[index]
        collector = self._collect(index, block.linears, advance=False)
        for child in block.linears:
            block_report.matrices.append(self._prune(block, child, self._stats_of(block, child, collector)))
        self._advance(index)

    # Order sequential, all tokens in one batch: each Linear is pruned the moment it is called and answers with its
    # pruned output, so that one forward serves statistics, masks and propagation.

    def _prune_in_one_forward(self, index: int, block_report: BlockReport) -> None:
        block = self.blocks[index]
        collector = self._collector(block.linears)
        done: dict[str, MatrixReport] = {}

        def prune_and_answer(child: str, x: Tensor, output: Tensor) -> Tensor | None:
            collector.observe(child, x, output)
            if child in done:
                raise InputError(f"{block.full_name(child)} is called twice in its block; use order='block'")
            if collector.stats[child].tokens == 0:
                return None
            done[child] = self._prune(block, child, collector.stats[child])
            linear = block.linears[child]
            return functional.linear(x, linear.weight, linear.bias)

        handles = [
            linear.register_forward_hook(lambda _, args, output, child=child: prune_and_answer(child, args[0], output))
            for child, linear in block.linears.items()
        ]
        try:
            self._advance(index, collector)
        finally:
            for handle in handles:
                handle.remove()
        for child in block.linears:
            self._stats_of(block, child, collector)
        block_report.matrices.extend(done[child] for child in block.linears)

    # Order sequential, several batches: Linears that share an input make a stage; a forward of all batches for each.

    def _prune_by_stages(self, index: int, block_report: BlockReport) -> None:
        block = self.blocks[index]
        done: dict[str, MatrixReport] = {}
        for stage in self._stages(index):
            linears = {child: block.linears[child] for child in stage}
            collector = self._collect(index, linears, advance=False)
            for child in stage:
                done[child] = self._prune(block, child, self._stats_of(block, child, collector))
        block_report.matrices.extend(done[child] for child in block.linears)
        self._advance(index)

    def _stages(self, index: int) -> list[list[str]]:
        """The block's Linears in the order in which the first batch calls them, grouped by the tensor they read."""
        block, call = self.blocks[index], self.calls[0]
        stages: list[list[str]] = []
        last: list[Tensor] = []

        def note(child: str, x: Tensor) -> None:
            if last and last[0] is x:
                stages[-1].append(child)
            else:
                stages.append([child])
            last[:] = [x]

        handles = [
            linear.register_forward_pre_hook(lambda _, args, child=child: note(child, args[0]))
            for child, linear in block.linears.items()
        ]
        try:
            run_block(block, call.hidden, call.others[index])
        finally:
            for handle in handles:
                handle.remove()
        called = {child for stage in stages for child in stage}
        unseen = [child for child in block.linears if child not in called]  # perhaps by a later batch
        return [*stages, unseen] if unseen else stages

    # Group model: every block stays dense until all statistics are in, then one cut over all weights.

    def _run_model_wide(self, progress: bool) -> None:
        pending: list[tuple[Block, str, LinearStatistics, ScoredWeight]] = []
        seconds = []
        with self._bar(progress) as bar:
            for index, block in enumerate(self.blocks):
                start = time.perf_counter()
                collector = self._collect(index, block.linears, advance=True)
                for child, linear in block.linears.items():
                    stats = self._stats_of(block, child, collector)
                    pending.append((block, child, stats, scored_weight(linear.weight, stats, self.config)))
                seconds.append(time.perf_counter() - start)
                bar.update()
        dense = [self._dense_output(stats, scored.weight) for _, _, stats, scored in pending]
        prune_model_wide_([scored for *_, scored in pending], self.config.sparsity)
        self._check_finite("model")
        reports = {block.name: BlockReport(block.name, s) for block, s in zip(self.blocks, seconds, strict=True)}
        for (block, child, stats, scored), before in zip(pending, dense, strict=True):
            keep = int(scored.weight.count_nonzero())
            matrix = self._measure(block.full_name(child), scored.weight, stats, before, keep)
            reports[block.name].matrices.append(matrix)
        for block_report in reports.values():
            self._finish(block_report, None)

    # Shared steps

    def _collector(self, linears: dict[str, nn.Linear]) -> StatisticsCollector:
        return StatisticsCollector(linears, self.needs, len(self.calls))

    def _collect(self, index: int, linears: dict[str, nn.Linear], *, advance: bool) -> StatisticsCollector:
        """Statistics of the named Linears over all batches; with ``advance`` the outputs go on to the next block."""
        block = self.blocks[index]
        with self._collector(linears) as collector:
            for call in self.calls:
                collector.token_mask = call.token_mask
                output = run_block(block, call.hidden, call.others[index])
                if advance:
                    call.hidden = output
        return collector

    def _advance(self, index: int, collector: StatisticsCollector | None = None) -> None:
        for call in self.calls:
            if collector is not None:
                collector.token_mask = call.token_mask
            call.hidden = run_block(self.blocks[index], call.hidden, call.others[index])

    def _stats_of(self, block: Block, child: str, collector: StatisticsCollector) -> LinearStatistics:
        stats = collector.stats.get(child)
        if stats is None or stats.tokens == 0:
            raise InputError(
                f"{block.full_name(child)} saw no calibration token; give more or other calibration text, or skip it"
            )
        return stats

    def _prune(self, block: Block, child: str, stats: LinearStatistics) -> MatrixReport:
        weight = block.linears[child].weight
        name = block.full_name(child)
        dense = self._dense_output(stats, weight)
        try:
            solution = prune_linear_(weight, stats, self.config)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        report = self._measure(name, weight, stats, dense, keep_budget(weight, self.config))
        report.solution = solution
        return report

    def _check_finite(self, where: str) -> None:
        """Asks the GPU, once a block, whether an op met something not finite; on the CPU ops raise themselves."""
        op = ops.take_not_finite(self.calls[0].hidden.device)
        if op:
            raise InputError(f"{where}: {op} met NaN, infinity or an overflow in activations or scores")

    @staticmethod
    def _dense_output(stats: LinearStatistics, weight: Tensor) -> Tensor:
        """``[tokens, d_out]``: the dense outputs of the probe tokens, without bias."""
        return functional.linear(torch.cat(stats.probe), weight)

    @staticmethod
    def _measure(name: str, weight: Tensor, stats: LinearStatistics, dense: Tensor, keep: int) -> MatrixReport:
        nonzero = int(weight.count_nonzero())
        if nonzero < keep:  # the mask keeps zeros of the dense weight; +0.0 only, here too
            weight.masked_fill_(weight == 0, 0.0)
        before = dense.float()
        after = functional.linear(torch.cat(stats.probe), weight).float()
        error = float((after - before).norm() / before.norm().clamp_min(torch.finfo(torch.float32).tiny))
        cosine = float(functional.cosine_similarity(before, after, dim=1).mean())
        return MatrixReport(name, tuple(weight.shape), keep, nonzero, stats.tokens, error, cosine)

    def _bar(self, progress: bool) -> tqdm:
        return tqdm(total=len(self.blocks), desc="pruning", unit="block", disable=not progress, file=sys.stderr)

    def _finish(self, block_report: BlockReport, bar: tqdm | None) -> None:
        self.report.blocks.append(block_report)
        if bar is not None:
            bar.set_postfix(sparsity=f"{self.report.sparsity:.3f}", refresh=False)
            bar.update()
        if self.callback is not None:
            self.callback(block_report)
