"""The optional services of a run, which a walk over blocks may use in addition to the model and the tokens."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ace_ext.engine.distributed import Alone
from ace_ext.engine.progress import Progress
from ace_ext.engine.protocols import Journal, Observer, Peers, StatisticsSink, StatisticsSource
from ace_ext.models.block_store import BlockSource
from ace_ext.records import RoundedTable


@dataclass
class RunContext:
    """The optional services of a run. The defaults are for one process that prunes a model in memory."""

    device: torch.device | None = None
    """Where blocks are run; None: the model's device."""
    uses: Mapping[str, Counter[str]] = field(default_factory=dict)
    """How often a call of each block calls its Linears, by the block's name, as far as it was tried."""
    blocks: BlockSource | None = None
    """Loads each block's weights when it is needed; None: the model is in memory."""
    observer: Observer = field(default_factory=Progress)
    """Is told about progress."""
    journal: Journal | None = None
    """Records finished blocks for a resumed run; None: nothing is recorded."""
    peers: Peers = field(default_factory=Alone)
    """The other processes of the run."""
    sink: StatisticsSink | None = None
    """Stores the statistics of every block. They are the dense model's: each block then reads the output of the dense
    block before it."""
    tables: Callable[[nn.Module], list[RoundedTable]] | None = None
    """Gives the model the rounded embeddings that a run has computed already; None: they are rounded in memory."""
    source: StatisticsSource | None = None
    """Statistics of an earlier run; with them no forward pass is run."""
    keeps_forwards: bool | None = None
    """Whether the unfinished forwards of all batches through a block fit into memory; None: as far as it is free."""
    stateless: dict[tuple[tuple[str, type], ...], bool] = field(default_factory=dict)
    """Of each kind of block, by its modules' names and types, whether its forwards can run in
    lockstep (see :func:`ace_ext.models.lockstep.keeps_no_state`), as found so far."""
