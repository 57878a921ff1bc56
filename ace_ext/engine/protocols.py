"""What the engine asks of files, of other processes and of progress displays. It imports none of them."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ace_ext.engine.hidden_states import HiddenStates
from ace_ext.models.blocks import Block
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import BlockReport, PruneReport

Empty = Callable[[str], LinearStatistics]
"""Makes the statistics of no token of the Linear of this name."""


class Journal(Protocol):
    """Records every finished block, so that a run can be resumed."""

    finished: int
    """How many blocks an earlier run finished."""
    blocks: list[BlockReport]
    """Their reports."""
    notes: dict[str, Any]
    """Plain values that the walk found out and a resumed run needs again."""

    def open_hidden(self, states: Iterable[Tensor], device: torch.device) -> HiddenStates:
        """The hidden states that enter the first unfinished block: the earlier run's, or the given first ones."""
        ...

    def block_done(self, block: Block, report: BlockReport, layouts: dict[int, Any]) -> None:
        """Stores a pruned block, then the state that counts it as done. ``layouts``: of each rank's hidden states."""
        ...


class StatisticsSink(Protocol):
    """Takes the statistics of every dense block, to keep them."""

    def block(self, name: str, stats: dict[str, LinearStatistics]) -> None:
        """The statistics of a block's Linears, by their name in the block."""
        ...


class StatisticsSource(Protocol):
    """Gives the statistics of an earlier run; then nothing is run forward."""

    def block(self, name: str, children: Iterable[str], device: torch.device) -> dict[str, LinearStatistics]:
        """The statistics of a block's Linears, by their name in the block."""
        ...


class Observer(Protocol):
    """Is told how far a run is."""

    def start(self, blocks: int, done: int, tokens: int) -> None:
        """``done`` of the blocks are finished already; ``tokens`` calibration tokens go through each block."""
        ...

    def block(self, block: BlockReport, report: PruneReport) -> None:
        """A block is done."""
        ...

    def end(self, report: PruneReport) -> None:
        """All blocks are done."""
        ...

    def close(self) -> None:
        """The walk is over, also after an error."""
        ...


class Peers(Protocol):
    """The other processes of a run. ``size`` is 1 for a run of its own."""

    rank: int
    size: int

    def merge_(self, stats: dict[str, LinearStatistics], names: list[str], empty: Empty) -> None:
        """Makes every rank's statistics of the named Linears those of all ranks' tokens."""
        ...

    def check_same(self, weights: list[Tensor], where: str) -> None:
        """Raises where the ranks hold different pruned weights."""
        ...

    def gather(self, value: object) -> list[Any]:
        """Every rank's value, in the order of the ranks."""
        ...

    def wait(self) -> None:
        """Returns once every rank is here."""
        ...
