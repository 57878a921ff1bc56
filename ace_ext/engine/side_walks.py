"""Extra passes over the dense blocks: one measures each block for sparsity allocation, one computes the dense outputs
that training uses as targets."""

from ace_ext.engine.steps import Steps
from ace_ext.engine.strategies import prune_block
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import run_block
from ace_ext.pruning.allocation import allocate, measure_block
from ace_ext.records import BlockReport


def allocate_sparsity(walk: Steps) -> list[dict[str, int]]:
    """How many weights of a row each matrix keeps, by block and Linear. A resumed run reads the earlier run's result
    from the journal."""
    journal, source, config = walk.context.journal, walk.context.source, walk.config
    if journal is not None and "keeps" in journal.notes:
        kept: list[dict[str, int]] = journal.notes["keeps"]
        return kept
    hidden = None if source is not None else walk.hidden.fork(f"measure-{walk.context.peers.rank}")
    measures, shapes = [], []
    for index in range(len(walk.blocks.blocks)):
        with walk.blocks.hold(index) as block:
            children = list(block.linears)
            shapes.append({child: (linear.out_features, linear.in_features) for child, linear in block.linears.items()})
            if hidden is None:
                assert source is not None
                stats = source.block(block.name, block.linears, walk.device)
            else:
                stats = walk.collect(block, index, children, advance=True, hidden=hidden, needs=config.needs.measure)
                hidden.commit()
            measures.append(measure_block(block.linears, stats, config))
    if hidden is not None:
        hidden.remove()
    keeps = allocate(measures, config, shapes)
    if journal is not None:
        journal.notes["keeps"] = keeps
    return keeps


def open_dense(walk: Steps) -> HiddenStates:
    """The hidden states of the dense model: a copy of the first ones, or those of the earlier run when resuming."""
    name = f"dense-{walk.context.peers.rank}"
    if walk.context.journal is not None and walk.context.journal.finished:
        return walk.hidden.sibling(name)
    return walk.hidden.fork(name)


def prune_and_train(walk: Steps, block: Block, index: int, block_report: BlockReport) -> None:
    """Prunes a block, then trains its remaining weights; the targets are the dense model's hidden states."""
    stage = walk.config.method.train
    assert stage is not None
    assert walk.dense is not None
    walk.settle()  # the dense states that are replaced here may be on their way to the disk
    inputs = [walk.hidden[i] for i in range(len(walk.calls))]
    targets = []
    for i, call in enumerate(walk.calls):
        targets.append(run_block(block, walk.dense[i], call.others[index]))
        walk.put(block, index, i, targets[-1], walk.dense)
    walk.check_outputs(block)
    prune_block(walk, block, index, block_report)
    masks = {child: linear.weight != 0 for child, linear in block.linears.items()}
    others = [call.others[index] for call in walk.calls]
    block_report.tuning = stage.train_(
        block,
        list(zip(inputs, others, strict=True)),
        targets,
        masks,
        [call.token_mask for call in walk.calls],
    )
    for i, hidden in enumerate(inputs):
        walk.put(block, index, i, run_block(block, hidden, others[i]))
    walk.check_outputs(block)
