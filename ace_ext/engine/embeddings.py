"""The option ``embeddings`` of the stage ``quantize``: the token embedding and the LM head on a grid.

Both are outside the blocks and are not pruned. Each weight is rounded to the nearest point of its grid: products of the
head feed no further matrix, so there is nothing later that could compensate.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import output_head, token_embedding
from ace_ext.models.safetensors_files import Shards, all_names
from ace_ext.pruning.config import PruneConfig
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


def check_tables(model: nn.Module, config: PruneConfig) -> None:
    """Checks that a model has what the option ``embeddings`` rounds, if it is given.

    Raises:
        InputError: it has not.
    """
    stage = config.method.embeddings
    if stage is not None and not tables_of(model):
        raise InputError(
            f"embeddings={stage.bits} rounds a token embedding and an LM head, and {type(model).__name__} has "
            "neither; leave it out"
        )


def round_tables_(model: nn.Module, stage: Round) -> list[RoundedTable]:
    """Rounds the tables of a model that are in memory, in place. ``stage`` is :attr:`Method.embeddings`.

    Raises:
        InputError: a table is not finite, before or after. It is unchanged.
    """
    records = []
    for name, names in tables_of(model).items():
        weight = model.get_parameter(name)
        if not weight.is_meta:
            rounded = torch.empty_like(weight.detach())
            records.append(_round(weight.detach(), rounded, names, stage))
            weight.data.copy_(rounded)
    return records


def round_stored_tables(model: nn.Module, shards: Shards, stage: Round) -> list[RoundedTable]:
    """Rounds the tables of a model in its files. ``model`` may be a skeleton; ``shards`` know its names. One table is
    in memory at a time.

    Raises:
        InputError: as :func:`round_tables_`; or the files do not hold a table.
    """
    records = []
    for names in tables_of(model).values():
        stored = shards.stored_name(names)
        if stored is None:
            raise InputError(f"{names[0]} is not in the files that save_pretrained writes; leave out embeddings")
        names = [stored, *(name for name in names if name != stored)]
        weight = shards.read(stored)
        records.append(_round(weight, weight, names, stage))
        shards.write({stored: weight})
    return records


def read_tables_(model: nn.Module, shards: Shards, records: list[RoundedTable]) -> list[RoundedTable]:
    """What :func:`round_tables_` does and returns, if :func:`round_stored_tables` has rounded the files."""
    for table in records:
        weight = model.get_parameter(table.names[0])
        if not weight.is_meta:
            weight.data.copy_(shards.read(table.names[0]))
    return records


def relative_change(before: Tensor, after: Tensor) -> float:
    """The mean squared change of the entries of a table, relative to their mean square; NaN if one is not finite."""
    return _ratio(sum((_squares(before[part], after[part]) for part in _parts(before)), torch.zeros(2)))


def _round(weight: Tensor, out: Tensor, names: list[str], stage: Round) -> RoundedTable:
    """Writes a table ``[rows, cols]`` on its grid to ``out``, which may be the same tensor; returns its record."""
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for part in _parts(weight):
        rounded = stage.round_plainly(weight[part])
        sums += _squares(weight[part], rounded)
        out[part] = rounded
    change = _ratio(sums)
    if not math.isfinite(change):
        raise InputError(f"{names[0]} holds NaN or infinity, or does when it is rounded; leave out embeddings")
    return RoundedTable(names, list(weight.shape), stage.bits, stage.group, change)


def _squares(before: Tensor, after: Tensor) -> Tensor:
    """The sums of the squares ``[2]`` of changes and of entries."""
    old = before.double()
    return torch.stack(((after.double() - old).square_().sum(), old.square_().sum()))


def _ratio(sums: Tensor) -> float:
    change, size = map(float, sums)
    return change / size if size else change


def _parts(weight: Tensor) -> Iterator[slice]:
    """Ranges of rows with at most ``PART_ENTRIES`` entries."""
    height = max(1, PART_ENTRIES // max(1, weight.shape[1]))
    return (slice(start, start + height) for start in range(0, len(weight), height))
