"""The ways to prune blocks, one class each, which says what it holds in memory. :func:`planned` chooses among them, for
a walk and for the estimate of its memory.

May import what :mod:`ace_ext.engine` may, and nothing of the walk.
"""

from ace_ext.engine.strategies._strategy import RunSizes, Strategy, StrategyBytes
from ace_ext.engine.strategies.dense_order import DenseOrder
from ace_ext.engine.strategies.from_statistics import FromStatistics
from ace_ext.engine.strategies.in_lockstep import InLockstep
from ace_ext.engine.strategies.one_forward import OneForward
from ace_ext.engine.strategies.stages import Stages
from ace_ext.engine.strategies.whole_forwards import WholeForwards
from ace_ext.engine.strategies.whole_model import WholeModel
from ace_ext.pruning.config import PruneConfig

__all__ = [
    "DenseOrder",
    "FromStatistics",
    "InLockstep",
    "OneForward",
    "RunSizes",
    "Stages",
    "Strategy",
    "StrategyBytes",
    "WholeForwards",
    "WholeModel",
    "planned",
]

Planned = type[WholeModel] | type[DenseOrder] | type[OneForward] | type[InLockstep] | type[Stages]


def planned(config: PruneConfig, one_batch: bool, keeps_forwards: bool) -> Planned:
    """The strategy of a run that collects statistics block by block.

    Args:
        config: its comparison group and its order decide.
        one_batch: all tokens of the run are one batch.
        keeps_forwards: the unfinished forwards of several batches may be in memory.
    """
    if config.comparison.over_matrices:
        return WholeModel
    if config.order == "block":
        return DenseOrder
    if one_batch:
        return OneForward
    return InLockstep if keeps_forwards else Stages
