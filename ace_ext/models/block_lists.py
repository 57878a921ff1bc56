"""Finds the lists of a model's blocks.

In a causal language model, also one that sees images or hears sounds, these are lists of its language part: of the
outermost ``nn.ModuleList`` that text goes through, the one with the most parameters, and others of about its size. In
any other network they are the lists of all its parts: encoder and decoder, or the towers of text and images.
"""

import re
from collections.abc import Callable, Iterable

from torch import nn

from ace_ext.errors import InputError, counted
from ace_ext.models._transformers import hears_or_sees, predicts_tokens, text_part, token_embedding
from ace_ext.models.fused_weights import find_fused
from ace_ext.models.left_dense import expert_lists

LISTS = 0.25
"""A list of modules holds blocks if it has this share of the parameters of the largest list."""


def block_lists(
    model: nn.Module, skipped: Callable[[str], bool], chosen: dict[str, nn.ModuleList] | None = None
) -> tuple[dict[str, nn.Module], list[str]]:
    """The blocks by name, and the names of the blocks in those lists that ``skipped`` takes out as a whole. ``chosen``:
    the lists to prune; None: the model's own.

    Raises:
        InputError: there are none; or blocks of the same kind in another list would stay dense, and are not skipped.
    """
    plain = chosen is None and predicts_tokens(model)
    lists = chosen or (_lists_of_text(model) if plain else _lists_of_parts(model))
    asked = {name for name, modules in lists.items() if all(map(skipped, _blocks_of(name, modules)))}
    taken = {name: modules for name, modules in lists.items() if name not in asked} or lists
    kinds = {type(module) for modules in taken.values() for module in modules}
    left: list[str] = []
    for name, modules in (_outermost(model) if plain else lists).items():
        blocks = _blocks_of(name, modules).items()
        alike = [block for block, module in blocks if name in asked or type(module) in kinds]
        if name in taken:
            continue
        if not all(map(skipped, alike)):
            raise InputError(
                f"model has a second list of blocks, {name} ({counted(len(alike), 'block')}), which would stay dense: "
                f"only {', '.join(taken)} is pruned; to leave it dense on purpose, pass skip={re.escape(name)!r}"
            )
        left += alike
    return {block: module for name, m in taken.items() for block, module in _blocks_of(name, m).items()}, left


def included(
    model: nn.Module, matching: Callable[[str], list[re.Pattern[str]]], patterns: list[re.Pattern[str]]
) -> dict[str, nn.ModuleList]:
    """The lists of blocks in all parts of a model whose names match, by name.

    Args:
        model: the model.
        matching: the patterns that a name matches.
        patterns: all of them.

    Raises:
        InputError: a pattern matches none.
    """
    lists = {n: m for name, modules in _outermost(model).items() for n, m in _with_blocks(name, modules).items()}
    for pattern in patterns:
        if not any(pattern in matching(name) for name in lists):
            raise InputError(
                f"towers {pattern.pattern[:100]!r} matches no list of blocks; the model has {', '.join(lists)}"
            )
    return {name: modules for name, modules in lists.items() if matching(name)}


def goes_beyond_text(model: nn.Module, blocks: Iterable[str]) -> bool:
    """Whether blocks, by name, are others than those of a causal language model: of a network of another kind, or also
    of a tower of images or sound."""
    if not predicts_tokens(model):
        return True
    lists = _lists_of_text(model)
    return any(name.rpartition(".")[0] not in lists for name in blocks)


