"""Under which names a model's parameters lie in safetensors.

Mostly under their own. transformers 5 fuses the experts of a mixture while it loads them and takes them apart when it
saves, so that there a parameter is put together from rows of several stored tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a stored tensor, seen as a matrix of as many columns as its last dimension has."""

    name: str
    start: int
    rows: int


@dataclass(frozen=True)
class Stored:
    """What a parameter of this shape is put together from, in order."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def layout_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Where parameters of a model lie in files that hold tensors of these names and shapes, by the parameters' names.

    Left out are parameters that lie there under their own name, and those that the files do not hold row by row. Every
    expert's matrix of a fused parameter has an entry too: ``….experts.3.down_proj.weight``, a part of
    ``….experts.down_proj``.
    """
    found: dict[str, Stored] = {}
    for parameters in _in_groups(model):
        found |= _renamed({name: p for name, p in parameters.items() if name not in shapes}, model, shapes)
        for name, parameter in parameters.items():
            if parameter.dim() == 3 and (name in shapes or name in found):
                rows = parameter.shape[:2].numel()
                whole = found.get(name) or Stored(tuple(parameter.shape), (Piece(name, 0, rows),))
                found |= _experts(name, whole)
    return found


def _in_groups(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A model's parameters by name, those of one block (of the first number in their names) at a time."""

    def number(item: tuple[str, Tensor]) -> str:
        return next((part for part in item[0].split(".") if part.isdigit()), "")

    for _, group in groupby(model.named_parameters(), number):
        yield dict(group)


def _renamed(
    parameters: dict[str, Tensor], model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Stored]:
    """What transformers saves these parameters as, as far as that moves rows and no more, and the files agree.

    Found by letting it take apart columns that hold the numbers of their rows, counted over all parameters.
    """
    columns: dict[str, Tensor] = {}
    starts: list[int] = []
    total = 0
    for name, parameter in parameters.items():
        shape = (*parameter.shape[:-1], 1) if parameter.dim() > 1 else tuple(parameter.shape)
        rows = torch.Size(shape).numel()
        columns[name] = torch.arange(total, total + rows).view(shape)
        starts.append(total)
        total += rows
    places: list[Piece | None] = [None] * total  # where the run of rows lies that begins with this one
    for stored, column in _saved_as(model, columns).items():
        if column.dtype != torch.int64 or (column.dim() > 1 and column.shape[-1] != 1):
            return {}  # more than names and rows
        for first, row, count in _runs(column.flatten(), starts):
            places[first] = Piece(stored, row, count)
    found = {}
    for (name, column), start in zip(columns.items(), starts, strict=True):
        pieces = tuple(_follow(places, start, start + column.numel()))
        width = parameters[name].shape[-1:] if column.dim() > 1 else ()
        if pieces and all(_fits(piece, width, shapes) for piece in pieces):
            found[name] = Stored(tuple(parameters[name].shape), pieces)
    return found


def _saved_as(model: nn.Module, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5: all under their own names
        return {}
    try:
        return dict(revert_weight_conversion(model, columns)) if columns else {}
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError):  # computes with shapes or values
        return {}


def _runs(numbers: Tensor, starts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive numbers in ``[rows]``, none across one of ``starts``: first number, its row, and how many."""
    if not len(numbers):
        return
    new = torch.ones_like(numbers, dtype=torch.bool)
    new[1:] = (numbers.diff() != 1) | torch.isin(numbers[1:], torch.tensor(starts))
    rows = [*new.nonzero().flatten().tolist(), len(numbers)]
    for row, following in pairwise(rows):
        yield int(numbers[row]), row, following - row


def _follow(places: list[Piece | None], row: int, end: int) -> Iterator[Piece]:
    """The pieces of the rows from ``row`` to ``end``; none where one is missing."""
    found = []
    while row < end:
        piece = places[row]
        if piece is None:
            return
        found.append(piece)
        row += piece.rows
    yield from found


def _fits(piece: Piece, width: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the files hold the stored tensor in a shape that has these rows; ``width`` is empty for a vector."""
    shape = shapes.get(piece.name)
    if shape is None:
        return False
    own, rows = (shape[-1:], shape[:-1]) if width else ((), shape)
    return tuple(own) == tuple(width) and torch.Size(rows).numel() >= piece.start + piece.rows


def _experts(name: str, whole: Stored) -> dict[str, Stored]:
    """Each expert's matrix of a fused parameter."""
    experts, rows, columns = whole.shape
    owner, _, leaf = name.rpartition(".")
    found, pieces = {}, list(whole.pieces)
    for expert in range(experts):
        own, missing = [], rows
        while missing:
            piece = pieces.pop(0)
            taken = min(missing, piece.rows)
            own.append(Piece(piece.name, piece.start, taken))
            if taken < piece.rows:
                pieces.insert(0, Piece(piece.name, piece.start + taken, piece.rows - taken))
            missing -= taken
        found[f"{owner}.{expert}.{leaf}.weight"] = Stored((rows, columns), tuple(own))
    return found
