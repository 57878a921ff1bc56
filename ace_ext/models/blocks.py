"""Finds a model's blocks and prunable weights by structure, and replays block inputs without knowing the family.

A block is an element of the outermost ``nn.ModuleList`` that holds the most weight in Linears: the decoder layers. What
a block is called with (masks, rotary embeddings, whatever a family passes) is captured whole and handed back to it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.experts import FusedExperts, find_experts

CHECKED_AT_ONCE = 2**22
"""Weights that :func:`check_weights` looks at together."""


@dataclass(frozen=True)
class Block:
    """A decoder layer: its full name in the model, the module, and its prunable Linears by their name in the block,
    those of fused experts among them."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    experts: tuple[FusedExperts, ...] = ()

    def full_name(self, linear: str) -> str:
        return f"{self.name}.{linear}"

    def is_expert(self, linear: str) -> bool:
        """Whether it is the matrix of a fused expert, which only the tokens reach that are sent there."""
        return any(linear in fused.linears for fused in self.experts)

    def expert_stages(self) -> list[list[str]]:
        """The prunable Linears of each fused tensor: none of them is behind another."""
        return [[child for child in fused.linears if child in self.linears] for fused in self.experts]


def find_blocks(model: nn.Module, skip: Iterable[str] = (), check: bool = True) -> list[Block]:
    """The decoder layers in order, each with the Linears to prune; ``check=False`` leaves :func:`check_weights` out,
    for a model whose weights are not loaded.

    Raises:
        InputError: no list of blocks is found; a block has no Linear to prune; a block keeps weights in a form that is
            not pruned (expert weights with the output last, transposed ``Conv1D``) and that ``skip`` does not name; two
            blocks share one weight; a weight is not a plain float32, float16 or bfloat16 matrix.
    """
    patterns = [_compile(pattern) for pattern in skip]
    name, modules = _block_list(model)
    blocks = []
    for index, module in enumerate(modules):
        full = f"{name}.{index}"
        experts = find_experts(module)
        routers = _routers(module, experts)
        experts = tuple(fused for fused in experts if not _matches(f"{full}.{fused.name}", patterns))
        linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" not in routers}
        for fused in experts:
            linears |= fused.linears
        linears = {n: linear for n, linear in linears.items() if not _matches(f"{full}.{n}", patterns)}
        _refuse_other_weights(full, module, patterns, routers | {fused.name for fused in experts})
        blocks.append(Block(full, module, linears, experts))
    if not any(block.linears for block in blocks):
        raise InputError(f"skip leaves no Linear to prune in {name} (got {', '.join(skip) or 'nothing to skip'})")
    if check:
        check_weights(blocks)
    return blocks


def _compile(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"skip must be regular expressions (got {pattern!r}: {error})") from error


def _matches(name: str, patterns: list[re.Pattern]) -> bool:
    return any(pattern.search(name) for pattern in patterns)


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    def size(modules: nn.ModuleList) -> int:
        return sum(p.numel() for p in modules.parameters())

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(other + ".") for other in lists) and name
    }
    if not outermost:
        raise InputError(f"model has no list of decoder blocks (nn.ModuleList) to prune (got {type(model).__name__})")
    name = max(outermost, key=lambda key: size(outermost[key]))
    return name, outermost[name]


def _routers(module: nn.Module, experts: Iterable[FusedExperts]) -> set[str]:
    """Names in the block of the matrices beside fused experts that choose among them: tiny, and all hangs on what they
    say, so they stay dense."""
    found = set()
    for fused in experts:
        mixture = fused.name.rpartition(".")[0].rpartition(".")[0]
        for child, beside in module.get_submodule(mixture).named_children():
            for name, parameter in beside.named_parameters(recurse=False):
                if fused.is_router(parameter):
                    found.add(f"{mixture}.{child}.{name}".lstrip("."))
    return found


def _refuse_other_weights(block: str, module: nn.Module, patterns: list[re.Pattern], known: set[str]) -> None:
    """Weights that no Linear holds would be left dense without a word: say so instead. ``known`` are parameters by
    their names in the block that need no Linear."""
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
    """That each weight is a loaded, finite matrix of a dtype that the ops take, and no other one's twin.

    Raises:
        InputError: naming the first that is not.
    """
    seen: dict[int, str] = {}
    for block in blocks:
        for child, linear in block.linears.items():
            name, weight = block.full_name(child), linear.weight
            if weight.is_meta or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                found = "a tensor without data" if weight.is_meta else str(weight.dtype)
                raise InputError(f"{name}.weight must be loaded as float32, float16 or bfloat16 (got {found})")
            if id(weight) in seen:
                raise InputError(f"{name}.weight is the same tensor as {seen[id(weight)]}; pass one of them in skip")
            seen[id(weight)] = f"{name}.weight"
            where = _first_not_finite(weight)
            if where is not None:
                raise InputError(f"{name}.weight must be finite (got {weight[tuple(where)].item()} at index {where})")


def _first_not_finite(weight: Tensor) -> list[int] | None:
    """``[row, column]`` of the first NaN or infinity. A part at a time: ``isfinite`` needs up to five bytes a weight
    for its own, and a whole matrix at once would be the peak of a run that holds one block. A finite sum, which is
    quicker, has finite terms only."""
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
