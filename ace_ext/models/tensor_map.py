"""Finds the stored tensors, and their rows, that hold a model's parameters and buffers in safetensors files.

Most are stored under their own name. transformers 5 fuses the experts of a mixture while it loads them and
splits them when it saves, so a fused parameter is made of rows of several stored tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from ace_ext.models._transformers import saved_as
from ace_ext.models._transformers_layouts import Layout
from ace_ext.models.fused_weights import fused_parameters, names_of


@dataclass(frozen=True)
class Piece:
    """``rows`` consecutive rows of a stored tensor from row ``start`` on. The tensor is seen as a matrix: its last
    dimension is the columns, all others are the rows."""

    name: str
    start: int
    rows: int


@dataclass(frozen=True)
class Stored:
    """A parameter's shape, and the pieces that it is made of, in order. ``transposed``: the pieces make the parameter's
    transpose."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool = False


def layout_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """How files with tensors of these names and shapes hold the parameters and buffers of a model, by their names.

    Those that are stored under their own name are left out, and those that the files do not hold row by row. Each
    expert's matrix of a fused parameter has an entry of its own: ``….experts.3.down_proj.weight`` is a part of
    ``….experts.down_proj``.
    """
    found: dict[str, Stored] = {}
    for tensors in _in_groups(model):
        found |= _renamed({name: t for name, t in tensors.items() if name not in shapes}, model, shapes)
    for _, path, leaf, layout in fused_parameters(model):
        name = f"{path}.{leaf}"
        if layout.routed and (name in shapes or name in found):
            parameter = model.get_parameter(name)
            rows = parameter.shape[:-1].numel()
            whole = found.get(name) or Stored(tuple(parameter.shape), (Piece(name, 0, rows),))
            found |= _experts(path, leaf, layout, whole)
    return found


def _in_groups(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A model's parameters and stored buffers (a router's correction of its choice) by name, one block at a time: those
    with the same first number in their names."""

    def number(item: tuple[str, Tensor]) -> str:
        return next((part for part in item[0].split(".") if part.isdigit()), "")

    parameters = dict(model.named_parameters())
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    for _, group in groupby((item for item in model.state_dict().items() if item[0] not in again), number):
        yield dict(group)


def _renamed(
    parameters: dict[str, Tensor], model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Stored]:
    """The stored form of those parameters whose conversion only renames tensors and moves rows, if the files have it.

    To find it, each parameter is replaced by one column of row numbers, counted over all parameters, and transformers
    converts these columns as if it saved them: the numbers in the result tell where each row goes.
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
    places: list[Piece | None] = [None] * total  # at a row's number: the piece that begins with this row
    for stored, column in saved_as(model, columns, shapes).items():
        if column.dtype != torch.int64 or (column.dim() > 1 and column.shape[-1] != 1):
            return {}  # the conversion does more than rename tensors and move rows
        for first, row, count in _runs(column.flatten(), starts):
            places[first] = Piece(stored, row, count)
    found = {}
    for (name, column), start in zip(columns.items(), starts, strict=True):
        pieces = tuple(_follow(places, start, start + column.numel()))
        width = parameters[name].shape[-1:] if column.dim() > 1 else ()
        if pieces and all(_fits(piece, width, shapes) for piece in pieces):
            found[name] = Stored(tuple(parameters[name].shape), pieces)
    return found


def _runs(numbers: Tensor, starts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive numbers in ``numbers [rows]``, cut at each of ``starts``: first number, its row, length."""
    if not len(numbers):
        return
    new = torch.ones_like(numbers, dtype=torch.bool)
    new[1:] = (numbers.diff() != 1) | torch.isin(numbers[1:], torch.tensor(starts))
    rows = [*new.nonzero().flatten().tolist(), len(numbers)]
    for row, following in pairwise(rows):
        yield int(numbers[row]), row, following - row


def _follow(places: list[Piece | None], row: int, end: int) -> Iterator[Piece]:
    """The pieces of the rows from ``row`` to before ``end``; nothing if one of them is not stored."""
    found = []
    while row < end:
        piece = places[row]
        if piece is None:
            return
        found.append(piece)
        row += piece.rows
    yield from found


def _fits(piece: Piece, width: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the files hold the piece's tensor with these rows. ``width``: its columns, empty for a vector."""
    shape = shapes.get(piece.name)
    if shape is None:
        return False
    own, rows = (shape[-1:], shape[:-1]) if width else ((), shape)
    return tuple(own) == tuple(width) and torch.Size(rows).numel() >= piece.start + piece.rows


def _experts(path: str, leaf: str, layout: Layout, whole: Stored) -> dict[str, Stored]:
    """The stored form of each expert's matrix of a parameter. ``path``: the name of the module that owns it as
    ``leaf``."""
    rows, columns = torch.Size(whole.shape[:-1]).numel() // layout.count, whole.shape[-1]
    shape = (columns, rows) if layout.transposed else (rows, columns)
    found, pieces = {}, list(whole.pieces)
    for name in names_of(path, leaf, layout):
        own, missing = [], rows
        while missing:
            piece = pieces.pop(0)
            taken = min(missing, piece.rows)
            own.append(Piece(piece.name, piece.start, taken))
            if taken < piece.rows:
                pieces.insert(0, Piece(piece.name, piece.start + taken, piece.rows - taken))
            missing -= taken
        found[f"{name}.weight"] = Stored(shape, tuple(own), layout.transposed)
    return found
