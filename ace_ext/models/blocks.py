"""Finds a model's blocks and their prunable weights by structure, without knowing the model family.

A block is a decoder layer: an element of the outermost ``nn.ModuleList`` that holds the most parameters, among those
beside the embedding of the tokens.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import token_embedding
from ace_ext.models.derived_weights import DTYPES, refuse_derived
from ace_ext.models.experts import FusedExperts, find_experts
from ace_ext.models.patterns import search_within

CHECKED_AT_ONCE = 2**22
"""Elements of a matrix that :func:`check_weights` reads at a time."""
MATCH_SECONDS = 0.25
"""The most processor time that a pattern of ``skip`` may take for one name."""


@dataclass(frozen=True)
class Block:
    """A decoder layer: its full name in the model, the module, and its prunable Linears (those of fused experts
    included) by their name in the block."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    experts: tuple[FusedExperts, ...] = ()

    def full_name(self, linear: str) -> str:
        """The name in the model of a Linear that is named by its name in the block."""
        return f"{self.name}.{linear}"

    def is_expert(self, linear: str) -> bool:
        """Whether the Linear is the matrix of a fused expert, which sees only the tokens that the router sends it."""
        return any(linear in fused.linears for fused in self.experts)

    def as_it_is(self) -> "Block":
        """The block with its present parameters: it keeps them when those of the module are replaced or dropped."""
        twins: dict[int, nn.Module] = {}

        def twin_linears(linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
            return {child: cast("nn.Linear", _twin(linear, twins)) for child, linear in linears.items()}

        module = _twin(self.module, twins)
        experts = [FusedExperts(_twin(e.owner, twins), e.name, twin_linears(e.linears)) for e in self.experts]
        return Block(self.name, module, twin_linears(self.linears), tuple(experts))

    def expert_stages(self) -> list[list[str]]:
        """The names of the prunable Linears, one list for each fused tensor. Linears of one list do not feed each
        other, so they can be pruned together."""
        return [[child for child in fused.linears if child in self.linears] for fused in self.experts]


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """A module that shares everything with ``module`` but the dicts of its parameters, buffers and children; the
    children are such modules too. ``twins``: those made before, by the id of the original."""
    if id(module) not in twins:
        twin = module.__new__(type(module))
        twin.__dict__ = {**module.__dict__, "_parameters": {**module._parameters}, "_buffers": {**module._buffers}}
        twin._modules = {name: child and _twin(child, twins) for name, child in module._modules.items()}
        twins[id(module)] = twin
    return twins[id(module)]


def find_blocks(model: nn.Module, skip: Iterable[str] = (), check: bool = True) -> list[Block]:
    """The decoder layers in order, each with the Linears to prune; ``check=False`` leaves :func:`check_weights` out,
    for a model whose weights are not loaded.

    Raises:
        InputError: no list of blocks is found; a block has no Linear to prune; a block keeps weights in a form that is
            not pruned (expert weights with the output last, transposed ``Conv1D``) and that ``skip`` does not name; two
            blocks share one weight; a weight is not a plain float32, float16 or bfloat16 matrix.
    """
    skip = tuple(skip)
    patterns = [_compile(pattern) for pattern in skip]
    name, modules = _block_list(model)
    blocks: list[Block] = []
    names: list[str] = []
    for index, module in enumerate(modules):
        full = f"{name}.{index}"
        fused_experts = find_experts(module)
        names += [f"{full}.{weight}" for weight in _weights_of(module, fused_experts)]
        routers = _routers(module, fused_experts)
        experts = tuple(fused for fused in fused_experts if not _matches(f"{full}.{fused.name}", patterns))
        linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" not in routers}
        for fused in experts:
            linears |= fused.linears
        linears = {n: linear for n, linear in linears.items() if not _matches(f"{full}.{n}", patterns)}
        refuse_derived(full, module, linears)
        _refuse_other_weights(full, module, patterns, routers | {fused.name for fused in experts})
        blocks.append(Block(full, module, linears, experts))
    names += _check_second_list(model, name, patterns)
    unused = [pattern.pattern for pattern in patterns if not any(_matches(name, [pattern]) for name in names)]
    if unused:
        raise InputError(f"skip {unused[0][:100]!r} matches no weight of the blocks; ace-prune plan shows their names")
    if not any(block.linears for block in blocks):
        raise InputError(f"skip leaves no Linear to prune in {name} (got {', '.join(skip) or 'nothing to skip'})")
    _refuse_tied(model, name, blocks)
    if check:
        check_weights(blocks)
    return blocks


def _refuse_tied(model: nn.Module, name: str, blocks: Iterable[Block]) -> None:
    """Refuses Linears that share their weight with a module outside the blocks, such as the embedding, which is not
    pruned.

    Raises:
        InputError: naming the first.
    """
    named = model.named_parameters(remove_duplicate=False)
    outside = {id(parameter): other for other, parameter in named if not other.startswith(f"{name}.")}
    for block in blocks:
        for child, linear in block.linears.items():
            if id(linear.weight) in outside:
                raise InputError(
                    f"{block.full_name(child)}.weight is the same tensor as {outside[id(linear.weight)]}, which is not "
                    "pruned; pass it in skip"
                )


def _weights_of(module: nn.Module, experts: Iterable[FusedExperts]) -> list[str]:
    """The names in the block that ``skip`` is compared with: of Linears and experts, and of matrices that no Linear
    holds."""
    names = [name for name, _ in module.named_modules()]
    names += [name for name, parameter in module.named_parameters() if parameter.dim() > 1]
    return names + [child for fused in experts for child in fused.linears]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, TypeError) as error:
        raise InputError(f"skip must be regular expressions (got {str(pattern)[:100]!r}: {error})") from error


