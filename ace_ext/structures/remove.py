"""Removes structures from a model in memory. The model is the smaller one when everything is done, and unchanged after
an error."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.block_store import ResidentBlocks
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.trial import try_walk
from ace_ext.pruning import removal
from ace_ext.records import Removed
from ace_ext.structures.blocks import find_depth, lay_out_without, without_blocks
from ace_ext.structures.choice import Try, candidates, nearest
from ace_ext.structures.experts import Experts, find_and_try_experts, find_experts, without_experts
from ace_ext.structures.search import Found, find_units
from ace_ext.structures.smaller import laid_out, take_over_
from ace_ext.structures.units import MOMENTS, MOMENTS_BYTES, Wanted, find_and_try, without_units


@torch.no_grad()
def remove_(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    wanted: removal.Removal,
    advanced: Callable[[str, int, int], None] = lambda kind, done, of: None,
) -> list[Removed]:
    """Removes blocks, then experts, then heads, then neurons.

    Args:
        model: a causal language model in evaluation mode (:mod:`ace_ext.models.run_mode`). Its modules and
            configuration are replaced; the object stays the same.
        batches: the calibration text as arguments of the model's calls.
        wanted: the structures.
        advanced: is called with the kind of structure, the number of finished steps and that of all.

    Returns:
        A record for each kind.

    Raises:
        InputError: the model has no such structures, its class cannot be made smaller, or numbers are not finite. The
            model is unchanged.
    """
    blocks = find_blocks(model)
    if not batches:
        raise InputError("calibration must have at least one token whose attention_mask is not 0 (got none)")
    check_walk(model, blocks, batches[0])
    if not wanted.compares:
        smaller, records = _without(model, blocks, batches, wanted, advanced)
    else:
        check = partial(try_parts, model, blocks, batches[0])
        tried = candidates(model, blocks, wanted, partial(planned_removal, model, blocks), check)
        smaller, records = nearest(
            model, tried, batches, lambda one, used: _without(model, blocks, used, one, advanced)
        )
    take_over_(model, smaller)
    return records


def _without(
    model: nn.Module,
    blocks: list[Block],
    batches: Sequence[dict[str, Tensor]],
    wanted: removal.Removal,
    advanced: Callable[[str, int, int], None],
) -> tuple[nn.Module, list[Removed]]:
    """The smaller model, and a record for each kind of structure. ``model`` does not change. Arguments as of
    :func:`remove_`."""
    # All are tried before anything is computed, and again once the model has become another one.
    experts, units = try_parts(model, blocks, batches[0], wanted)
    smaller, records = model, []
    if wanted.blocks is not None:
        start, count = time.perf_counter(), wanted.blocks.removed(len(blocks))
        depth, _ = find_depth(model, blocks, count)
        once = wanted.blocks.score == "published-shortgpt"
        smaller, dropped = without_blocks(model, blocks, depth, count, batches, partial(advanced, "blocks"), once)
        record = _record(wanted.blocks, depth, (len(blocks), len(blocks) - count), (model, smaller))
        records.append(replace(record, seconds=time.perf_counter() - start, dropped=dropped))
    if wanted.experts is not None and experts is not None:
        start, before = time.perf_counter(), smaller
        if before is not model:
            blocks = find_blocks(before)
            experts = find_experts(before, blocks, wanted.experts)
        smaller, gone = without_experts(
            before, blocks, experts, wanted.experts, batches, partial(advanced, wanted.experts.name)
        )
        sizes = (experts.count, wanted.experts.kept(experts.count))
        record = _record(wanted.experts, experts.setting, sizes, (before, smaller))
        records.append(replace(record, seconds=time.perf_counter() - start, gone=gone))
    for part, tried in units:
        start, before, found = time.perf_counter(), smaller, tried
        if before is not model:
            blocks = find_blocks(before)
            found = find_and_try(before, blocks, part, batches[0])
        smaller, cut = without_units(before, blocks, found, part, batches, partial(advanced, part.name))
        record = _record(part, found.setting, _sizes(part, found), (before, smaller))
        records.append(replace(record, seconds=time.perf_counter() - start, cut=cut))
    return smaller, records


def try_parts(
    model: nn.Module, blocks: list[Block], batch: dict[str, Tensor], wanted: removal.Removal
) -> tuple[Experts | None, list[tuple[Wanted, Found]]]:
    """The experts and the units that ``wanted`` removes, tried with the model's weights. Changes nothing.

    Raises:
        InputError: they cannot be removed.
    """
    experts = None if wanted.experts is None else find_and_try_experts(model, blocks, wanted.experts, batch)
    return experts, [(part, find_and_try(model, blocks, part, batch)) for part in wanted.units]


def planned_removal(
    model: nn.Module, blocks: list[Block], wanted: removal.Removal, check: Try = lambda wanted: None
) -> tuple[nn.Module, list[Removed]]:
    """The smaller model with its parameters on the meta device, and a record for each kind, from shapes alone.

    Args:
        model: loaded, or a skeleton.
        blocks: its blocks.
        wanted: the structures.
        check: tries each removal that is planned; without it a class that computes something else is not found.

    Raises:
        InputError: the model has no such structures, or its class cannot be made smaller.
    """
    if wanted.compares:  # the sizes of candidates are about the same
        tried = candidates(model, blocks, wanted, partial(planned_removal, model, blocks), check)
        smaller, records = planned_removal(model, blocks, removal.removal_of(tried[0].part))
        return smaller, [replace(records[0], tried=tried), *records[1:]]
    check(wanted)
    records = []
    if wanted.blocks is not None:
        count = wanted.blocks.removed(len(blocks))
        depth, kept = find_depth(model, blocks, count)
        smaller = lay_out_without(model, blocks, kept, depth)[0]
        records.append(_record(wanted.blocks, depth, (len(blocks), len(blocks) - count), (model, smaller)))
        model, blocks = smaller, find_blocks(smaller, check=False)
    if wanted.experts is not None:
        experts = find_experts(model, blocks, wanted.experts)
        sizes = (experts.count, wanted.experts.kept(experts.count))
        smaller = laid_out(model, {experts.setting: sizes[1]})
        records.append(_record(wanted.experts, experts.setting, sizes, (model, smaller)))
        model, blocks = smaller, find_blocks(smaller, check=False)
    for part in wanted.units:
        found = find_units(model, blocks, part)
        smaller = laid_out(model, found.changes(part.kept(found.count)))
        records.append(_record(part, found.setting, _sizes(part, found), (model, smaller)))
        model, blocks = smaller, find_blocks(smaller, check=False)
    return model, records


def working_bytes(columns: int, outputs: int, experts: int = 0) -> tuple[int, int]:
    """Bytes that :func:`remove_` needs for one block beside weights, hidden states and activations: the moments of a
    matrix's inputs, and the working memory of scores and least squares.

    Args:
        columns: of the matrix.
        outputs: its rows.
        experts: how many matrices the block has with these inputs, one for each expert; 0: one that is no expert's.
    """
    one = MOMENTS * 4 * columns * columns
    return max(one, min(MOMENTS_BYTES, experts * one)), 3 * 8 * columns * (columns + outputs)


def check_walk(model: nn.Module, blocks: list[Block], batch: dict[str, Tensor]) -> None:
    """Checks that a model can be walked.

    Raises:
        InputError: the model's weights are on several devices, or it cannot be walked block by block.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise InputError(f"remove needs a model on one device (got {', '.join(map(str, devices))})")
    found = try_walk(model, ResidentBlocks(blocks), batch)
    if found.reason is not None:
        raise InputError(f"remove: this model cannot be walked block by block: {found.reason}")


def _sizes(part: Wanted, found: Found) -> tuple[int, int]:
    """The number of neurons or query heads of a block before and after."""
    return found.number(found.count), found.number(part.kept(found.count))


def _record(part: removal.Part, setting: str, sizes: tuple[int, int], models: tuple[nn.Module, nn.Module]) -> Removed:
    """The record of a removal. ``sizes`` and ``models``: before and after."""
    multiple = part.multiple_of(sizes[0]) if isinstance(part, removal.Neurons) else None
    before, after = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    return Removed(removal.text_of(part), setting, *sizes, multiple, before, after, 0.0)
