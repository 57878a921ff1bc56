"""Finds the units of each block that can be removed, neurons or groups of heads, and the settings with their number.

Settings of the configuration are changed, the class is laid out with them, and the shapes are compared. They hold the
number of units if each block has exactly one matrix with other columns, and all other changed parameters have other
rows.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.fused_weights import FusedWeight
from ace_ext.pruning import removal
from ace_ext.structures.smaller import laid_out, numbers_of, shapes_of, standard_names

_FEED_FORWARD = re.compile(r"inner|ffn|feed_?forward|intermediate|mlp")
"""Names of numbers that are tried first. They may be None in a configuration: the class then computes them from the
hidden size."""


@dataclass(frozen=True)
class Cut:
    """A parameter of which a part stays with each unit."""

    name: str
    """Its full name."""
    dim: int
    """The dimension that counts units."""
    copies: int = 1
    """How often each unit is there: twice if two matrices are stored one above the other."""
    width: int = 1
    """How many neighbouring entries each unit has there, such as the rows of a head."""

    def keep(self, tensor: Tensor, kept: Tensor, count: int) -> Tensor:
        """``tensor`` without the entries of other units than ``kept [k]``, ascending, of ``count``."""
        own = entries(kept, self.width)
        index = torch.cat([own + copy * count * self.width for copy in range(self.copies)])
        return tensor.index_select(self.dim, index.to(tensor.device))

    def keep_of(self, tensor: Tensor, expert: int | None, kept: Tensor, count: int) -> Tensor:
        """As :meth:`keep`; of one expert's entry, if the tensor has one for each."""
        if expert is None:
            return self.keep(tensor, kept, count)
        return replace(self, dim=self.dim - 1).keep(tensor[expert], kept, count)


def entries(units: Tensor, width: int) -> Tensor:
    """The entries ``[k * width]`` of ``units [k]`` with ``width`` neighbouring entries each."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


@dataclass(frozen=True)
class UnitsOfBlock:
    """Units of a block. Unit j is some neighbouring columns of the matrix ``last``, and entries of each cut."""

    count: int
    last: str
    """The Linear that reads the units, by its name in the block."""
    columns: Cut
    rows: tuple[Cut, ...]
    expert: int | None = None
    """The expert whose neurons these are, by its place in tensors with an entry for each expert; None: of no expert."""

    @property
    def width(self) -> int:
        """The columns of a unit."""
        return self.columns.width

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All parameters that become smaller."""
        return (*self.rows, self.columns)


@dataclass(frozen=True)
class Found:
    """The units of a model. All its blocks have the same number of them."""

    settings: dict[str, Any]
    """The settings that hold the number, with their present values; the report names the first. A value is a number, a
    list with one for each block, or None."""
    parts: tuple[tuple[UnitsOfBlock, ...], ...]
    """Those of each block: none, one, or one for each expert and one for experts that see all tokens."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Settings that must be written so that others do not follow from the number."""

    @property
    def present(self) -> list[UnitsOfBlock]:
        """The units of all blocks: of one block at least."""
        return [own for part in self.parts for own in part]

    @property
    def cuts(self) -> list[Cut]:
        """All parameters that become smaller, each once."""
        return [*{cut.name: cut for own in self.present for cut in own.cuts}.values()]

    @property
    def layouts(self) -> list["Found"]:
        """The possible places of units in tensors of experts that hold two matrices: one above the other, or with
        alternating rows. Both give the same shapes."""
        if all(own.expert is None or all(row.copies == 1 for row in own.rows) for own in self.present):
            return [self]
        parts = tuple(tuple(_alternating(own) for own in part) for part in self.parts)
        return [self, replace(self, parts=parts)]

    @property
    def count(self) -> int:
        """The number of units of a block."""
        return self.present[0].count

    @property
    def setting(self) -> str:
        """The name of the setting that the report names."""
        return next(iter(self.settings))

    def number(self, units: int) -> int:
        """The value of this setting for so many units."""
        value = self.settings[self.setting]
        return value // self.count * units if isinstance(value, int) else units

    def changes(self, kept: int) -> dict[str, Any]:
        """The change of the configuration for ``kept`` units."""
        return {**_scaled(self.settings, self.count, kept), **self.fixed}


def _alternating(own: UnitsOfBlock) -> UnitsOfBlock:
    if own.expert is None:
        return own
    return replace(own, rows=tuple(replace(row, copies=1, width=row.copies * row.width) for row in own.rows))


def _scaled(settings: Mapping[str, Any], count: int, kept: int) -> dict[str, Any]:
    return {
        name: [kept] * len(value) if isinstance(value, list) else kept if value is None else value // count * kept
        for name, value in settings.items()
    }


def find_units(model: nn.Module, blocks: list[Block], part: removal.Heads | removal.Neurons) -> Found:
    """The units of a model that ``part`` removes.

    Raises:
        InputError: there are none, or no settings of the configuration change them alone.
    """
    if shapes_of(laid_out(model, {})) != shapes_of(model):
        raise InputError("remove: the model does not have the shapes that its configuration gives; load it again")
    return find_heads(model, blocks, part) if isinstance(part, removal.Heads) else find_neurons(model, blocks)


