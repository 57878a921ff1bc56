"""The two models of a distillation: the pruned folder and its dense model."""

import contextlib
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ace_ext.engine.embeddings import relative_change
from ace_ext.errors import InputError
from ace_ext.fingerprint import tensor_sha256
from ace_ext.models.block_store import BlockSource, OffloadedBlocks, ResidentBlocks
from ace_ext.models.blocks import Block
from ace_ext.models.location import locate
from ace_ext.models.safetensors_files import Shards, has_safetensors
from ace_ext.packed.files import is_packed
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import PruneReport
from ace_ext.runs.heal_request import HealRequest
from ace_ext.runs.model_source import Source, open_source
from ace_ext.runs.options import RunOptions, RunRequest

NO_OFFLOAD = RunOptions(offload="none")


def open_pruned(request: HealRequest, report: PruneReport) -> Source:
    """The skeleton of the pruned folder; its blocks have the matrices that were pruned.

    Raises:
        InputError: its weights are not in safetensors as they would be loaded; or text is given for a model that was
            calibrated on images or sound.
    """
    folder = request.folder
    inputs = report.extra.get("calibration", {}).get("inputs")
    if request.text.reads_text and inputs is not None and "input_ids" not in inputs:
        raise InputError(
            f"calibration {request.text.source!r} is text, and {folder!r} was calibrated on images or sound; give such"
        )
    if is_packed(folder):
        raise InputError(f"{folder!r} is packed; give the dense folder, which ace-prune unpack writes")
    if not has_safetensors(folder):
        raise InputError(f"{folder!r} has no safetensors; give a folder that ace-prune run wrote")
    source = open_source(RunRequest(folder, config_of(report), request.text, NO_OFFLOAD, request.device), weights=False)
    if source.files.shards is None:
        raise InputError(f"{folder!r} does not store every parameter unchanged; give a folder that ace-prune run wrote")
    return source


class HealedBlocks(OffloadedBlocks):
    """The blocks of a pruned folder while it is healed: trained ones are read from the output, all others from the
    pruned folder. Blocks that this run did not finish are not read from the output.

    Args:
        pruned: the pruned folder.
        output: the files of the output.
        trained: the names of trained blocks; it grows during the run.
        device: where blocks run.
    """

    def __init__(self, pruned: Source, output: Shards, trained: Container[str], device: torch.device) -> None:
        super().__init__(pruned.blocks, output, device)
        assert pruned.files.shards is not None  # see open_pruned
        self._pruned, self._trained = pruned.files.shards, trained

    def shards_of(self, block: Block) -> Shards:
        """The output's files for a trained block, else those of the pruned folder."""
        return self.shards if block.name in self._trained else self._pruned


def dense_name(given: str | None, report: PruneReport) -> str:
    """The dense model: the one that is given, or the one that the report names.

    Raises:
        InputError: it does not exist.
    """
    name = given or report.extra.get("model")
    if not name:
        raise InputError("dense: the report does not name the model that was pruned; give it with --dense")
    try:
        locate(name)
    except InputError as error:
        if given:
            raise
        raise InputError(
            f"dense: the report names a model that does not exist here ({error}); give it with --dense"
        ) from error
    return str(name)


def dense_request(name: str, request: HealRequest, report: PruneReport) -> RunRequest:
    """The request that opens the dense model in the dtype of the pruned one."""
    options = replace(NO_OFFLOAD, max_memory=request.options.max_memory)
    return RunRequest(name, config_of(report), request.text, options, request.device, report.dtype)


def config_of(report: PruneReport) -> PruneConfig:
    """A configuration that selects the matrices of the pruning run. It accepts any share of dense weights."""
    found = report.config
    return PruneConfig(skip=tuple(found["skip"]), towers=tuple(found.get("towers", ())), max_dense=1.0)


def whole_bytes(source: Source) -> int:
    """Peak bytes of loading a model whole. 0 if its blocks can be read one at a time; this is assumed if only its
    shapes are known. ``source``: its skeleton."""
    if source.files.shards is not None or source.shapes_only:
        return 0
    unpacking = 0 if source.unpacking is None else source.unpacking.peak_bytes
    return unpacking + sum(parameter.nbytes for parameter in source.model.parameters())


@contextlib.contextmanager
def running_dense(request: RunRequest, pruned: Source, report: PruneReport) -> Iterator[tuple[nn.Module, BlockSource]]:
    """The dense model and its blocks: read from its files one at a time, or loaded if these do not allow it. ``report``
    is that of the pruned model.

    Raises:
        InputError: it is not the model that was pruned.
    """
    source = open_source(request, weights=False)
    _check_shapes(source, pruned, smaller=bool(report.removed))
    shards = source.files.shards
    if shards is not None:
        _check_outside(source, pruned, report, shards.read)
        yield source.model, OffloadedBlocks(source.blocks, shards, request.device)
        return
    source = open_source(request)
    _check_outside(source, pruned, report, lambda name: source.model.get_parameter(name))
    yield source.model, ResidentBlocks(source.blocks)


def check_same_network(dense: Source, pruned: Source, report: PruneReport) -> None:
    """Checks that a network in memory is the one that was pruned; ``pruned``: the skeleton of the pruned folder, with
    its report.

    Raises:
        InputError: it is not.
    """
    _check_shapes(dense, pruned, smaller=False)
    _check_outside(dense, pruned, report, dense.model.get_parameter)


def _shapes(source: Source, outside: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters, or of those outside the blocks."""
    inside = tuple(f"{block.name}." for block in source.blocks) if outside else ()
    named = source.model.named_parameters()
    return {name: tuple(p.shape) for name, p in named if not (outside and name.startswith(inside))}


def _check_shapes(dense: Source, pruned: Source, smaller: bool) -> None:
    found, wanted = _shapes(dense, smaller), _shapes(pruned, smaller)
    if found == wanted:
        return
    name = next(name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name))
    raise InputError(
        f"dense must be the model that was pruned: {name} is {found.get(name)} in {dense.files.name!r}, and "
        f"{wanted.get(name)} in {pruned.files.name!r}"
    )


def _check_outside(dense: Source, pruned: Source, report: PruneReport, read: Callable[[str], Tensor]) -> None:
    """Checks that all weights outside the blocks are the same, bit for bit: pruning does not change them. Rounded
    embeddings must have changed as much as the report says. One parameter is in memory at a time."""
    shards = pruned.files.shards
    assert shards is not None  # see open_pruned
    rounded = {name: table.relative_error for table in report.embeddings for name in table.names}
    inside = tuple(f"{block.name}." for block in pruned.blocks)
    for name, _ in pruned.model.named_parameters():
        if name.startswith(inside):
            continue
        if name in rounded:
            same = math.isclose(relative_change(read(name).detach(), shards.read(name)), rounded[name], rel_tol=1e-9)
        else:
            same = tensor_sha256(shards.read(name)) == tensor_sha256(read(name))
        if not same:
            how = " by more than its rounding" if name in rounded else ", and pruning does not change it"
            raise InputError(
                f"dense must be the model that was pruned: {name} of {dense.files.name!r} differs from "
                f"{pruned.files.name!r}{how}"
            )
