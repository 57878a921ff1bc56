"""The option ``embeddings`` of the stage ``quantize``: the token embedding and the LM head on a grid.

Both are outside the blocks and are not pruned. Each weight is rounded to the nearest point of its grid: products of the
head feed no further matrix, so there is nothing later that could compensate.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.models._transformers import output_head, token_embedding
from ace_ext.models.safetensors_files import Shards, all_names
from ace_ext.pruning.stages import Round
from ace_ext.records import RoundedTable

PART_ENTRIES = 2**20
"""Entries of a table that are rounded at a time, in whole rows, to bound the memory of temporaries."""


def tables_of(model: nn.Module) -> dict[str, list[str]]:
    """The token embedding and the LM head of a model: the first name of each weight, and all its names. One if they
    share it."""
    names = all_names(model)
    found: dict[str, list[str]] = {}
    for module in (token_embedding(model), output_head(model)):
        weight = getattr(module, "weight", None) if isinstance(module, nn.Embedding | nn.Linear) else None
        if isinstance(weight, nn.Parameter):
            own = names[id(weight)]
            found[own[0]] = own
    return found


def check_tables(model: nn.Module, stage: Round | None) -> None:
    """Checks that a model has what the option ``embeddings`` rounds.

    Raises:
        InputError: it has not.
    """
    if stage is not None and stage.embeddings and not tables_of(model):
        raise InputError(
            f"embeddings={stage.embeddings} rounds a token embedding and an LM head, and {type(model).__name__} has "
            "neither; leave it out"
        )


def round_tables_(model: nn.Module, stage: Round) -> list[RoundedTable]:
    """Rounds the tables of a model that are in memory, in place.

    Raises:
        InputError: a table is not finite, before or after. It is unchanged.
    """
    assert stage.embedding_grid is not None  # checked by the caller
    records = []
    for name, names in tables_of(model).items():
        weight = model.get_parameter(name)
        if not weight.is_meta:
            rounded, record = _rounded(weight.detach(), names, stage, stage.embedding_grid)
            weight.data.copy_(rounded)
            records.append(record)
    return records


def round_stored_tables(model: nn.Module, shards: Shards, stage: Round) -> list[RoundedTable]:
    """Rounds the tables of a model in its files. ``model`` may be a skeleton; ``shards`` know its names.

    Raises:
        InputError: as :func:`round_tables_`; or the files do not hold a table.
    """
    assert stage.embedding_grid is not None  # checked by the caller
    records = []
    for names in tables_of(model).values():
        stored = shards.stored_name(names)
        if stored is None:
            raise InputError(f"{names[0]} is not in the files that save_pretrained writes; leave out embeddings")
        names = [stored, *(name for name in names if name != stored)]
        rounded, record = _rounded(shards.read(stored), names, stage, stage.embedding_grid)
        shards.write({stored: rounded})
        records.append(record)
    return records


def relative_change(before: Tensor, after: Tensor) -> float:
    """The mean squared change of the entries of a table, relative to their mean square; NaN if one is not finite."""
    error = size = 0.0
    for part in _parts(before):
        old, new = before[part].double(), after[part].double()
        error += float((new - old).square_().sum())
        size += float(old.square_().sum())
    return error / size if size else error


def _rounded(weight: Tensor, names: list[str], stage: Round, grid: Grid) -> tuple[Tensor, RoundedTable]:
    """A table ``[rows, cols]`` on the grid, and its record."""
    rounded = torch.empty_like(weight)
    for part in _parts(weight):
        rounded[part] = stage.round_plainly(weight[part], grid)
    change = relative_change(weight, rounded)
    if not math.isfinite(change):
        raise InputError(f"{names[0]} holds NaN or infinity, or does when it is rounded; leave out embeddings")
    return rounded, RoundedTable(names, list(weight.shape), grid.bits, grid.group, change)


def _parts(weight: Tensor) -> Iterator[slice]:
    """Ranges of rows with at most ``PART_ENTRIES`` entries."""
    height = max(1, PART_ENTRIES // max(1, weight.shape[1]))
    return (slice(start, start + height) for start in range(0, len(weight), height))
