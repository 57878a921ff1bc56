"""The optional services of a distillation, in addition to models and text."""

from dataclasses import dataclass, field

from ace_ext.healing.batches import Placement
from ace_ext.healing.progress import HealProgress
from ace_ext.healing.protocols import Journal, NoJournal, Observer
from ace_ext.models.block_store import BlockSource


@dataclass
class HealContext:
    """The optional services of a distillation. The defaults are for a model in memory."""

    blocks: BlockSource | None = None
    """Loads each block's weights when it is needed; None: the model is in memory."""
    place: Placement = field(default_factory=Placement)
    """Where hidden states are kept, and on which device blocks are run."""
    journal: Journal = field(default_factory=NoJournal)
    """Records the state for a resumed run, and writes trained blocks."""
    observer: Observer = field(default_factory=HealProgress)
    """Is told about progress."""
    parts: int = 1
    """The number of windows that the blocks are divided into. They are trained one after the other, each for its share
    of the steps, and only one of them has optimizer states in memory. 1 trains all blocks together; this is best."""
    resident: bool = True
    """Whether the blocks outside the window stay in memory too, once tokens have entered the first one."""
    graphs: int = 0
    """The number of blocks whose activations are stored, and not computed again in the backward pass. It changes no
    weight."""


def windows_of(blocks: int, parts: int) -> list[range]:
    """The indices of ``blocks`` blocks in ``parts`` windows of about the same size, in order."""
    bounds = [part * blocks // parts for part in range(parts + 1)]
    return [range(bounds[part], bounds[part + 1]) for part in range(parts)]
