"""Runs the teacher once before training, and keeps the dense model's hidden states after its last block."""

from torch import Tensor, nn

from ace_ext.healing.batches import Placement, advance, enter
from ace_ext.healing.protocols import Journal, Observer
from ace_ext.models.block_store import BlockSource
from ace_ext.models.handed_on import shared_dicts
from ace_ext.models.hidden_states import HiddenStates, Layout
from ace_ext.models.tail import Tail

NAME = "teacher"
"""The name of the states' files, and the key of the number of finished blocks in the journal."""
TRIED = 3
"""The number of hidden states that :meth:`ace_ext.models.tail.Tail.check` tries."""


def teacher_states(
    model: nn.Module,
    store: BlockSource,
    tokens: list[Tensor],
    place: Placement,
    journal: Journal,
    observer: Observer,
) -> HiddenStates:
    """The dense model's last block's outputs, ``[rows, seqlen, d_model]`` for each batch.

    Each block is loaded once. With files, each finished block is recorded, and a resumed run continues with the next;
    with the first one if blocks share states.

    Args:
        model: the dense model, or its skeleton.
        store: its blocks.
        tokens: the batches, each ``[rows, seqlen]``.
        place: where the states are kept.
        journal: records finished blocks.
        observer: is told of them.

    Raises:
        InputError: the model cannot be distilled: what it predicts does not follow from these outputs alone.
    """
    count, done = len(store.blocks), journal.notes.get(NAME, 0)
    calls, states = enter(model, store, tokens, place, NAME, earlier_states(place, journal))
    if done and shared_dicts(calls[0]):  # no file has what the finished blocks handed on
        done = 0
        calls, states = enter(model, store, tokens, place, NAME)
    if not done:
        with store.way_out(model):
            Tail(model, store.blocks, calls[0].wrap).check(states[0].flatten(0, 1)[:TRIED])
    for index in range(done, count):
        advance(store, index, calls, states)
        if place.folder is not None:
            journal.notes |= {NAME: index + 1, "layout": vars(states.layout)}
            journal.save()
        observer.teacher(index + 1, count)
    return states


def earlier_states(place: Placement, journal: Journal) -> HiddenStates | None:
    """The states after the last block that an earlier run finished; None if it finished none."""
    done = journal.notes.get(NAME, 0)
    if not done or place.folder is None:
        return None
    layout = Layout(**journal.notes["layout"])
    return HiddenStates.reopen(layout, done % 2, place.folder, place.resident, NAME, place.device or "cpu")
