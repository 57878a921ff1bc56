"""``prune_model``: from a model and calibration tokens to a walk over its blocks."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ace_ext.engine.distributed import Peers
from ace_ext.engine.hidden_states import HiddenStates
from ace_ext.engine.progress import Progress
from ace_ext.engine.walk import Loop
from ace_ext.errors import InputError
from ace_ext.models.block_store import BlockSource, OffloadedBlocks, ResidentBlocks, entrance
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.replay import BlockCall, capture_calls
from ace_ext.models.versions import versions
from ace_ext.process_memory import peak_memory_bytes
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import BlockReport, PruneReport
from ace_ext.runs.statistics_file import SavedStatistics, StatisticsWriter
from ace_ext.runs.workspace import Workspace

Batches = Tensor | Iterable[Tensor | dict[str, Tensor]]


@dataclass
class Surroundings:
    """What a run on files has beside model and tokens; the defaults are those of a run in memory."""

    device: torch.device | None = None
    """Where blocks are run; None: where the model is."""
    offloaded: OffloadedBlocks | None = None
    """Blocks that are read from files, of a model that is a skeleton."""
    resident_hidden: bool = True
    progress: Progress | None = None
    journal: Workspace | None = None
    peers: Peers | None = None
    keeper: StatisticsWriter | None = None
    known: SavedStatistics | None = None


@torch.no_grad()
def prune_model(
    model: nn.Module,
    batches: Batches,
    config: PruneConfig | None = None,
    *,
    callback: Callable[[BlockReport], None] | None = None,
    progress: bool = False,
    surroundings: Surroundings | None = None,
) -> PruneReport:
    """Prunes the Linears of a causal language model's decoder blocks in place.

    Args:
        model: a Hugging Face causal language model, wherever its weights are. LM head and embeddings are left alone.
        batches: calibration tokens: ``[nsamples, seqlen]`` integer, or an iterable of such tensors or of dicts with
            ``input_ids`` and ``attention_mask`` (padded tokens then do not count).
        config: what to prune and how; default :class:`PruneConfig`.
        callback: called after each block with its report.
        progress: a bar on stderr.
        surroundings: for runs on files; see :mod:`ace_ext.runs.pipeline`.

    Returns:
        A :class:`PruneReport`: for each matrix the number kept and what it did to the output.

    Raises:
        InputError: for a model, tokens or weights that cannot be pruned. Everything that can be known before the first
            block is checked before any weight changes.
    """
    config = config or PruneConfig()
    around = surroundings or Surroundings(progress=Progress(progress))
    start = time.perf_counter()
    source = around.offloaded or ResidentBlocks(find_blocks(model, config.skip))
    check_pattern(source.blocks, config)
    device = around.device or next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        calls, hidden = _enter(model, source, batches, config, around, device)
        weight = next(linear.weight for block in source.blocks for linear in block.linears.values())
        report = PruneReport(config.to_dict(), str(device), str(weight.dtype).removeprefix("torch."))
        loop = Loop(
            source,
            calls,
            hidden,
            config,
            report,
            callback=callback,
            progress=around.progress,
            journal=around.journal,
            peers=around.peers,
            keeper=around.keeper,
            known=around.known,
        )
        loop.run(device)
    finally:
        model.train(training)
    report.seconds = time.perf_counter() - start
    report.peak_memory_bytes = peak_memory_bytes(device)
    report.versions = versions()
    if around.progress is not None:
        around.progress.end(report)
    return report


def check_pattern(blocks: list[Block], config: PruneConfig) -> None:
    """That the pattern's groups divide the columns of every matrix.

    Raises:
        InputError: naming the first that they do not.
    """
    if config.pattern is None:
        return
    for block in blocks:
        for child, linear in block.linears.items():
            if linear.in_features % config.pattern.group_m:
                raise InputError(
                    f"pattern {config.pattern} needs columns in whole groups of {config.pattern.group_m} "
                    f"(got {linear.in_features} in {block.full_name(child)}); choose another pattern, or skip it"
                )


def _enter(
    model: nn.Module,
    source: BlockSource,
    batches: Batches,
    config: PruneConfig,
    around: Surroundings,
    device: torch.device,
) -> tuple[list[BlockCall], HiddenStates | None]:
    """How each batch enters the blocks, and the hidden states with which it does, or those where a run stopped."""
    if around.known is not None:
        return [], None
    calls: list[BlockCall] = []

    def first_states() -> Iterator[Tensor]:
        for call in capture_calls(model, source.blocks, _as_batches(batches, config, device)):
            hidden, call.hidden = call.hidden, None
            calls.append(call)
            yield hidden

    with ExitStack() as held:
        if around.offloaded is not None:
            held.enter_context(entrance(model, source.blocks, around.offloaded.shards, device))
            held.enter_context(source.hold(0))  # what a block returns is only known once one has run
        if around.journal is None:
            hidden = HiddenStates(first_states(), device=device)
        else:
            hidden = around.journal.open_hidden(first_states(), around.resident_hidden, device)
            for _ in first_states() if not calls else ():  # a resumed run still asks what blocks are called with
                pass
    if not calls:
        raise InputError("calibration must have at least one token (got none)")
    return calls, hidden


def _as_batches(batches: Batches, config: PruneConfig, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Dicts on the device, cut to at most ``config.batch_tokens`` tokens each (at least one sample)."""
    if isinstance(batches, Tensor):
        if batches.dim() != 2:
            raise InputError(f"calibration tokens must be [nsamples, seqlen] (got shape {list(batches.shape)})")
        batches = batches.split(config.batch_samples(batches.shape[1]))
    for batch in batches:
        batch = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        if batch["input_ids"].numel():
            yield {name: value.to(device) for name, value in batch.items()}