def find_heads(model: nn.Module, blocks: list[Block], part: removal.Heads) -> Found:
    """The groups of heads of a model: the query heads that share a KV head.

    Raises:
        InputError: the class has one group, gives heads another size if there are fewer, or its attention has another
            layout.
    """
    settings, names = numbers_of(model), standard_names(model)
    query, shared = (names.get(name, name) for name in ("num_attention_heads", "num_key_value_heads"))
    heads, groups = settings.get(query), settings.get(shared)
    groups = heads if groups is None else groups
    kind = type(model).__name__
    if not isinstance(heads, int) or not isinstance(groups, int) or groups < 1 or heads % groups:
        raise InputError(f"remove: the configuration of {kind} does not say how many heads a block has")
    if groups == 1:
        raise InputError(f"remove: all heads of {kind} share one KV head; leave out heads")
    size = names.get("head_dim", "head_dim")
    if size not in settings:  # transformers may read one, but vLLM does not for Qwen2, OLMoE and others
        raise InputError(
            f"remove: the configuration of {kind} has no {size}, so engines derive the size of a head from {query}, "
            "and fewer heads would be larger ones; leave out heads"
        )
    own = {query: heads} if settings.get(shared) is None else {query: heads, shared: groups}
    fixed = {size: settings[size] or settings["hidden_size"] // heads}
    kept = part.kept(groups)
    now, then = shapes_of(model), shapes_of(laid_out(model, _scaled(own, groups, kept) | fixed))
    try:
        parts = _parts(blocks, now, then, groups, kept)
    except InputError as error:
        raise InputError(f"remove: the heads of {kind} cannot be removed: {error}") from error
    if parts is None:
        raise InputError(f"remove: {query} changes no weight of {kind}; leave out heads")
    return Found(own, parts, fixed)


def find_neurons(model: nn.Module, blocks: list[Block]) -> Found:
    """The neurons of a model's feed-forward parts. With experts these are the experts' neurons, and those of the parts
    whose number follows from the same setting.

    Raises:
        InputError: experts are in lists of modules, or no number of the configuration changes the feed-forward parts
            alone.
    """
    for block in blocks:
        if block.expert_lists:
            raise InputError(
                f"remove: neurons of experts in lists of modules are not removed ({block.name} has such); leave out "
                "neurons"
            )
    mixture = any(block.experts for block in blocks)
    now = shapes_of(model)
    widths = {linear.weight.shape[1] for block in blocks for linear in block.linears.values()}
    reasons = []
    for name, value, count in _candidates(numbers_of(model), widths):
        smaller = max(1, count // 2)
        try:
            then = shapes_of(laid_out(model, _scaled({name: value}, count, smaller)))
            parts = _parts(blocks, now, then, count, smaller)
        except InputError as error:
            reasons.append(f"{name}: {error}")
            continue
        if parts is None:
            continue
        found = Found({name: value}, parts)
        units = found.present
        if any(own.expert is not None for own in units) if mixture else all(own.width == 1 for own in units):
            return found
    raise InputError(
        f"remove: no number in the configuration of {type(model).__name__} changes the neurons of its feed-forward "
        f"parts alone{'; ' if reasons else ''}{'; '.join(reasons)[:300]}"
    )


def _candidates(settings: Mapping[str, Any], widths: set[int]) -> Iterator[tuple[str, Any, int]]:
    """Settings that may be the number of neurons: name, value, and the number."""
    for name, value in sorted(settings.items(), key=lambda item: _FEED_FORWARD.search(item[0]) is None):
        if isinstance(value, int) and not isinstance(value, bool) and value in widths:
            yield name, value, value
        elif isinstance(value, list | tuple) and any(list(value) == [width] * len(value) for width in widths) and value:
            yield name, list(value), value[0]
    for name, value in settings.items():
        if value is None and _FEED_FORWARD.search(name):
            for width in sorted(widths, reverse=True):
                yield name, None, width


def _parts(
    blocks: list[Block],
    now: Mapping[str, tuple[int, ...]],
    then: Mapping[str, tuple[int, ...]],
    count: int,
    smaller: int,
) -> tuple[tuple[UnitsOfBlock, ...], ...] | None:
    """The parts whose sizes change from ``count`` to ``smaller``; None if nothing changes.

    Raises:
        InputError: something else changes.
    """
    each = zip(blocks, cuts_of(blocks, now, then, count, smaller), strict=True)
    found = tuple(_units_of(block, cuts, count, now) for block, cuts in each)
    return found if any(found) else None


def cuts_of(
    blocks: list[Block],
    now: Mapping[str, tuple[int, ...]],
    then: Mapping[str, tuple[int, ...]],
    count: int,
    smaller: int,
) -> Iterator[list[Cut]]:
    """The cuts of each block whose number of units changes from ``count`` to ``smaller``; none of other blocks.

    Args:
        blocks: of a model.
        now: the shapes of its tensors by name.
        then: those of the smaller model.
        count: the number of units.
        smaller: that of the smaller model.

    Raises:
        InputError: something else changes.
    """
    if now.keys() != then.keys():
        raise InputError("it changes which weights there are")
    changed = {name for name in now if now[name] != then[name]}
    for block in blocks:
        own = sorted(name for name in changed if name.startswith(f"{block.name}."))
        changed -= set(own)
        yield [_cut(name, now[name], then[name], count, smaller) for name in own]
    if changed:
        raise InputError(f"it also changes {min(changed)}")


def _cut(name: str, now: tuple[int, ...], then: tuple[int, ...], count: int, smaller: int) -> Cut:
    """The cut of a parameter whose shape changes with the number of units.

    Raises:
        InputError: another dimension changes, or by another number.
    """
    dims = [dim for dim in range(len(now)) if len(now) == len(then) and now[dim] != then[dim]]
    if len(dims) == 1:
        size = now[dims[0]] // count
        if (now[dims[0]], then[dims[0]]) == (size * count, size * smaller):
            return Cut(name, dims[0], width=size)
    raise InputError(f"it changes {name} from {list(now)} to {list(then)}")


def _units_of(
    block: Block, cuts: list[Cut], count: int, now: Mapping[str, tuple[int, ...]]
) -> tuple[UnitsOfBlock, ...]:
    """The units of a block with these cuts: of its experts, and of the other matrices."""
    fused = {f"{block.name}.{fused.name}": fused for fused in block.experts}
    owners = {name.rpartition(".")[0] for name in fused}
    routed = [cut for cut in cuts if cut.name in fused or cut.name.rpartition(".")[0] in owners]
    plain = [cut for cut in cuts if cut not in routed]
    found = [_part(block, plain, count, now)] if plain else []
    for own in _by_module(routed, fused):
        found += _experts(block, own, fused, count)
    return tuple(found)


def _by_module(cuts: list[Cut], fused: Mapping[str, FusedWeight]) -> list[list[Cut]]:
    """The cuts of each module of experts; all together if a module has only a part of an expert's matrices."""
    modules: dict[str, list[Cut]] = {}
    for cut in cuts:
        modules.setdefault(cut.name.rpartition(".")[0], []).append(cut)
    whole = all(any(_reads(cut, fused) for cut in own) for own in modules.values())
    return [*modules.values()] if whole else [cuts]


def _reads(cut: Cut, fused: Mapping[str, FusedWeight]) -> bool:
    """Whether the units are columns of the experts' matrices in this tensor."""
    return cut.name in fused and cut.dim == (1 if fused[cut.name].layout.transposed else 2)


def _experts(block: Block, cuts: list[Cut], fused: Mapping[str, FusedWeight], count: int) -> list[UnitsOfBlock]:
    """The units of each expert of a module with these cuts."""
    columns = [cut for cut in cuts if _reads(cut, fused)]
    rows = [replace(cut, copies=cut.width, width=1) for cut in cuts if cut not in columns]
    if len(columns) != 1 or columns[0].width != 1 or not rows or any(row.dim < 1 or row.copies > 2 for row in rows):
        raise InputError(f"in {block.name} it changes tensors of experts that ace_ext does not know")
    last = fused[columns[0].name]
    if any(row.name in fused and fused[row.name].layout.count != last.layout.count for row in rows):
        raise InputError(f"in {block.name} tensors of experts have different numbers of them")
    return [UnitsOfBlock(count, child, columns[0], tuple(rows), expert) for expert, child in enumerate(last.linears)]


def _part(block: Block, cuts: list[Cut], count: int, now: Mapping[str, tuple[int, ...]]) -> UnitsOfBlock:
    """The units of a block with these cuts: one of columns, and others of rows, or of vectors such as biases. If units
    are single columns, two rows of a unit are those of two matrices one above the other; otherwise they are
    neighbours."""
    columns: list[tuple[Cut, str]] = []
    rows: list[Cut] = []
    for cut in cuts:
        child = cut.name.removeprefix(f"{block.name}.").removesuffix(".weight")
        linear = block.linears.get(child)
        of_columns = 0 if block.is_transposed(child) else 1
        is_matrix = linear is not None and cut.name.endswith(".weight")
        if not is_matrix and len(now[cut.name]) > 1:
            raise InputError(f"it changes {cut.name}, which is not a matrix that ace_ext prunes")
        if is_matrix and cut.dim == of_columns:
            columns.append((cut, child))
        else:
            rows.append(cut)
    if len(columns) != 1 or not rows:
        raise InputError(f"in {block.name} it changes the columns of {len(columns)} matrices, not of one")
    cut, child = columns[0]
    if cut.width == 1:
        rows = [replace(row, copies=row.width, width=1) for row in rows]
        if any(row.copies > 2 for row in rows):
            raise InputError(f"it changes {max(rows, key=lambda row: row.copies).name}, which has other rows too")
    return UnitsOfBlock(count, child, cut, tuple(rows))
