"""Enters the parts of a model during a walk: the calls of each part are recorded when the walk comes to it, so that a
decoder sees the output of the pruned encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.context import RunContext
from ace_ext.errors import InputError
from ace_ext.models.block_store import BlockSource
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.parts import entered
from ace_ext.models.replay import BlockCall, first_states
from ace_ext.models.samples import note_sample_shapes, one_sample

Entered = tuple[list[BlockCall], HiddenStates]
"""The batches' calls of a part's blocks, and the hidden states before the first of them."""


class Entrances:
    """The entrances of a walk to the parts of a model.

    Args:
        model: the model.
        store: its blocks, in the order of the walk.
        parts: ranges of blocks.
        batches: arguments of the model's calls.
        context: of the run.
        device: where blocks are run.
        dense: the hidden states of the dense model are needed in each part, too. They are computed now, while it is
            dense.
    """

    def __init__(
        self,
        model: nn.Module,
        store: BlockSource,
        parts: Sequence[range],
        batches: list[dict[str, Tensor]],
        context: RunContext,
        device: torch.device,
        dense: bool = False,
    ) -> None:
        self._model, self._store, self._parts, self._batches = model, store, parts, batches
        self._journal, self._device = context.journal, device
        self._only_dense = context.sink is not None  # saved statistics do not depend on pruned blocks
        self._trains = dense and not self._only_dense
        self._at = -1
        self._dense: dict[int, Entered] = {}
        for part in parts if dense else ():
            self._dense[part.start] = self._captured(part)
        if self._journal is not None:
            self._journal.restore_(model, store)

    def ends(self, index: int) -> bool:
        """Whether a block is the last of its part."""
        return any(part.stop == index + 1 for part in self._parts)

    def starts(self, index: int) -> bool:
        """Whether a block is the first of its part."""
        return any(part.start == index for part in self._parts)

    def dense(self, index: int) -> Entered:
        """The dense model's calls in the part of a block, and its states before that part."""
        return next(self._dense[part.start] for part in self._parts if index in part)

    def enter(self, index: int, states: BatchStates, *, lasting: bool = True) -> None:
        """Gives ``states`` what enters the part of a block, unless they are in it already.

        Args:
            index: of the block.
            states: the walk's.
            lasting: the states may be brought to the disk, for a resumed run.

        Raises:
            InputError: as :func:`ace_ext.models.replay.capture_calls`.
        """
        part = next(part for part in self._parts if index in part)
        if part.start == self._at:
            return
        states.settle()
        self._at = part.start
        resumed = index != part.start
        if self._only_dense:
            calls, kept = self._dense[part.start]
            first = (kept[i] for i in range(len(kept)))
            states.take(calls, kept if self._journal is None else self._journal.open_part(first, self._device, resumed))
        else:
            states.take(*self._captured(part, resumed if lasting else None))

    def again(self) -> None:
        """Forgets which part was entered: its first block is to be run once more."""
        self._at = -1

    def _captured(self, part: range, resumed: bool | None = None) -> Entered:
        """What enters a part. ``resumed``: the journal keeps it, and has it already if this is true; None: it is only
        in memory."""
        calls: list[BlockCall] = []
        entering = first_states(entered(self._model, self._store, part, self._batches), calls)
        if resumed is not None and self._journal is not None:
            hidden = self._journal.open_part(entering, self._device, resumed)
            for _ in entering:  # a resumed run did not read these, but needs the calls
                pass
        else:
            hidden = HiddenStates(entering, device=self._device)
        if not calls:
            raise InputError("calibration must have at least one token whose attention_mask is not 0 (got none)")
        if self._trains:
            single = entered(self._model, self._store, part, [one_sample(self._batches[0])])
            note_sample_shapes(calls, hidden[0].shape, single)
        return calls, hidden
