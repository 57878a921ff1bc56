"""``prune_model``: prunes a model in memory by a walk over its blocks."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ace_ext.dense_weights import NOT_CALLED, DenseWeight
from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.context import RunContext
from ace_ext.engine.embeddings import check_tables, round_tables_, tables_of
from ace_ext.engine.entrances import Entrances
from ace_ext.engine.finite import restored_if_float16
from ace_ext.engine.inputs import Batches, model_inputs
from ace_ext.engine.progress import Progress
from ace_ext.engine.run_again import run_finished_again
from ace_ext.engine.walk import Walk
from ace_ext.errors import InputError
from ace_ext.models._transformers import check_version, predicts_tokens
from ace_ext.models.block_store import BlockSource, ResidentBlocks
from ace_ext.models.blocks import Block, find_blocks, stay_dense
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.left_dense import check_share
from ace_ext.models.padded_experts import check_padding, try_padding
from ace_ext.models.parts import check_removable
from ace_ext.models.replay import BlockCall, capture_calls, first_states
from ace_ext.models.run_mode import inner_model, modes_by_name, run_mode
from ace_ext.models.samples import note_sample_shapes, one_sample
from ace_ext.models.trial import Findings, try_later_batches, try_walk
from ace_ext.models.versions import versions
from ace_ext.process_memory import peak_memory_bytes
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.removal import Removal
from ace_ext.records import BlockReport, PruneReport, Removed

if TYPE_CHECKING:
    from ace_ext.engine.distillation import Distillation
    from ace_ext.healing.networks import NetworkDistillation


@torch.no_grad()
def prune_model(
    model: nn.Module,
    batches: Batches,
    config: PruneConfig | None = None,
    *,
    callback: Callable[[BlockReport], None] | None = None,
    progress: bool = False,
    distill_text: Batches | None = None,
    context: RunContext | None = None,
    **settings: Any,
) -> PruneReport:
    """Prunes the Linears of a model's blocks in place.

    Args:
        model: a Hugging Face model, on any device: a causal language model, an encoder, an encoder with a decoder, or a
            model of images, sound or pairs. Heads and embeddings are not pruned. Autocast, inference mode, training
            mode and ``torch.compile`` change no result (:mod:`ace_ext.models.run_mode`).
        batches: calibration tokens: ``[nsamples, seqlen]`` integer, or an iterable of such tensors or of dicts of the
            model's inputs, as a tokenizer or a processor returns them: ``input_ids [batch, seqlen]``, if some are
            padding ``attention_mask [batch, seqlen]`` (their tokens are left out of the statistics), and whatever
            else the model reads, such as ``pixel_values``. The blocks of a language model then see the tokens of images
            among those of text. A model that reads no text needs no ``input_ids``.
        config: what to prune and how; or give the arguments of :class:`PruneConfig` by name, as in
            ``prune_model(model, tokens, method="balanced", sparsity=0.5)``. Default: the preset ``fast`` at 50 %.
        callback: called after each block with its report.
        progress: show a progress bar on stderr.
        distill_text: for a method with ``distill`` windows of text without padding to train on, ``[windows, seqlen]``
            integer, better none of the calibration samples; default: these. A text shorter than the stage's ``tokens``
            is read again, up to six times. For a network that is no causal language model: batches as for ``batches``.
        context: optional services of a run on files; see :mod:`ace_ext.runs.pipeline`.
        **settings: the arguments of :class:`PruneConfig`, in place of ``config``.

    Returns:
        A :class:`PruneReport`: for each matrix the number of weights kept and the change of its output. With ``remove``
        also what was removed; the model's modules and configuration are then new objects, without the hooks and the
        gradient checkpointing of the old ones.

    Raises:
        InputError: for a model, tokens or weights that cannot be pruned. Whatever can be checked in advance is checked
            before any weight changes. Of a float16 model, whose activations may overflow in any block, a copy of the
            weights is kept in memory, and put back after an error; with ``remove``, of the smaller model.
    """
    check_version()
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a model, as from_pretrained returns it (got {type(model).__name__})")
    model = inner_model(model)
    if not hasattr(model, "config"):
        raise InputError(
            f"model must be a model of transformers, with a config (got {type(model).__name__}); give the one inside it"
        )
    if callback is not None and not callable(callback):
        raise InputError(f"callback must be a function (got {type(callback).__name__})")
    if config is not None and settings:
        raise TypeError(f"give config, or {', '.join(settings)}, not both")
    if not isinstance(config, PruneConfig | None):
        raise InputError(
            f"config must be a PruneConfig (got {str(config)[:100]!r}); a method is given by name, as method=…"
        )
    config = config or PruneConfig.of(settings)
    _refuse_packed(model)
    trained = config.method.distill is not None
    if distill_text is not None and not trained:
        raise InputError("distill_text is given, but nothing trains on it; leave it out, or use a method with distill")
    context = context or RunContext(observer=Progress(progress))
    if config.remove is not None:
        with modes_by_name(model):
            return _smaller(
                model, batches, config, callback, context, batches if distill_text is None else distill_text
            )
    start = time.perf_counter()
    store = context.blocks or ResidentBlocks(
        find_blocks(model, config.skip, max_dense=config.dense_limit, towers=config.towers)
    )
    check_pattern(store.blocks, config)
    check_tables(model, config)
    device = context.device or next(model.parameters()).device
    context = replace(context, device=device)
    trainer = config.method.train or config.method.distill
    with run_mode(model, None if trainer is None else trainer.name):
        ready = [] if context.source is not None else list(model_inputs(model, batches, config, device))
        found = _tried(model, store, ready, config, context)
        if found is not None:
            context = replace(context, uses=found.uses)
        distillation: Distillation | NetworkDistillation | None = None
        if trained and not predicts_tokens(model):  # first: it copies the dense model
            again = ready if distill_text is None else list(model_inputs(model, distill_text, config, device))
            distillation = _network_distillation(model, store, again, config, context)
        states, entrances = _begin(model, store, ready, found, config, context)
        if trained and distillation is None:
            text = batches if distill_text is None else distill_text
            distillation = _distillation(model, store, text, config, context)
        weight = next(linear.weight for block in store.blocks for linear in block.linears.values())
        report = PruneReport(config.to_dict(), str(device), str(weight.dtype).removeprefix("torch."))
        stage = config.method.embeddings
        tables = [] if stage is None else [model.get_parameter(name) for name in tables_of(model)]
        with restored_if_float16(store, tables) if context.journal is None else nullcontext():
            walk = Walk(store, states, config, report, context, callback, entrances)
            if found is not None and found.reason is not None:
                walk.read_whole_forwards(model, ready)
                report.whole_forwards = found.reason
            walk.run()
            report.dense = _left_dense(model, store.blocks, report)
            if stage is not None:
                report.embeddings = round_tables_(model, stage) if context.tables is None else context.tables(model)
            if distillation is not None:
                report.healing = distillation.train_()
    report.seconds = time.perf_counter() - start
    report.peak_memory_bytes = peak_memory_bytes(device)
    report.versions = versions()
    context.observer.end(report)
    return report


def _refuse_packed(model: nn.Module) -> None:
    runtime = sys.modules.get("ace_ext.runtime.weight")
    if runtime is None:  # nothing is packed without it, and most runs do not need it
        return
    for name, module in model.named_modules():
        if isinstance(module, runtime.PackedWeight):
            raise InputError(f"{name} is packed; give the dense model (ace-prune unpack writes its folder)")


def _smaller(
    model: nn.Module,
    batches: Batches,
    config: PruneConfig,
    callback: Callable[[BlockReport], None] | None,
    context: RunContext,
    text: object,
) -> PruneReport:
    """Removes structures, and then prunes the smaller model if zeros or quantization are asked for. ``text``: what a
    method with ``distill`` trains on."""
    start = time.perf_counter()
    device = next(model.parameters()).device
    if not predicts_tokens(model):
        check_removable(model, find_blocks(model, config.skip, max_dense=config.dense_limit))
    if not config.only_removes:
        planned_smaller(model, find_blocks(model, check=False), config)  # before anything changes
    with run_mode(model):
        ready = list(model_inputs(model, batches, config, device))
        distillation = None
        if config.method.distill is not None:  # now, while the model is dense
            store = ResidentBlocks(find_blocks(model))
            distillation = _distillation(model, store, text, config, replace(context, device=device))
        removed = remove_structures(model, ready, config, context)
    first = config.without_distillation()
    if first.only_removes:
        report = removal_report(model, config, removed)
    else:
        report = prune_model(model, ready, first.without_removal(), callback=callback, context=context)
        report.config, report.removed = config.to_dict(), removed
    if distillation is not None:
        distillation.follow(ResidentBlocks(find_blocks(model, config.skip, max_dense=config.dense_limit)))
        report.healing = distillation.train_()
    report.seconds = time.perf_counter() - start
    if first.only_removes:
        context.observer.end(report)
    return report


def planned_smaller(
    model: nn.Module,
    blocks: list[Block],
    config: PruneConfig,
    check: Callable[[Removal], object] = lambda wanted: None,
) -> tuple[nn.Module, list[Block], list[Removed]]:
    """The model that a removal leaves, from shapes alone, the blocks of it that are pruned, and a record of each kind
    of structure that goes.

    Args:
        model: loaded, or a skeleton. It does not change.
        blocks: all its blocks: ``skip`` is for zeros.
        config: has ``remove``.
        check: tries each removal that is planned.

    Raises:
        InputError: the structures cannot be removed, or the smaller model cannot be pruned as asked.
    """
    from ace_ext.structures.remove import planned_removal  # imported here: most runs remove no structure

    assert config.remove is not None  # checked by the caller
    smaller, removed = planned_removal(model, blocks, config.remove, check)
    left = find_blocks(smaller, config.skip, check=False, max_dense=config.dense_limit)
    if not config.only_removes:
        check_pattern(left, config)
    return smaller, left, removed


def remove_structures(
    model: nn.Module, ready: list[dict[str, Tensor]], config: PruneConfig, context: RunContext
) -> list[Removed]:
    """Removes the structures of ``config.remove`` from a model in memory. ``ready``: arguments of the model's calls.

    Raises:
        InputError: they cannot be removed. The model is unchanged.
    """
    from ace_ext.structures.remove import remove_  # imported here: most runs remove no structure

    assert config.remove is not None  # checked by the caller
    try:
        return remove_(model, ready, config.remove, context.observer.removing)
    finally:
        context.observer.close()


def removal_report(model: nn.Module, config: PruneConfig, removed: list[Removed]) -> PruneReport:
    """The report of a run that only removes structures."""
    parameter = next(model.parameters())
    report = PruneReport(config.to_dict(), str(parameter.device), str(parameter.dtype).removeprefix("torch."))
    report.removed, report.versions = removed, versions()
    report.seconds = sum(record.seconds for record in removed)
    report.peak_memory_bytes = peak_memory_bytes(parameter.device)
    return report


def check_pattern(blocks: list[Block], config: PruneConfig) -> None:
    """Checks that the pattern's group size divides the number of columns of every matrix.

    Raises:
        InputError: it names the first matrix for which it does not.
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
    store: BlockSource,
    batches: list[dict[str, Tensor]],
    context: RunContext,
    device: torch.device,
    trains: bool,
) -> BatchStates:
    """The arguments with which each batch enters the blocks, and the hidden states before the first unfinished one."""
    if context.source is not None:
        return BatchStates([], None, device)
    calls: list[BlockCall] = []
    with store.entrance(model):
        entering = first_states(capture_calls(model, store.blocks, batches, given=True), calls)
        if context.journal is None:
            hidden = HiddenStates(entering, device=device)
        else:
            hidden = context.journal.open_hidden(entering, device)
            for _ in entering:  # a resumed run did not read these, but needs the calls
                pass
        if trains and calls:
            note_sample_shapes(calls, hidden[0].shape, capture_calls(model, store.blocks, [one_sample(batches[0])]))
    if not calls:
        raise InputError("calibration must have at least one token whose attention_mask is not 0 (got none)")
    try_padding(store, calls, hidden)
    return BatchStates(calls, hidden, device)


