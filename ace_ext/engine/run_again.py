"""A resumed run of a model whose blocks share states: the finished blocks run once more."""

from collections.abc import Iterable

from torch import nn

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.context import RunContext
from ace_ext.models.block_store import BlockSource
from ace_ext.models.replay import BlockCall, first_states


def run_finished_again(
    model: nn.Module, store: BlockSource, states: BatchStates, context: RunContext, entered: Iterable[BlockCall]
) -> None:
    """Gives the calls of ``states`` what the finished blocks put into dicts for later ones, such as Gemma 4's keys and
    values of attention. The hidden states of ``states`` stay those before the first unfinished block.

    Args:
        model: the model.
        store: its blocks. The finished ones get their pruned weights.
        states: of the resumed run.
        context: of the run; its journal says which blocks are finished.
        entered: the batches' calls of the first block, with their hidden states; read once.
    """
    journal = context.journal
    assert journal is not None  # nothing else resumes a run
    calls: list[BlockCall] = []
    journal.restore_(model, store)
    with store.entrance(model):
        name = f"again-{context.peers.rank}"
        hidden = states.hidden.beside(name, first_states(entered, calls), resident=False)  # no estimate counts them
    again = BatchStates(calls, hidden, states.device)
    for index in range(journal.finished):
        with store.loaded(index) as block:
            again.advance(block, index)
            hidden.commit()
    hidden.remove()
    states.take(calls, states.hidden)
