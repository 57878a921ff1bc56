"""Access to blocks of a source: some stay in memory while they are trained, the others are loaded one at a time."""

import contextlib
from collections.abc import Iterable, Iterator

from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block


class PinnedBlocks:
    """Blocks of another source; see :meth:`pin`."""

    def __init__(self, source: BlockSource) -> None:
        self.blocks = source.blocks
        self._source = source
        self.pinned: set[int] = set()

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[Block]:
        """As :meth:`ace_ext.models.block_store.BlockSource.loaded`; a pinned block is in memory already."""
        with contextlib.nullcontext() if index in self.pinned else self._source.loaded(index):
            yield self.blocks[index]

    @contextlib.contextmanager
    def pin(self, indices: Iterable[int]) -> Iterator[None]:
        """Within this context these blocks stay in memory, in the same tensors."""
        added = set(indices) - self.pinned
        with contextlib.ExitStack() as loaded:
            for index in sorted(added):
                loaded.enter_context(self._source.loaded(index))
            self.pinned |= added
            try:
                yield
            finally:
                self.pinned -= added
