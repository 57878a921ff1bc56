"""Removes structures from a model in memory. The model is the smaller one when everything is done, and unchanged after
an error."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.block_store import ResidentBlocks
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.trial import try_walk
from ace_ext.pruning import removal
from ace_ext.records import Removed
from ace_ext.structures.blocks import find_depth, without_blocks
from ace_ext.structures.neurons import Calibration, find_and_try, without_neurons
from ace_ext.structures.search import Neurons
from ace_ext.structures.smaller import take_over_


@torch.no_grad()
def remove_(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    wanted: removal.Removal,
    advanced: Callable[[str, int, int], None] = lambda kind, done, of: None,
) -> list[Removed]:
    """Removes blocks and then neurons.

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
    shares = _check(model, blocks, batches[0])
    neurons, depth = _found(model, blocks, wanted, batches[0])
    calibration = Calibration(batches, shares)
    smaller, records = model, []
    if wanted.blocks is not None:
        start, count = time.perf_counter(), wanted.blocks.removed(len(blocks))
        smaller, dropped = without_blocks(
            model, blocks, depth, count, batches, lambda done, of: advanced("blocks", done, of)
        )
        sizes = (len(blocks), len(blocks) - count, None, _parameters(model), _parameters(smaller))
        records.append(Removed(removal.text_of(wanted.blocks), depth, *sizes, time.perf_counter() - start, dropped=dropped))
    if wanted.neurons is not None and neurons is not None:
        start, before = time.perf_counter(), smaller
        if wanted.blocks is not None:
            blocks = find_blocks(smaller)
            neurons = find_and_try(smaller, blocks, wanted.neurons, batches[0])
        smaller, cut = without_neurons(
            before, blocks, neurons, wanted.neurons, calibration, lambda done, of: advanced("neurons", done, of)
        )
        kept, multiple = wanted.neurons.kept(neurons.count)
        sizes = (neurons.count, kept, multiple, _parameters(before), _parameters(smaller))
        records.append(Removed(removal.text_of(wanted.neurons), neurons.field, *sizes, time.perf_counter() - start, cut=cut))
    take_over_(model, smaller)
    return records


def _check(model: nn.Module, blocks: list[Block], batch: dict[str, Tensor]) -> bool:
    """Whether blocks also pass values on in a dict.

    Raises:
        InputError: the model's weights are on several devices, or it cannot be walked block by block.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise InputError(f"remove needs a model on one device (got {', '.join(map(str, devices))})")
    found = try_walk(model, ResidentBlocks(blocks), batch)
    if found.reason is not None:
        raise InputError(f"remove: this model cannot be walked block by block: {found.reason}")
    return found.shares


def _found(
    model: nn.Module, blocks: list[Block], wanted: removal.Removal, batch: dict[str, Tensor]
) -> tuple[Neurons | None, str]:
    """The feed-forward parts, and the setting with the number of blocks; as far as they are wanted."""
    neurons = None if wanted.neurons is None else find_and_try(model, blocks, wanted.neurons, batch)
    depth = "" if wanted.blocks is None else find_depth(model, blocks, wanted.blocks.removed(len(blocks)))
    return neurons, depth


def _parameters(model: nn.Module) -> int:
    """The number of a model's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
