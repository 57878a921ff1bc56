"""The interfaces through which the engine uses journals, statistics files, other processes and progress displays. It
imports no implementation of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.pruning.prune_linear import RowShares
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import BlockReport, PruneReport

if TYPE_CHECKING:  # at run time only a method with ``distill`` loads ace_ext.healing
    from ace_ext.healing.protocols import Observer as HealObserver

Empty = Callable[[str], LinearStatistics]
"""``empty(name)``: statistics of zero tokens for the Linear of this name."""


class Journal(Protocol):
    """Records every finished block, so that a run can be resumed."""

    finished: int
    """How many blocks an earlier run finished."""
    blocks: list[BlockReport]
    """The reports of these blocks."""
    notes: dict[str, Any]
    """Plain values that the walk computed and a resumed run needs again."""

    def open_hidden(self, states: Iterable[Tensor], device: torch.device) -> HiddenStates:
        """The inputs of the first unfinished block: those of the earlier run, or ``states`` if there is none."""
        ...

    def restore_(self, store: BlockSource) -> None:
        """Gives the blocks that are finished their pruned weights, also those that an earlier run finished."""
        ...

    def open_part(self, states: Iterable[Tensor], device: torch.device, resumed: bool) -> HiddenStates:
        """The inputs of a part of a model, which later blocks replace; ``resumed``: those that the earlier run left
        before a block within the part."""
        ...

    def wants_states(self) -> bool:
        """Whether it is time to bring hidden states to the disk, so that a run can be resumed after this block."""
        ...

    def block_done(
        self,
        block: Block,
        report: BlockReport,
        layouts: dict[int, Any],
        commits: Sequence[Callable[[], None]] | None,
    ) -> None:
        """Stores a pruned block; brings hidden states to the disk by calling ``commits``, then records the block as
        done. Without ``commits`` only a later block records it. All this may happen while the next block is pruned.
        ``layouts``: the layout of each rank's hidden states."""
        ...

    def settle(self) -> None:
        """Returns once all blocks that are done are recorded. An error in that is raised here."""
        ...


class StatisticsSink(Protocol):
    """Stores the statistics of every dense block."""

    def block(self, name: str, stats: dict[str, LinearStatistics]) -> None:
        """Stores the statistics of a block's Linears, by their names in the block."""
        ...


class StatisticsSource(Protocol):
    """Reads the statistics of an earlier run, so that no forward pass is run."""

    def block(self, name: str, children: Iterable[str], device: torch.device) -> dict[str, LinearStatistics]:
        """The statistics of a block's Linears, by their names in the block; at least those of ``children``."""
        ...


class Observer(Protocol):
    """Is called as a run progresses."""

    @property
    def healing(self) -> "HealObserver":
        """Is called as the distillation progresses, if the method has it."""
        ...

    def removing(self, kind: str, done: int, of: int) -> None:
        """Called while structures of a kind are removed: ``done`` of the steps are finished."""
        ...

    def start(self, blocks: int, done: int, tokens: int) -> None:
        """Called first, or after structures are removed. ``done`` of the blocks are finished; ``tokens`` calibration
        tokens go through each block."""
        ...

    def block(self, block: BlockReport, report: PruneReport) -> None:
        """Called after each block; ``report`` holds all blocks so far."""
        ...

    def end(self, report: PruneReport) -> None:
        """Called when all blocks are done."""
        ...

    def close(self) -> None:
        """Called when the walk ends, also after an error."""
        ...


class Peers(RowShares, Protocol):
    """The other processes of a run. ``size`` is 1 if there are none."""

    rank: int
    size: int

    def merge_(self, stats: dict[str, LinearStatistics], names: list[str], empty: Empty) -> None:
        """Makes every rank's statistics of the named Linears those of all ranks' tokens."""
        ...

    def check_same(self, weights: list[Tensor], where: str) -> None:
        """Raises :class:`ace_ext.InputError` if the ranks hold different pruned weights."""
        ...

    def gather(self, value: object) -> list[Any]:
        """Every rank's value, in the order of the ranks."""
        ...

    def wait(self) -> None:
        """Returns once every rank has called it."""
        ...
