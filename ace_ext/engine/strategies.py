"""The ways to prune a block, one function each: ``strategy(walk, block, index)`` returns the report of each matrix.

Each also puts the block's outputs, so that they become the next block's inputs.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby

from torch import Tensor, nn

from ace_ext.engine.matrix_report import output_of
from ace_ext.engine.steps import Steps
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.lockstep import Lockstep
from ace_ext.models.replay import run_block
from ace_ext.ops import ScoredWeight
from ace_ext.pruning.masks import as_rows, prune_model_wide_, scored_weight
from ace_ext.pruning.statistics import LinearStatistics, StatisticsCollector
from ace_ext.records import BlockReport, MatrixReport

Strategy = Callable[[Steps, Block, int], dict[str, MatrixReport | None]]
"""``(walk, block, index of the block) -> reports by the Linears' names in the block``; None: it stayed dense."""


def choose(walk: Steps, block: Block, index: int) -> Strategy:
    """The strategy for a block. It depends on the source of the statistics, the order, the number of batches, and on
    whether the block calls a Linear more than once."""
    if walk.context.source is not None or walk.config.order == "block":
        return prune_dense
    if len(walk.calls) == 1 and walk.context.peers.size == 1 and not walk.repeated(block, index):
        return prune_in_one_forward
    return prune_in_turns


def prune_block(walk: Steps, block: Block, index: int, block_report: BlockReport) -> None:
    """Prunes a block's matrices by the run's strategy, and puts the block's outputs."""
    matrices = choose(walk, block, index)(walk, block, index)
    walk.measurements.read_()
    block_report.matrices.extend(filter(None, (matrices[child] for child in block.linears)))


def prune_dense(walk: Steps, block: Block, index: int) -> dict[str, MatrixReport | None]:
    """Order block: collects all statistics from the dense block, prunes it, and runs the pruned block.

    If the run saves its statistics, the dense block's outputs become the next block's inputs instead: saved statistics
    must not depend on the sparsity of the run that saved them. With statistics from a file no forward pass is run.
    """
    keeps_dense = walk.context.sink is not None
    stats = walk.statistics_of(block, index, advance=keeps_dense)
    done = {child: walk.prune_matrix(block, index, child, stats.pop(child)) for child in block.linears}
    if not keeps_dense and walk.context.source is None:
        walk.advance(block, index)
    return done


def prune_in_one_forward(walk: Steps, block: Block, index: int) -> dict[str, MatrixReport | None]:
    """Order sequential, all tokens in one batch: hooks prune each Linear when it is called.

    The Linear returns the output of its pruned weight, so one forward pass collects statistics, prunes, and computes
    the next block's inputs. If the statistics do not read the dense output, the Linear is pruned before its forward,
    which then runs only once.
    """
    collector = walk.collector(block.linears)
    done: dict[str, MatrixReport | None] = {}

    def prune(child: str, x: Tensor, output: Tensor | None) -> None:
        collector.observe(child, x, output)
        if child in done:  # not in the sample that repeated() tried
            raise InputError(
                f"{block.full_name(child)} is called twice in its block; write collect(order=block) in the method"
            )
        if collector.stats[child].tokens:
            done[child] = walk.prune_matrix(block, index, child, collector.stats.pop(child))

    def before(child: str, x: Tensor) -> None:
        prune(child, x, None)

    def after(child: str, x: Tensor, output: Tensor) -> Tensor:
        prune(child, x, output)
        return _output_of(block.linears[child], x)

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


def prune_in_turns(walk: Steps, block: Block, index: int) -> dict[str, MatrixReport | None]:
    """Order sequential, several batches or processes: in lockstep if it can be, else by stages. The weights get the
    same bytes either way."""
    stages, complete = _stages(walk, block, index)
    complete = complete and bool(stages)
    if all(walk.context.peers.gather(complete and walk.can_take_turns(block, index))):
        return prune_in_lockstep(walk, block, index, _one_by_one(block, stages))
    return prune_by_stages(walk, block, index, stages)


def prune_in_lockstep(walk: Steps, block: Block, index: int, stages: list[list[str]]) -> dict[str, MatrixReport | None]:
    """All batches go on to their next Linear, the first stage that one of them has come to is pruned, and so on: one
    forward pass of each batch in all."""
    done: dict[str, MatrixReport | None] = {}
    place = {child: number for number, stage in enumerate(stages) for child in stage}
    forwards = [
        lambda i=i, call=call: run_block(block, walk.hidden[i], call.others[index]) for i, call in enumerate(walk.calls)
    ]
    with Lockstep(block, forwards, walk.device) as lockstep:
        ready = [*range(len(forwards))]
        while True:
            for i in ready:
                output = lockstep.run(i)
                if output is not None:
                    walk.put(block, index, i, output)
            stops = [(i, stop) for i in range(len(forwards)) if (stop := lockstep.stop_of(i)) is not None]
            first = min((place[child] for _, (child, _) in stops), default=len(stages))
            first = min(walk.context.peers.gather(first))
            if first == len(stages):
                break
            stage = stages[first]
            if stage[0] in done:
                raise InputError(
                    f"{block.full_name(stage[0])} is called twice in its block, or in another order by a later batch; "
                    "write collect(order=block) in the method"
                )
            collector = walk.collector({child: block.linears[child] for child in stage})
            ready = []
            for i, (child, x) in stops:
                if place[child] == first:
                    ready.append(i)
                    with walk.naming(block, index, i):
                        _observe(collector, stage, x, walk.calls[i].token_mask)
                    lockstep.admit(i, stage, x)
            del stops  # and so the inputs
            done |= walk.prune_stage(block, index, walk.complete(block, collector))
    walk.check_outputs(block)
    for stage in stages:
        if stage[0] not in done:  # experts that no token was routed to
            collector = walk.collector({child: block.linears[child] for child in stage})
            done |= walk.prune_stage(block, index, walk.complete(block, collector))
    return done


