"""The ways to prune blocks, one class each, which says what it holds in memory. :func:`planned` chooses among them, for
a walk and for the estimate of its memory, and imports what it chose.

May import what :mod:`ace_ext.engine` may, and nothing of the walk.
"""

from typing import TYPE_CHECKING

from ace_ext.engine.strategies._strategy import DenseStrategy, RunSizes, Strategy, StrategyBytes
from ace_ext.pruning.config import PruneConfig

if TYPE_CHECKING:
    from ace_ext.engine.strategies.dense_order import DenseOrder
    from ace_ext.engine.strategies.from_statistics import FromStatistics
    from ace_ext.engine.strategies.in_lockstep import InLockstep
    from ace_ext.engine.strategies.in_steps import InSteps
    from ace_ext.engine.strategies.one_forward import OneForward
    from ace_ext.engine.strategies.whole_model import WholeModel

    ByBlock = type[FromStatistics] | type[DenseOrder] | type[OneForward] | type[InLockstep] | type[InSteps]

__all__ = ["DenseStrategy", "RunSizes", "Strategy", "StrategyBytes", "by_block", "planned"]


def by_block(config: PruneConfig, one_batch: bool, keeps_forwards: bool, stored: bool) -> "ByBlock":
    """The strategy for each block of a run.

    Args:
        config: its order decides.
        one_batch: all tokens of the run are one batch.
        keeps_forwards: the unfinished forwards of several batches may be in memory.
        stored: statistics come from a file.
    """
    if stored:
        from ace_ext.engine.strategies.from_statistics import FromStatistics

        return FromStatistics
    if config.order == "block":
        from ace_ext.engine.strategies.dense_order import DenseOrder

        return DenseOrder
    if one_batch:
        from ace_ext.engine.strategies.one_forward import OneForward

        return OneForward
    if keeps_forwards:
        from ace_ext.engine.strategies.in_lockstep import InLockstep

        return InLockstep
    from ace_ext.engine.strategies.in_steps import InSteps

    return InSteps


def planned(config: PruneConfig, one_batch: bool, keeps_forwards: bool, stored: bool) -> "ByBlock | type[WholeModel]":
    """The strategy of a run; arguments as for :func:`by_block`. A comparison group over matrices prunes all at once."""
    if config.comparison.over_matrices:
        from ace_ext.engine.strategies.whole_model import WholeModel

        return WholeModel
    return by_block(config, one_batch, keeps_forwards, stored)
