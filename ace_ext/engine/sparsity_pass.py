"""The extra pass over the dense blocks that measures each one, to divide the sparsity among them."""

from collections.abc import Callable

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.collection import Collection, check_all_seen
from ace_ext.engine.entrances import Entrances
from ace_ext.engine.strategies import RunSizes
from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.pruning.allocation import allocate, outlier_share
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.statistics import LinearStatistics

Keeps = list[dict[str, int]]
"""How many weights of a row each matrix keeps, by block and the Linear's name in it."""


def allocate_sparsity(
    blocks: BlockSource,
    config: PruneConfig,
    statistics: Callable[[Block, int], dict[str, LinearStatistics]],
    enter: Callable[[int], None] = lambda index: None,
) -> Keeps:
    """How many weights of a row each matrix keeps.

    Args:
        blocks: dense.
        config: of the run.
        statistics: of a dense block and its index.
        enter: is called with the index of a block before its weights are loaded.
    """
    measures, shapes = [], []
    for index in range(len(blocks.blocks)):
        enter(index)
        with blocks.loaded(index) as block:
            shapes.append({child: (linear.out_features, linear.in_features) for child, linear in block.linears.items()})
            stats = statistics(block, index)
            check_all_seen(block, stats)
            measures.append(outlier_share(block.linears, stats, config))
    return allocate(measures, config, shapes)


def measured_by_forwards(
    blocks: BlockSource,
    config: PruneConfig,
    states: BatchStates,
    collection: Collection,
    rank: int,
    entrances: Entrances | None = None,
) -> Keeps:
    """:func:`allocate_sparsity` with statistics of forward passes, which have hidden states of their own.
    ``entrances``: to the parts of a model that has several."""
    needs = config.needs.measure
    if entrances is not None:
        return _measured_in_parts(blocks, config, states, collection, entrances)
    hidden = states.hidden.fork(f"measure-{rank}")

    def statistics(block: Block, index: int) -> dict[str, LinearStatistics]:
        found = collection.collect(block, index, list(block.linears), advance=True, hidden=hidden, needs=needs)
        hidden.commit()
        return found

    keeps = allocate_sparsity(blocks, config, statistics)
    hidden.remove()
    return keeps


def _measured_in_parts(
    blocks: BlockSource, config: PruneConfig, states: BatchStates, collection: Collection, entrances: Entrances
) -> Keeps:
    def statistics(block: Block, index: int) -> dict[str, LinearStatistics]:
        return collection.collect(block, index, list(block.linears), advance=True, needs=config.needs.measure)

    entrances.again()
    keeps = allocate_sparsity(blocks, config, statistics, lambda index: entrances.enter(index, states, lasting=False))
    entrances.again()
    return keeps


def measuring_bytes(config: PruneConfig, sizes: RunSizes) -> tuple[int, int]:
    """Bytes of a block's statistics, and of its scores: in float32, and for the largest matrix in float64."""
    statistics = max(sizes.statistics(block, list(block.linears), config.needs.measure) for block in sizes.blocks)
    if sizes.stored is not None:
        statistics = sizes.forward()
    entries = [[linear.weight.numel() for linear in block.linears.values()] for block in sizes.blocks]
    largest = max(max(some, default=0) for some in entries)
    return statistics, 4 * max(map(sum, entries)) + 8 * largest