def _observe(collector: StatisticsCollector, stage: list[str], x: Tensor, token_mask: Tensor | None) -> None:
    """Adds one input of the Linears of a stage, which have not run yet."""
    collector.token_mask = token_mask
    for child in stage:
        collector.observe(child, x, _output_of(collector.linears[child], x) if collector.wants_output else None)


def _output_of(linear: nn.Linear, x: Tensor) -> Tensor:
    """The output ``[..., d_out]`` for ``x [..., d_in]``, with the present weight; no hook is called."""
    output: Tensor = linear.forward(x)
    return output


def prune_by_stages(walk: Steps, block: Block, index: int, stages: list[list[str]]) -> dict[str, MatrixReport | None]:
    """Each stage takes a forward pass of all batches, up to its last Linear; one more puts the outputs."""
    done: dict[str, MatrixReport | None] = {}
    for stage in stages:
        done |= walk.prune_stage(block, index, walk.collect(block, index, stage, advance=False))
    walk.advance(block, index)
    return done


def _one_by_one(block: Block, stages: list[list[str]]) -> list[list[str]]:
    """The stages with fused experts taken apart, as a forward calls them: one expert's matrices, then the next's."""
    number = {child: expert for fused in block.experts for expert, child in enumerate(fused.linears)}
    owner = {child: id(fused.owner) for fused in block.experts for child in fused.linears}
    found: list[list[str]] = []
    for mixture, group in groupby(stages, key=lambda stage: owner.get(stage[0])):
        if mixture is None:
            found.extend(group)
        else:  # sorting keeps the order of one expert's matrices
            found.extend(
                [child] for child in sorted((child for stage in group for child in stage), key=number.__getitem__)
            )
    return found


def _stages(walk: Steps, block: Block, index: int) -> tuple[list[list[str]], bool]:
    """The block's Linears in the order in which the first batch calls them, grouped by the tensor that they read. Those
    of fused experts are grouped by the weight tensor that they are part of. And whether the batch called all: if not,
    the others are the last stage."""
    stages: list[list[str]] = []
    last: list[Tensor] = []
    together = {child: stage for stage in block.expert_stages() for child in stage}
    repeated = walk.repeated(block, index)

    def note(child: str, x: Tensor) -> None:
        if child in repeated:
            if [child] not in stages:
                stages.append([child])
            last.clear()
            return
        if child not in together and any(child in stage for stage in stages):
            raise InputError(
                f"{block.full_name(child)} is called twice in its block; write collect(order=block) in the method"
            )
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
    unseen = [child for child in block.linears if child not in called]  # a later batch may call them
    stages = [*stages, unseen] if unseen else stages
    first: list[list[str]] = walk.context.peers.gather(stages)[0]  # with experts ranks may differ: rank 0 decides
    return first, not unseen


def prune_whole_model(walk: Steps) -> None:
    """Group model: collects the statistics of all dense blocks, then prunes all weights by one threshold."""
    pending: list[tuple[Block, str, LinearStatistics, ScoredWeight]] = []
    seconds = []
    written_back = ExitStack()
    for index, block in enumerate(walk.blocks.blocks):
        start = time.perf_counter()
        stats = walk.statistics_of(block, index, advance=True)
        if walk.context.source is None:
            walk.hidden.commit()
        for child, linear in block.linears.items():
            rows = written_back.enter_context(as_rows(linear.weight))
            pending.append((block, child, stats[child], scored_weight(rows, stats[child], walk.config)))
        seconds.append(time.perf_counter() - start)
    dense = [output_of(stats, scored.weight) for _, _, stats, scored in pending]
    with written_back:
        prune_model_wide_([scored for *_, scored in pending], walk.config.sparsity)
    weights = [block.linears[child].weight for block, child, *_ in pending]
    walk.check_finite("model", weights)
    walk.context.peers.check_same(weights, "model")
    blocks = walk.blocks.blocks
    reports = {block.name: BlockReport(block.name, s) for block, s in zip(blocks, seconds, strict=True)}
    for (block, child, stats_of_child, _), weight, before in zip(pending, weights, dense, strict=True):
        matrix = walk.measurements.measure(block.full_name(child), weight, stats_of_child, before, None)
        reports[block.name].matrices.append(matrix)
    walk.measurements.read_()
    for block in blocks:
        walk.finish(block, reports[block.name])
