"""The ways to prune a block, one function each: ``strategy(walk, block, index)`` returns the report of each matrix.

Each leaves the hidden states behind the block in place of those before it.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor

from ace_ext.engine.matrix_report import dense_output, measure
from ace_ext.engine.steps import Steps
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.replay import run_block
from ace_ext.pruning.criteria import ScoredWeight
from ace_ext.pruning.masks import count_kept, prune_model_wide_, scored_weight
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import BlockReport, MatrixReport

Strategy = Callable[[Steps, Block, int], dict[str, MatrixReport]]


def choose(walk: Steps) -> Strategy:
    """The strategy of a run: by where its statistics come from, its order, and whether all tokens fit one batch."""
    if walk.context.source is not None or walk.config.order == "block":
        return prune_dense
    if len(walk.calls) == 1 and walk.context.peers.size == 1:
        return prune_in_one_forward
    return prune_by_stages


def prune_block(walk: Steps, block: Block, index: int, block_report: BlockReport) -> None:
    """Prunes a block's matrices by the strategy that the run asks for, and moves the hidden states on."""
    matrices = choose(walk)(walk, block, index)
    block_report.matrices.extend(matrices[child] for child in block.linears)


def prune_dense(walk: Steps, block: Block, index: int) -> dict[str, MatrixReport]:
    """Order block: all statistics from the dense block, then masks, then on with the pruned block.

    Where statistics are kept, on with the dense one: what they say of the next block must not depend on this run's
    sparsity. With statistics from a file nothing is run forward.
    """
    keeps_dense = walk.context.sink is not None
    stats = walk.statistics_of(block, index, advance=keeps_dense)
    done = {child: walk.prune_matrix(block, index, child, stats.pop(child)) for child in block.linears}
    if not keeps_dense and walk.context.source is None:
        walk.advance(block, index)
    return done


def prune_in_one_forward(walk: Steps, block: Block, index: int) -> dict[str, MatrixReport]:
    """Order sequential, all tokens in one batch: each Linear is pruned the moment it is called and answers with its
    pruned output, so that one forward serves statistics, masks and propagation. Where the metric does not ask for the
    dense output, the Linear is pruned before it computes one."""
    collector = walk.collector(block.linears)
    done: dict[str, MatrixReport] = {}

    def prune(child: str, x: Tensor, output: Tensor | None) -> None:
        collector.observe(child, x, output)
        if child in done:
            raise InputError(f"{block.full_name(child)} is called twice in its block; use order='block'")
        if collector.stats[child].tokens:
            done[child] = walk.prune_matrix(block, index, child, collector.stats.pop(child))

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
        walk.advance(block, index, collector)
    for child in block.linears:
        if child not in done:
            walk.check_seen(block, child, collector)
            done[child] = walk.prune_matrix(block, index, child, collector.stats.pop(child))
    return done


def prune_by_stages(walk: Steps, block: Block, index: int) -> dict[str, MatrixReport]:
    """Order sequential, several batches: Linears that share an input make a stage; a forward of all batches for
    each."""
    done: dict[str, MatrixReport] = {}
    for stage in _stages(walk, block, index):
        stats = walk.collect(block, index, stage, advance=False)
        for child in stage:
            done[child] = walk.prune_matrix(block, index, child, stats.pop(child))
    walk.advance(block, index)
    return done


def _stages(walk: Steps, block: Block, index: int) -> list[list[str]]:
    """The block's Linears in the order in which the first batch calls them, grouped by the tensor they read; those of
    fused experts by the tensor that they lie in."""
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
        run_block(block, walk.hidden[0], walk.calls[0].others[index])
    called = {child for stage in stages for child in stage}
    unseen = [child for child in block.linears if child not in called]  # perhaps by a later batch
    stages = [*stages, unseen] if unseen else stages
    first: list[list[str]] = walk.context.peers.gather(stages)[0]  # rank 0's, where experts make them differ
    return first


def prune_whole_model(walk: Steps) -> None:
    """Group model: every block stays dense until all statistics are in, then one threshold over all weights."""
    pending: list[tuple[Block, str, LinearStatistics, ScoredWeight]] = []
    seconds = []
    for index, block in enumerate(walk.blocks.blocks):
        start = time.perf_counter()
        stats = walk.statistics_of(block, index, advance=True)
        if walk.context.source is None:
            walk.hidden.commit()
        for child, linear in block.linears.items():
            pending.append((block, child, stats[child], scored_weight(linear.weight, stats[child], walk.config)))
        seconds.append(time.perf_counter() - start)
    dense = [dense_output(stats, scored.weight) for _, _, stats, scored in pending]
    prune_model_wide_([scored for *_, scored in pending], walk.config.sparsity)
    walk.check_finite("model")
    walk.context.peers.check_same([scored.weight for *_, scored in pending], "model")
    blocks = walk.blocks.blocks
    reports = {block.name: BlockReport(block.name, s) for block, s in zip(blocks, seconds, strict=True)}
    for (block, child, stats_of_child, scored), before in zip(pending, dense, strict=True):
        keep = count_kept(scored.weight)
        matrix = measure(block.full_name(child), scored.weight, stats_of_child, before, keep)
        reports[block.name].matrices.append(matrix)
    for block in blocks:
        walk.finish(block, reports[block.name])