def _lists_of_text(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists that hold blocks, by name: the outermost lists of the model's text part that are not much smaller than
    the largest, and smaller ones with blocks of the same class."""

    def size(modules: nn.ModuleList) -> int:
        return sum(p.numel() for p in modules.parameters())

    start, part = text_part(model)
    outermost = _outermost(part, start)
    if not outermost:
        raise InputError(f"model has no list of blocks (nn.ModuleList) to prune (got {type(model).__name__})")
    outermost = {n: m for n, m in outermost.items() if not hears_or_sees(n)} or outermost
    near = _beside_embedding(model, outermost)
    kinds = {type(module) for name in near for module in outermost[name]}
    outermost = {n: m for n, m in outermost.items() if n in near or not kinds.isdisjoint(map(type, m))} or outermost
    largest = max(size(modules) for modules in outermost.values())
    large = {name for name, modules in outermost.items() if size(modules) >= LISTS * largest}
    kinds = {type(module) for name in large for module in outermost[name]}
    return {n: m for n, m in outermost.items() if n in large or not kinds.isdisjoint(map(type, m))}


def _lists_of_parts(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists that hold blocks in a network of any kind, by name: those that are not much smaller than the largest,
    those with blocks of the same class as one of these, and those that are most of a part of the model which holds none
    of the others, such as a small tower beside a large one."""
    found = {n: m for name, modules in _outermost(model).items() for n, m in _with_blocks(name, modules).items()}
    if not found:
        raise InputError(f"model has no list of blocks (nn.ModuleList) to prune (got {type(model).__name__})")
    sizes = {name: _size(modules) for name, modules in found.items()}
    taken = {name for name, size in sizes.items() if size >= LISTS * max(sizes.values())}
    for name in sorted(found, key=sizes.__getitem__, reverse=True):
        if name not in taken and sizes[name] >= LISTS * _size(_own_part(model, name, taken)):
            taken.add(name)
    kinds = {type(module) for name in taken for module in found[name]}
    return {n: m for n, m in found.items() if n in taken or not kinds.isdisjoint(map(type, m))}


def _with_blocks(name: str, modules: nn.ModuleList) -> dict[str, nn.ModuleList]:
    """The lists of blocks in the list ``name``: itself, or, where its elements are lists or stages of different widths
    that hold lists, those. Empty if no element has a matrix to prune, or elements are single layers."""
    nested = {f"{name}.{index}": m for index, m in enumerate(modules) if isinstance(m, nn.ModuleList)}
    if len(nested) == len(modules):
        return {n: m for key, inner in nested.items() for n, m in _with_blocks(key, inner).items()}
    if len({_width(module) for module in modules} - {None}) > 1:
        stages = [_stage(f"{name}.{index}", module) for index, module in enumerate(modules)]
        if any(stages):
            return {n: m for stage in stages for n, m in stage.items()}
    has = any(not isinstance(module, nn.Linear) and _has_matrix(module) for module in modules)
    return {name: modules} if has else {}


def _stage(name: str, stage: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists in a stage whose elements are of one class and hold at least half of its parameters. Lists of experts
    do not count."""
    lists = {n: m for n, m in _outermost(stage).items() if n not in expert_lists(stage)}
    lists = {n: m for n, m in lists.items() if len(set(map(type, m))) == 1 and 2 * _size(m) >= _size(stage)}
    return {n: m for inner, modules in lists.items() for n, m in _with_blocks(f"{name}.{inner}", modules).items()}


def _width(module: nn.Module) -> int | None:
    """The number of inputs of the first matrix in a module; None without one."""
    return next((part.in_features for part in module.modules() if isinstance(part, nn.Linear)), None)


def _has_matrix(module: nn.Module) -> bool:
    return _width(module) is not None or bool(find_fused(module))


def _own_part(model: nn.Module, name: str, taken: Iterable[str]) -> nn.Module:
    """The largest part of a model that contains the list ``name``, and none of ``taken``."""
    part = name
    while part:
        around = part.rpartition(".")[0]
        if not around or any(f"{other}.".startswith(f"{around}.") for other in taken):
            break
        part = around
    return model.get_submodule(part)


def _size(module: nn.Module) -> int:
    """The number of parameters without those of embeddings."""
    inside = {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    return sum(p.numel() for p in module.parameters() if id(p) not in inside)


def _outermost(part: nn.Module, start: str = "") -> dict[str, nn.ModuleList]:
    """The lists of modules that are in no other list, by their names in the model. ``start``: the part's own name."""
    lists = {name: m for name, m in part.named_modules(prefix=start) if isinstance(m, nn.ModuleList) and name}
    return {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists) and len(m)}


def _blocks_of(name: str, modules: nn.ModuleList) -> dict[str, nn.Module]:
    return {f"{name}.{index}": module for index, module in enumerate(modules)}


def _beside_embedding(model: nn.Module, lists: Iterable[str]) -> list[str]:
    """The named lists in the smallest part of a model that holds the token embedding and at least one of them. The
    other blocks of a vision-language model may be larger. Empty if there are none."""
    embedding = token_embedding(model)
    place = next((name for name, module in model.named_modules() if module is embedding), "")
    while place:
        place = place.rpartition(".")[0]
        found = [name for name in lists if name.startswith(f"{place}." if place else "")]
        if found:
            return found
    return []
