"""The removal of structures in a run on files: from the model in memory, and by shapes alone for a plan."""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ace_ext.engine.api import planned_smaller, remove_structures
from ace_ext.engine.context import RunContext
from ace_ext.engine.inputs import model_inputs
from ace_ext.engine.progress import Progress
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.run_mode import run_mode
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.removal import Neurons, Removal
from ace_ext.records import REPORT_NAME, Removed
from ace_ext.runs.model_source import Source
from ace_ext.runs.options import RunRequest
from ace_ext.runs.output import read_report

_TRIED = 512
"""The most columns of the trial of :func:`seconds_of_units`."""


_VARIES = "parameters and bytes are an estimate: the blocks differ in size, and the run measures which of them go"


@dataclass(frozen=True)
class Smaller:
    """The model that stays, from shapes alone, and a record of each kind of structure that goes."""

    model: nn.Module
    blocks: list[Block]
    removed: list[Removed]
    estimate: str
    """Why another model may stay than this one; empty if none can."""


def smaller_of(source: Source, config: PruneConfig, rehearse: bool = False) -> Smaller:
    """What a run would leave of a model. Checks that zeros can follow.

    Args:
        source: may be a skeleton.
        config: has ``remove``.
        rehearse: tries it with random weights. A run tries it with the model's own.

    Raises:
        InputError: the structures cannot be removed, or the pattern does not fit the smaller model.
    """
    from ace_ext.structures.rehearsal import Rehearsal  # imported here: most runs remove no structure

    found = find_blocks(source.model, check=False)  # without skip, which is for zeros
    check = Rehearsal(source.model, found) if rehearse else lambda wanted: None
    model, blocks, removed = planned_smaller(source.model, found, config, check)
    sizes = {sum(parameter.numel() for parameter in block.module.parameters()) for block in found}
    varies = len(sizes) > 1 and any(record.kind == "blocks" for record in removed)
    return Smaller(model, blocks, removed, _VARIES if varies else "")


def remove_from_(source: Source, request: RunRequest, tokens: Tensor, progress: Progress) -> list[Removed]:
    """Removes structures from the model in memory. Its files no longer hold the weights of the output.

    Args:
        source: loaded; it gets the smaller model's blocks.
        request: its configuration has ``remove``.
        tokens: the calibration samples, ``[nsamples, seqlen]``.
        progress: shows the steps.

    Raises:
        InputError: they cannot be removed.
    """
    config, model = request.config, source.model
    if _has_zeros(source.files.folder):
        progress.note(
            "the model was pruned or quantized before: matrices that the removal fits lose their zeros or their grid; "
            "with refit=none they keep them"
        )
    with run_mode(model):
        ready = list(model_inputs(model, tokens, config, request.device))
        removed = remove_structures(model, ready, config, RunContext(observer=progress))
    source.blocks = find_blocks(model, config.skip, max_dense=config.dense_limit)
    source.files = replace(source.files, shards=None)
    return removed


def _has_zeros(folder: Path | None) -> bool:
    """Whether a model's folder is one that a run pruned or quantized, by its report."""
    if folder is None or not (folder / REPORT_NAME).is_file():
        return False
    with suppress(InputError):  # a report that cannot be read says nothing
        return not read_report(folder).only_removed
    return False


def removal_seconds(source: Source, wanted: Removal, tokens: int, token_seconds: float) -> float:
    """About how long a removal takes.

    Args:
        source: the dense model; may be a skeleton.
        wanted: the structures.
        tokens: of the calibration.
        token_seconds: how long a token takes in a block, at most.
    """
    blocks, seconds = len(source.blocks), 0.0
    if wanted.params is not None:
        from ace_ext.structures.choice import MOST  # imported here: most runs remove no structure

        one = Removal((Neurons(wanted.params.share),))
        return MOST * removal_seconds(source, one, tokens, token_seconds)
    if wanted.scored:
        return sum(removal_seconds(source, one, tokens, token_seconds) for one in wanted.scored)
    if wanted.blocks is not None:
        gone = wanted.blocks.removed(blocks)
        seconds += sum(blocks - number for number in range(gone)) * tokens * token_seconds
        blocks -= gone
    if wanted.experts is not None:
        seconds += blocks * tokens * token_seconds
    for wanted_units in wanted.units:
        from ace_ext.structures.search import find_units  # imported here: most runs remove no structure

        found = find_units(source.model, find_blocks(source.model, check=False), wanted_units)  # without skip
        part, each = found.present[0], max(len(units) for units in found.parts)
        shape = source.model.get_parameter(part.columns.name).shape
        outputs = shape[-1] if part.columns.dim == len(shape) - 2 else shape[-2]
        seconds += blocks * (3 * tokens * token_seconds + each * seconds_of_units(part.count * part.width, outputs))
    return seconds


def seconds_of_units(columns: int, outputs: int) -> float:
    """About how long scores and least squares of one block take, extrapolated from at most :data:`_TRIED` columns with
    random numbers."""
    from ace_ext.structures.moments import Moments, fitted
    from ace_ext.structures.scores import greedy

    few, rows = min(columns, _TRIED), min(outputs, _TRIED)
    generator = torch.Generator().manual_seed(0)
    moments = [Moments(few, torch.device("cpu")) for _ in range(2)]
    for part in moments:
        part.add_(torch.randn(2 * few, few, generator=generator), torch.ones(2 * few))
    weight = torch.randn(rows, few, generator=generator)
    start = time.perf_counter()
    fitted(moments[0], moments[1], greedy(weight, moments[0].gram, few - few // 4), weight, None)
    return (time.perf_counter() - start) * (columns / few) ** 3
