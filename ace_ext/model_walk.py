"""Finds a model's blocks and prunable weights by structure, and replays block inputs without knowing the family.

A block is an element of the outermost ``nn.ModuleList`` that holds the most weight in Linears: the decoder layers. What
a block is called with (masks, rotary embeddings, whatever a family passes) is captured whole and handed back to it.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import InputError
from .experts import FusedExperts, find_experts, through_linears

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


@dataclass
class BlockCall:
    """How one batch enters the blocks. ``others[i]`` are block i's arguments besides the hidden states."""

    hidden: Tensor | None  # [batch, seqlen, d_model], what enters the first block; None once taken
    others: list[tuple[tuple, dict]]
    token_mask: Tensor | None  # [batch * seqlen] bool, None where no token is padding
    tokens: int = 0  # in the batch, without padding


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


class _Captured(Exception):
    """Ends a forward pass once the last block was reached. Never leaves this module."""


class _Recorder:
    """Stands in for the forward of every block: notes the arguments, hands the hidden states through unchanged."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.hidden: Tensor | None = None
        self.others: list[tuple[tuple, dict]] = []
        self.wrap = None  # shapes a tensor like a block's output: as it is, or first of a tuple

    def forward_of(self, index: int, original):
        def forward(*args, **kwargs):
            hidden, rest = take_hidden(args, kwargs)
            if index == 0:
                self.hidden = hidden
            self.others.append(rest)
            if index == len(self.blocks) - 1:
                raise _Captured
            if self.wrap is None:  # what a block returns is only known once one has run
                with through_linears(self.blocks[index].experts):
                    output = original(*args, **kwargs)
                self.wrap = (lambda t: t) if isinstance(output, Tensor) else (lambda t, tail=output[1:]: (t, *tail))
            return self.wrap(hidden)

        return forward


def _restore_forward(module: nn.Module, own: Callable | None) -> None:
    """Undoes a replaced forward: the class's own comes back, or the one that stood on the instance before."""
    if own is None:
        del module.forward
    else:
        module.forward = own


def take_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple[tuple, dict]]:
    """Splits a block's arguments into its hidden states and the rest."""
    if args:
        return args[0], (args[1:], kwargs)
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"})
    raise InputError(f"a block must be called with its hidden states first (got {', '.join(kwargs) or 'no argument'})")


def run_block(block: Block, hidden: Tensor, others: tuple[tuple, dict]) -> Tensor:
    """One block's output hidden states, whether it returns a tensor or a tuple that starts with one."""
    with through_linears(block.experts):
        output = block.module(hidden, *others[0], **others[1])
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def capture_calls(model: nn.Module, blocks: list[Block], batches: Iterable[dict[str, Tensor]]) -> Iterator[BlockCall]:
    """Runs the model up to its blocks and yields, batch by batch, what each block would be called with, the real first
    hidden states included. The model's blocks are replaced until the last one was taken.

    The blocks themselves are stood in for, so this costs an embedding, not a forward pass.
    """
    recorder = _Recorder(blocks)
    with ExitStack() as restore:
        for index, block in enumerate(blocks):
            original = block.module.forward
            restore.callback(_restore_forward, block.module, block.module.__dict__.get("forward"))
            block.module.forward = recorder.forward_of(index, original)
        for batch in batches:
            recorder.others = []
            try:
                model(**batch, use_cache=False)
            except _Captured:
                if len(recorder.others) != len(blocks):
                    raise InputError(
                        f"the model called only {len(recorder.others)} of its {len(blocks)} blocks"
                    ) from None
                mask = batch.get("attention_mask")
                full = mask is None or bool(mask.all())
                token_mask = None if full else mask.flatten().bool()
                tokens = batch["input_ids"].numel() if full else int(token_mask.sum())
                yield BlockCall(recorder.hidden, recorder.others, token_mask, tokens)
            else:
                raise InputError(f"the model did not call its blocks, {blocks[0].name} and on, up to the last")
