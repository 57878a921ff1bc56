"""Finds the feed-forward part of each block, and the number of the configuration that says how large it is.

A number of the configuration is changed, the class is laid out with it, and the shapes are compared. It is the number
of neurons if each block has exactly one matrix with other columns, and all other changed parameters have other rows.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.structures.smaller import laid_out, numbers_of, shapes_of

_UNSET = re.compile(r"inner|ffn|feed_?forward|intermediate|mlp")
"""Names of numbers that may be None in a configuration: the class then computes them from the hidden size."""


@dataclass(frozen=True)
class Cut:
    """A parameter of which a part stays with each neuron."""

    name: str
    """Its full name."""
    dim: int
    """The dimension that counts neurons."""
    copies: int
    """How often each neuron has an entry there: twice if two matrices are stored one above the other."""

    def keep(self, tensor: Tensor, kept: Tensor, neurons: int) -> Tensor:
        """``tensor`` without the entries of other neurons than ``kept [k]``, ascending."""
        index = torch.cat([kept + copy * neurons for copy in range(self.copies)])
        return tensor.index_select(self.dim, index.to(tensor.device))


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of a block. Neuron j is column j of the matrix ``last``, and an entry of each cut."""

    neurons: int
    last: str
    """The Linear that reads the neurons, by its name in the block."""
    columns: Cut
    rows: tuple[Cut, ...]

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All parameters that become smaller."""
        return (*self.rows, self.columns)


@dataclass(frozen=True)
class Neurons:
    """The feed-forward parts of a model. All have the same number of neurons."""

    field: str
    """The setting of the configuration that holds the number."""
    value: Any
    """Its present value: the number, or a list with one for each block, or None."""
    parts: tuple[FeedForward | None, ...]
    """One for each block; None: the block has no such part."""

    @property
    def present(self) -> list[FeedForward]:
        """The parts that there are, at least one."""
        return [part for part in self.parts if part is not None]

    @property
    def count(self) -> int:
        """The number of neurons of a part."""
        return self.present[0].neurons

    def changes(self, kept: int) -> dict[str, Any]:
        """The change of the configuration for ``kept`` neurons."""
        return {self.field: [kept] * len(self.value) if isinstance(self.value, list) else kept}


def find_neurons(model: nn.Module, blocks: list[Block]) -> Neurons:
    """The feed-forward parts of a model.

    Raises:
        InputError: the blocks have experts, or no number of the configuration changes the feed-forward parts alone.
    """
    for block in blocks:
        if block.experts or block.expert_lists:
            raise InputError(
                f"remove: neurons of experts are not removed ({block.name} has experts); leave out neurons"
            )
    now = shapes_of(model)
    if shapes_of(laid_out(model, {})) != now:
        raise InputError("remove: the model does not have the shapes that its configuration gives; load it anew")
    widths = {linear.weight.shape[1] for block in blocks for linear in block.linears.values()}
    reasons = []
    for field, value, count in _candidates(numbers_of(model), widths):
        smaller = max(1, count // 2)
        try:
            then = shapes_of(laid_out(model, {field: [smaller] * len(value) if isinstance(value, list) else smaller}))
            parts = _parts(blocks, now, then, count, smaller)
        except InputError as error:
            reasons.append(f"{field}: {error}")
            continue
        if parts is not None:
            return Neurons(field, value, parts)
    raise InputError(
        f"remove: no number in the configuration of {type(model).__name__} changes the neurons of its feed-forward "
        f"parts alone{'; ' if reasons else ''}{'; '.join(reasons)[:300]}"
    )


def _candidates(settings: Mapping[str, Any], widths: set[int]) -> Iterator[tuple[str, Any, int]]:
    """Settings that may be the number of neurons: name, value, and the number."""
    for name, value in settings.items():
        if isinstance(value, int) and not isinstance(value, bool) and value in widths:
            yield name, value, value
        elif isinstance(value, list | tuple) and value and all(v == value[0] for v in value) and value[0] in widths:
            yield name, list(value), value[0]
    for name, value in settings.items():
        if value is None and _UNSET.search(name):
            for width in sorted(widths, reverse=True):
                yield name, None, width


def _parts(
    blocks: list[Block],
    now: Mapping[str, tuple[int, ...]],
    then: Mapping[str, tuple[int, ...]],
    count: int,
    smaller: int,
) -> tuple[FeedForward | None, ...] | None:
    """The parts whose sizes change from ``count`` to ``smaller``; None if nothing changes.

    Raises:
        InputError: something else changes.
    """
    if now.keys() != then.keys():
        raise InputError("it changes which weights there are")
    changed = {name for name in now if now[name] != then[name]}
    if not changed:
        return None
    found = []
    for block in blocks:
        own = sorted(name for name in changed if name.startswith(f"{block.name}."))
        changed -= set(own)
        cuts = [_cut(name, now[name], then[name], count, smaller) for name in own]
        found.append(_part(block, cuts, count) if cuts else None)
    if changed:
        raise InputError(f"it also changes {min(changed)}")
    return tuple(found)


def _cut(name: str, now: tuple[int, ...], then: tuple[int, ...], count: int, smaller: int) -> Cut:
    dims = [dim for dim in range(len(now)) if len(now) == len(then) and now[dim] != then[dim]]
    if len(dims) == 1:
        copies = now[dims[0]] // count
        if (now[dims[0]], then[dims[0]]) == (copies * count, copies * smaller) and copies in (1, 2):
            return Cut(name, dims[0], copies)
    raise InputError(f"it changes {name} from {list(now)} to {list(then)}")


def _part(block: Block, cuts: list[Cut], count: int) -> FeedForward:
    """The part of a block with these cuts: one of columns, and others of rows."""
    columns: list[tuple[Cut, str]] = []
    rows: list[tuple[Cut, str]] = []
    for cut in cuts:
        child = cut.name.removeprefix(f"{block.name}.").removesuffix(".weight")
        linear = block.linears.get(child)
        of_columns = 0 if block.is_transposed(child) else 1
        is_matrix = linear is not None and cut.name.endswith(".weight")
        if not is_matrix and not cut.name.endswith(".bias"):
            raise InputError(f"it changes {cut.name}, which is not a matrix that ace_ext prunes")
        (columns if is_matrix and cut.dim == of_columns else rows).append((cut, child))
    if len(columns) != 1 or columns[0][0].copies != 1 or not rows:
        raise InputError(f"in {block.name} it changes the columns of {len(columns)} matrices, not of one")
    cut, child = columns[0]
    return FeedForward(count, child, cut, tuple(cut for cut, _ in rows))
