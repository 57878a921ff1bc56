"""Finds the lists of a model's blocks: of the outermost ``nn.ModuleList`` that text goes through, the one with the most
parameters, and others of about its size."""

import re
from collections.abc import Callable, Iterable

from torch import nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import text_part, token_embedding

LISTS = 0.25
"""A list of modules holds blocks if it has this share of the parameters of the largest list."""

_OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech")
"""Matches names of lists that text does not go through."""


def block_lists(model: nn.Module, skipped: Callable[[str], bool]) -> tuple[dict[str, nn.Module], list[str]]:
    """The blocks by name, and the names of the blocks in those lists that ``skipped`` takes out as a whole.

    Raises:
        InputError: there are none; or blocks of the same kind in another list would stay dense, and are not skipped.
    """
    lists = _lists_of_text(model)
    asked = {name for name, modules in lists.items() if all(map(skipped, _blocks_of(name, modules)))}
    taken = {name: modules for name, modules in lists.items() if name not in asked} or lists
    kinds = {type(module) for modules in taken.values() for module in modules}
    left: list[str] = []
    for name, modules in _outermost(model).items():
        blocks = _blocks_of(name, modules).items()
        alike = [block for block, module in blocks if name in asked or type(module) in kinds]
        if name in taken:
            continue
        if not all(map(skipped, alike)):
            raise InputError(
                f"model has a second list of blocks, {name} ({len(alike)} blocks), which would stay dense: only "
                f"{', '.join(taken)} is pruned; to leave it dense on purpose, pass skip={re.escape(name)!r}"
            )
        left += alike
    return {block: module for name, m in taken.items() for block, module in _blocks_of(name, m).items()}, left


def _lists_of_text(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists that hold blocks, by name: the outermost lists of the model's text part that are not much smaller than
    the largest, and smaller ones with blocks of the same class."""

    def size(modules: nn.ModuleList) -> int:
        return sum(p.numel() for p in modules.parameters())

    start, part = text_part(model)
    outermost = _outermost(part, start)
    if not outermost:
        raise InputError(f"model has no list of decoder blocks (nn.ModuleList) to prune (got {type(model).__name__})")
    outermost = {n: m for n, m in outermost.items() if not _OTHER_SENSES.search(n)} or outermost
    near = _beside_embedding(model, outermost)
    kinds = {type(module) for name in near for module in outermost[name]}
    outermost = {n: m for n, m in outermost.items() if n in near or not kinds.isdisjoint(map(type, m))} or outermost
    largest = max(size(modules) for modules in outermost.values())
    large = {name for name, modules in outermost.items() if size(modules) >= LISTS * largest}
    kinds = {type(module) for name in large for module in outermost[name]}
    return {n: m for n, m in outermost.items() if n in large or not kinds.isdisjoint(map(type, m))}


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