def _begin(
    model: nn.Module,
    store: BlockSource,
    batches: list[dict[str, Tensor]],
    found: Findings | None,
    config: PruneConfig,
    context: RunContext,
) -> tuple[BatchStates, Entrances | None]:
    """The state of the walk before the first unfinished block, and the entrances to the parts of a model. These are
    None for a causal language model, and for one that is not walked block by block."""
    assert context.device is not None  # set by the caller
    check_padding(store.blocks, batches)
    if found is not None and found.reason is not None:
        return BatchStates([], None, context.device), None
    if found is None or not found.parts:
        states = _enter(model, store, batches, context, context.device, config.method.train is not None)
        done = 0 if context.journal is None else context.journal.finished
        if found is not None and found.shares and 0 < done < len(store.blocks):
            entered = capture_calls(model, store.blocks, batches, given=True)
            run_finished_again(model, store, states, context, entered)
        return states, None
    dense = config.method.train is not None or context.sink is not None
    entrances = Entrances(model, store, found.parts, batches, context, context.device, dense)
    states = BatchStates([], None, context.device)
    done = 0 if context.journal is None else context.journal.finished
    if done < len(store.blocks):
        entrances.enter(done, states)
    return states, entrances


def _tried(
    model: nn.Module, store: BlockSource, batches: list[dict[str, Tensor]], config: PruneConfig, context: RunContext
) -> Findings | None:
    """What a trial of the model found; None if there is nothing to try it on.

    Raises:
        InputError: the model cannot be walked block by block, and the run needs the blocks one by one; or text uses too
            little of a block.
    """
    if not batches:
        return None
    found = try_walk(model, store, batches[0])
    for block in store.blocks:
        left = [_not_called(block, child) for child in found.uncalled(block)]
        check_share(block.name, block.module, [*block.dense, *left], config.dense_limit)
    resumed = found.shares and context.journal is not None and context.journal.finished
    if resumed and (found.parts or config.method.train is not None):  # there are two walks, or a part within the model
        raise InputError("the blocks of this model share states, which no file holds; start over without --resume")
    if found.reason is None:
        if len(found.parts) > 1:
            try_later_batches(model, store, batches)
        return found
    hindered = {
        "leave out --offload disk": not isinstance(store, ResidentBlocks),
        "leave out --save-stats": context.sink is not None,
        "start over without --resume": context.journal is not None and context.journal.finished > 0,
        "run it in one process": context.peers.size > 1,
    }
    check_whole_forwards(model, config, found.reason, hindered)
    return found


