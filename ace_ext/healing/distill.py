"""``distill_``: trains the remaining weights of a pruned model so that it predicts what the dense model predicts."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.healing.batches import Batches, advance, check_text, enter, rebatched
from ace_ext.healing.context import HealContext, windows_of
from ace_ext.healing.part import Part, healing_of, new_notes
from ace_ext.healing.pinned import PinnedBlocks
from ace_ext.healing.settings import HealSettings
from ace_ext.healing.teacher import NAME, teacher_states
from ace_ext.healing.trainer import BlockTrainer
from ace_ext.healing.window import Student, WindowStudent
from ace_ext.models.block_store import ResidentBlocks
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.run_mode import as_made_here, frozen, inner_model, run_mode
from ace_ext.models.tail import Tail
from ace_ext.pruning.config import patterns_of
from ace_ext.records import Healing


def distill_(
    model: nn.Module,
    teacher: nn.Module | HiddenStates,
    tokens: Tensor,
    settings: HealSettings | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    grid: Grid | None = None,
    skip: Iterable[str] = (),
    context: HealContext | None = None,
) -> Healing:
    """Trains the kept weights of a pruned model's matrices in place, with fixed masks.

    The loss is ``KL(teacher ‖ student)`` over the vocabulary at temperature 1, a mean over all tokens of a step; the
    optimizer is Adam on float32 copies of the weights. Embedding, LM head, norms, biases and matrices that were not
    pruned stay as they are. Some windows are held out. The model ends with the weights that had the lowest loss on
    them; these may be the weights that it began with. The same arguments, device and number of threads give the same
    weights.

    Args:
        model: the pruned model, or its skeleton.
        teacher: the dense model; or, if the caller has run it already, its last block's outputs for the same tokens,
            ``[rows, seqlen, d_model]`` for each batch. Its modules outside the blocks must be those of ``model``.
        tokens: int64 ``[nsamples, seqlen]``, at least two windows of text without padding.
        settings: default :class:`HealSettings`.
        masks: by the full name of each pruned Linear ``[rows, cols]`` bool, True where a weight is kept; None: a weight
            is kept if it is not zero.
        skip: regular expressions of matrices that were not pruned, as in :class:`ace_ext.PruneConfig`. Unused if
            ``context`` gives the blocks.
        context: optional services of a run on files.

    Returns:
        The losses before, during and after.

    Raises:
        InputError: an argument of another kind; tokens that are not windows, or that the model does not know; a mask
            that is missing or leaves out a weight that is not zero.
    """
    settings = settings or HealSettings()
    context = context or HealContext()
    _check_types(model, teacher, settings, masks, grid)
    skip = patterns_of("skip", skip)
    model = inner_model(model)
    check_text(model, tokens)
    batches = Batches.of(tokens, settings)
    source = context.blocks or ResidentBlocks(find_blocks(model, skip))
    place = context.place
    context.journal.notes.update({**new_notes(), **context.journal.notes})
    with run_mode(model, "distill"), frozen(model), torch.no_grad():
        batches = Batches([as_made_here(batch) for batch in batches.tokens], batches.held_out)
        target = _states_of(teacher, skip, batches, context)
        calls, states = enter(model, source, batches.tokens, place, "student")
        store = PinnedBlocks(source)
        with source.way_out(model), store.pin(range(len(source.blocks)) if context.resident else ()):
            tail = Tail(model, source.blocks, calls[0].wrap)
            student = Student(store, tail, calls, states, target, batches)
            try:
                _train_(student, masks, grid, settings, context)
            finally:
                context.observer.close()
    held_out = sum(batches.tokens[i].numel() for i in batches.measured)
    healing = healing_of(context.journal.notes, settings, context.parts, held_out)
    context.observer.end(healing)
    return healing


def _check_types(model: object, teacher: object, settings: object, masks: object, grid: object) -> None:
    """Raises :class:`InputError` for an argument of another kind."""
    kinds: dict[str, tuple[object, Any, str]] = {
        "model": (model, nn.Module, "a model, as from_pretrained returns it"),
        "teacher": (teacher, nn.Module | HiddenStates, "the dense model, or its HiddenStates"),
        "settings": (settings, HealSettings, "HealSettings"),
        "masks": (masks, Mapping | None, "bool tensors by the full names of the matrices"),
        "grid": (grid, Grid | None, "an ace_ext.grids.Grid"),
    }
    for name, (value, kind, what) in kinds.items():
        if not isinstance(value, kind):
            raise InputError(f"{name} must be {what} (got {type(value).__name__})")


def steps_of(batches: Batches, settings: HealSettings) -> int:
    """How many steps all passes over the text take."""
    return settings.passes * len(batches.trained)


def _states_of(
    teacher: nn.Module | HiddenStates, skip: Iterable[str], batches: Batches, context: HealContext
) -> HiddenStates:
    """The teacher's states, in batches of one step each."""
    place = context.place
    if isinstance(teacher, nn.Module):
        teacher = inner_model(teacher)
        blocks = ResidentBlocks(find_blocks(teacher, skip))
        with run_mode(teacher), frozen(teacher):
            return teacher_states(teacher, blocks, batches.tokens, place, context.journal, context.observer)
    if [shape[:2] for shape in teacher.layout.shapes] == [list(batch.shape) for batch in batches.tokens]:
        return teacher
    states = rebatched(teacher, batches.tokens)
    return HiddenStates(states, place.folder, place.resident, f"{NAME}-steps", place.device or "cpu")


def _train_(
    student: Student,
    masks: Mapping[str, Tensor] | None,
    grid: Grid | None,
    settings: HealSettings,
    context: HealContext,
) -> None:
    """Trains the windows that are not done, from the first block to the last."""
    notes, blocks = context.journal.notes, student.store.blocks
    steps = steps_of(student.batches, settings)
    context.observer.start(notes["step"], steps, student.batches.tokens[0].numel())
    entered = 0
    for part, span in enumerate(windows_of(len(blocks), context.parts)):
        for index in range(entered, span.start):
            advance(student.store, index, student.calls, student.states)
        entered = span.start
        if part < notes["part"]:
            continue
        share = range(part * steps // context.parts, (part + 1) * steps // context.parts)
        with student.store.pin(span):
            trainers = {index: BlockTrainer(blocks[index], _masks_of(blocks[index], masks), grid) for index in span}
            trainee = WindowStudent(student, trainers, context.graphs)
            Part(trainee, blocks, share, trainers, steps, settings, context).train_()


def _masks_of(block: Block, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    if masks is None:
        return None
    missing = [child for child in block.linears if block.full_name(child) not in masks]
    if missing:
        raise InputError(f"masks must have each pruned matrix (got none for {block.full_name(missing[0])})")
    found = {child: masks[block.full_name(child)] for child in block.linears}
    for child, mask in found.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"masks must be bool tensors (got {kind} for {block.full_name(child)})")
    return found
