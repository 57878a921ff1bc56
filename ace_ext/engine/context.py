"""The optional services of a run: what a walk over blocks may use beside the model and the tokens."""

from dataclasses import dataclass, field

import torch

from ace_ext.engine.distributed import Alone
from ace_ext.engine.progress import Progress
from ace_ext.engine.protocols import Journal, Observer, Peers, StatisticsSink, StatisticsSource
from ace_ext.models.block_store import BlockSource


@dataclass
class RunContext:
    """The defaults are those of a run in memory, by one process, that keeps nothing."""

    device: torch.device | None = None
    """Where blocks are run; None: where the model is."""
    blocks: BlockSource | None = None
    """Hands out the blocks; None: those of the model in memory."""
    observer: Observer = field(default_factory=Progress)
    journal: Journal | None = None
    peers: Peers = field(default_factory=Alone)
    sink: StatisticsSink | None = None
    """Gets the statistics of every block. They are the dense model's: dense blocks' outputs go on then."""
    source: StatisticsSource | None = None
    """Statistics of an earlier run; then nothing is run forward."""