def check_whole_forwards(model: nn.Module, config: PruneConfig, reason: str, hindered: Mapping[str, bool]) -> None:
    """Checks that a model can be pruned by forwards of the whole model.

    Args:
        model: the model.
        config: the method.
        reason: why it cannot be walked block by block.
        hindered: what to do about something that needs a walk, and whether that was asked for.

    Raises:
        InputError: something that needs a walk was asked for.
    """
    trains = [stage.label for stage in (config.method.train, config.method.distill) if stage is not None]
    if not predicts_tokens(model):  # it is distilled by forwards of the whole model
        trains = [stage.label for stage in (config.method.train,) if stage is not None]
    for mend, asked in {**hindered, f"leave out {' and '.join(trains)}": bool(trains)}.items():
        if asked:
            raise InputError(f"this model cannot be walked block by block: {reason}; {mend}")


def _distillation(
    model: nn.Module, store: BlockSource, text: object, config: PruneConfig, context: RunContext
) -> "Distillation":
    from ace_ext.engine.distillation import Distillation  # imported here: most methods do not distil

    return Distillation(model, store, text, config, context)


def _network_distillation(
    model: nn.Module, store: BlockSource, batches: list[dict[str, Tensor]], config: PruneConfig, context: RunContext
) -> "NetworkDistillation":
    from ace_ext.engine.distillation import network_distillation  # imported here: most methods do not distil

    return network_distillation(model, store, batches, config, context)


def _left_dense(model: nn.Module, blocks: list[Block], report: PruneReport) -> list[DenseWeight]:
    """The matrices that stayed dense: those known before, and Linears that saw no token."""
    pruned = {matrix.name for matrix in report.matrices}
    found = []
    for block in blocks:
        for child in block.linears:
            if block.full_name(child) not in pruned:
                found.append(_not_called(block, child))
    return [*stay_dense(model, blocks), *found]


def _not_called(block: Block, child: str) -> DenseWeight:
    shape = tuple(block.linears[child].weight.shape)
    return DenseWeight(f"{block.full_name(child)}.weight", shape, NOT_CALLED)
