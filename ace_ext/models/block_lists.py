"""Where a model's blocks are: in the outermost ``nn.ModuleList`` that holds the most parameters, among those that text
goes through, and in others of about its size."""

import re
from collections.abc import Callable, Iterable

from torch import nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import text_part, token_embedding

LISTS = 0.25
"""A list of modules holds blocks if it has this share of the parameters of the largest list."""

_OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech")
"""In names of lists that text does not go through."""


def block_lists(model: nn.Module, skipped: Callable[[str], bool]) -> tuple[dict[str, nn.Module], list[str]]:
    """The blocks by name, and the names of others that ``skipped`` takes out: whole lists of them.

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
    """The outermost lists of the model's text part that are not much smaller than the largest of them, and smaller ones
    of the same kind of blocks, by name."""

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
    """The lists of modules, by their names in the model, that are in no other list. ``start``: the part's own name."""
    lists = {name: m for name, m in part.named_modules(prefix=start) if isinstance(m, nn.ModuleList) and name}
    return {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists) and len(m)}


def _blocks_of(name: str, modules: nn.ModuleList) -> dict[str, nn.Module]:
    return {f"{name}.{index}": module for index, module in enumerate(modules)}


def _beside_embedding(model: nn.Module, lists: Iterable[str]) -> list[str]:
    """Those of the named lists that are in the smallest part of a model that also holds the embedding of its tokens.
    The other blocks of a vision-language model may be larger. Empty if there are none."""
    embedding = token_embedding(model)
    place = next((name for name, module in model.named_modules() if module is embedding), "")
    while place:
        place = place.rpartition(".")[0]
        found = [name for name in lists if name.startswith(f"{place}." if place else "")]
        if found:
            return found
    return []