def _matches(name: str, patterns: list[re.Pattern[str]]) -> bool:
    return any(search_within(MATCH_SECONDS, pattern, name) for pattern in patterns)


def _check_second_list(model: nn.Module, name: str, patterns: list[re.Pattern[str]]) -> list[str]:
    """The names of blocks of the same kind in other lists, if ``skip`` names all of them: they stay dense.

    Raises:
        InputError: naming the list, unless ``skip`` names each of its blocks.
    """
    lists = _outermost_lists(model)
    kinds = {type(module) for module in lists[name]}
    found = []
    for other, modules in lists.items():
        alike = [f"{other}.{i}" for i, module in enumerate(modules) if other != name and type(module) in kinds]
        if any(not _matches(block, patterns) for block in alike):
            raise InputError(
                f"model has a second list of blocks, {other} ({len(alike)} blocks), which would stay dense: only "
                f"{name} is pruned; to leave it dense on purpose, pass skip={re.escape(other)!r}"
            )
        found += alike
    return found


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    def size(modules: nn.ModuleList) -> int:
        return sum(p.numel() for p in modules.parameters())

    outermost = _outermost_lists(model)
    if not outermost:
        raise InputError(f"model has no list of decoder blocks (nn.ModuleList) to prune (got {type(model).__name__})")
    name = max(_beside_embedding(model, outermost) or outermost, key=lambda key: size(outermost[key]))
    return name, outermost[name]


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules that are in no other list, by name."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(other + ".") for other in lists) and name
    }


def _beside_embedding(model: nn.Module, lists: Iterable[str]) -> list[str]:
    """Those of the named lists that are in the smallest part of a model that also holds the embedding of its tokens: a
    model that sees has more blocks than those of its language part, which may be larger. Empty if there are none."""
    embedding = token_embedding(model)
    place = next((name for name, module in model.named_modules() if module is embedding), "")
    while place:
        place = place.rpartition(".")[0]
        found = [name for name in lists if name.startswith(f"{place}." if place else "")]
        if found:
            return found
    return []


def _routers(module: nn.Module, experts: Iterable[FusedExperts]) -> set[str]:
    """Names in the block of the matrices that choose among experts, or scale what a shared one adds. They stay dense:
    they are tiny, and a wrong choice of experts costs more than a wrong weight.

    They are found by shape, beside the experts: as many rows as there are experts, or one.
    """
    counts = {fused.name.rpartition(".")[0]: len(fused.tensor) for fused in experts}
    counts |= {name: len(m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    found = set()
    for holder, count in counts.items():
        mixture = holder.rpartition(".")[0]
        for name, parameter in module.get_submodule(mixture).named_parameters(prefix=mixture):
            if not name.startswith(f"{holder}.") and parameter.dim() == 2 and parameter.shape[0] in (1, count):
                found.add(name)
    return found


def _refuse_other_weights(block: str, module: nn.Module, patterns: list[re.Pattern[str]], known: set[str]) -> None:
    """Refuses matrices that no Linear holds, which would silently stay dense. ``known``: parameters, by their names in
    the block, that may be there."""
    for owner, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            full = ".".join(part for part in (block, owner, name) if part)
            if isinstance(child, nn.Linear | nn.Embedding) or parameter.dim() < 2 or _matches(full, patterns):
                continue
            if full.removeprefix(f"{block}.") in known:
                continue
            raise InputError(
                f"{full} {list(parameter.shape)} of {type(child).__name__} is no weight of an nn.Linear and cannot "
                f"be pruned; to leave it dense on purpose, pass skip={re.escape(owner)!r}"
            )


def check_weights(blocks: list[Block]) -> None:
    """Checks that each weight is loaded, finite, of a dtype that the ops take, and not shared with another Linear.

    Raises:
        InputError: naming the first weight that is not.
    """
    seen: dict[int, str] = {}
    for block in blocks:
        for child, linear in block.linears.items():
            name, weight = block.full_name(child), linear.weight
            if weight.is_meta or weight.dtype not in DTYPES:
                found = "a tensor without data" if weight.is_meta else str(weight.dtype)
                raise InputError(f"{name}.weight must be loaded as float32, float16 or bfloat16 (got {found})")
            if id(weight) in seen:
                raise InputError(f"{name}.weight is the same tensor as {seen[id(weight)]}; pass one of them in skip")
            seen[id(weight)] = f"{name}.weight"
            where = _first_not_finite(weight)
            if where is not None:
                raise InputError(f"{name}.weight must be finite (got {weight[tuple(where)].item()} at index {where})")
        for name, vector in block.module.named_parameters():  # norms and biases
            if vector.dim() == 1 and not vector.is_meta and not bool(torch.isfinite(vector).all()):
                raise InputError(f"{block.name}.{name} must be finite (it holds NaN or infinity)")


def _first_not_finite(weight: Tensor) -> list[int] | None:
    """``[row, column]`` of the first NaN or infinity in ``[rows, cols]``; None without one.

    Some rows at a time: ``isfinite`` allocates up to five bytes an element, which for a whole matrix would set the
    peak of a run that holds one block. The sum comes first because it is faster: if it is finite, so is each term.
    """
    step = max(1, CHECKED_AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        part = weight.detach()[start : start + step]
        if math.isfinite(part.sum(dtype=torch.float32)):
            continue
        bad = (~torch.isfinite(part)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            return [start + row, column]
    return None
