"""Finds a model's blocks and their prunable weights by structure alone, for any model family.

A block is a decoder layer: an element of the outermost ``nn.ModuleList`` with the most parameters, or of another list
of about its size. Only lists in the part of the model with the token embedding count.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ace_ext.dense_weights import NO_MATRIX, ROUTER, SKIPPED, DenseWeight
from ace_ext.errors import InputError
from ace_ext.models.block_lists import block_lists, included
from ace_ext.models.derived_weights import DTYPES, refuse_derived
from ace_ext.models.fused_weights import FusedWeight, find_fused, through_linears
from ace_ext.models.left_dense import check_share, expert_lists, other_weights, outside, routers
from ace_ext.models.patterns import globs_of, search_within
from ace_ext.models.products import float32_products

CHECKED_AT_ONCE = 2**22
"""Elements of a matrix that :func:`check_weights` reads at a time."""
MATCH_SECONDS = 0.25
"""The most processor time that a pattern of ``skip`` may take for one name."""


@dataclass(frozen=True)
class Block:
    """A decoder layer: its full name in the model, the module, and its prunable Linears by their names in the block,
    those of fused weights included."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    fused: tuple[FusedWeight, ...] = ()
    dense: tuple[DenseWeight, ...] = ()
    """The matrices that are not pruned."""
    expert_lists: tuple[str, ...] = ()
    """Names of lists of modules that are experts."""

    def full_name(self, linear: str) -> str:
        """The name in the model of the Linear with this name in the block."""
        return f"{self.name}.{linear}"

    @property
    def experts(self) -> list[FusedWeight]:
        """The fused tensors of experts."""
        return [fused for fused in self.fused if fused.layout.routed]

    def is_expert(self, linear: str) -> bool:
        """Whether the Linear is an expert's, which sees only the tokens that the router sends it."""
        return self.is_fused(linear) or any(linear.startswith(f"{name}.") for name in self.expert_lists)

    def is_fused(self, linear: str) -> bool:
        """Whether the Linear stands for a part of a fused tensor of experts."""
        return any(linear in fused.linears for fused in self.experts)

    def is_transposed(self, linear: str) -> bool:
        """Whether the parameter with the Linear's own name is stored as ``[d_in, d_out]``."""
        return self.is_stored_transposed(linear) and not self.is_fused(linear)

    def is_stored_transposed(self, linear: str) -> bool:
        """Whether the tensor that holds the matrix, alone or with those of other experts, has it as ``[d_in, d_out]``.
        Its rows are then columns of the tensor."""
        return any(linear in fused.linears for fused in self.fused if fused.layout.transposed)

    def as_it_is(self) -> "Block":
        """A copy of the block that shares its present parameters, and keeps them when the module's are replaced or
        dropped."""
        twins: dict[int, nn.Module] = {}

        def twin_linears(linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
            return {child: cast("nn.Linear", _twin(linear, twins)) for child, linear in linears.items()}

        fused = [replace(h, owner=_twin(h.owner, twins), linears=twin_linears(h.linears)) for h in self.fused]
        module = _twin(self.module, twins)
        return replace(self, module=module, linears=twin_linears(self.linears), fused=tuple(fused))

    def expert_steps(self) -> list[list[str]]:
        """The names of the prunable Linears, one list for each fused tensor. Linears of one list do not feed each
        other, so they can be pruned together."""
        return [[child for child in fused.linears if child in self.linears] for fused in self.experts]

    @contextmanager
    def products(self) -> Iterator[None]:
        """Within this context each product with one of the block's matrices is a call of its Linear. This concerns
        fused matrices and state-space layers, which multiply by a Linear's weight without calling it. (A block may have
        such a layer if it has weights that are in no Linear.) If the CPU is slow at the dtype, Linears multiply in
        float32 (:mod:`ace_ext.models.products`)."""
        with products_of([self]):
            yield

    @property
    def leaves_biases(self) -> bool:
        """Whether the block may multiply by a Linear's weight without adding its bias: :meth:`products` then takes the
        bias off the Linear while it is called."""
        return any(linear.bias is not None for linear in self._used_directly.values())

    @property
    def _used_directly(self) -> dict[str, nn.Linear]:
        unknown = any(weight.reason == NO_MATRIX for weight in self.dense)
        return self.linears if unknown else {}


@contextmanager
def products_of(blocks: Sequence[Block]) -> Iterator[None]:
    """:meth:`Block.products` of several blocks at once. The mode that was entered last sees a product first, so all
    modes that call Linears are entered after all that multiply in float32."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(float32_products(block.module))
        for block in blocks:
            stack.enter_context(through_linears(block.fused, block._used_directly))
        yield


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """A shallow copy of ``module`` with its own dicts of parameters, buffers and children. The children are such copies
    too. ``twins``: the copies made before, by the id of the original."""
    if id(module) not in twins:
        twin = module.__new__(type(module))
        twin.__dict__ = {**module.__dict__, "_parameters": {**module._parameters}, "_buffers": {**module._buffers}}
        twin._modules = {name: child and _twin(child, twins) for name, child in module._modules.items()}
        twins[id(module)] = twin
    return twins[id(module)]


def find_blocks(
    model: nn.Module,
    skip: Iterable[str] = (),
    check: bool = True,
    max_dense: float = 1.0,
    towers: Iterable[str] = (),
) -> list[Block]:
    """The decoder layers in order, each with the Linears to prune, and with the weights that stay dense.

    Args:
        model: the model.
        skip: regular expressions; a weight whose full name matches one stays dense.
        check: False leaves :func:`check_weights` out, for a model whose weights are not loaded.
        max_dense: the share of a block's weights that may stay dense without being skipped, because their layout is
            unknown.
        towers: regular expressions of names of lists; only these lists are pruned, of the whole model. Empty: those
            that :mod:`ace_ext.models.block_lists` finds.

    Raises:
        InputError: no list of blocks is found; a block has no Linear to prune; more of a block than ``max_dense``
            would stay dense; two blocks share one weight; a weight is not a plain float32, float16 or bfloat16 matrix.
    """
    skip = tuple(skip)
    patterns = [_compile(pattern) for pattern in skip]
    wanted = [_compile(pattern, "towers") for pattern in towers]
    chosen = None if not wanted else included(model, lambda name: [p for p in wanted if _matches(name, [p])], wanted)
    modules, names = block_lists(model, lambda name: _matches(name, patterns), chosen)
    blocks: list[Block] = []
    for full, module in modules.items():
        fused = find_fused(module)
        names += [f"{full}.{weight}" for weight in _weights_of(module, fused)]
        blocks.append(_block(full, module, fused, patterns))
        refuse_derived(full, module, blocks[-1].linears)
        check_share(full, module, blocks[-1].dense, max_dense)
    for pattern in patterns:
        _check_used("skip", pattern.pattern, pattern, names)
        for glob, one in globs_of(pattern.pattern).items():
            _check_used("include", glob, _compile(one), names)
    if not any(block.linears for block in blocks):
        raise InputError(
            f"no Linear is left to prune in {blocks[0].name} or any later block; choose other weights "
            "(skip, exclude, include): ace-prune plan --list shows their names"
        )
    _refuse_tied(model, blocks)
    if check:
        check_weights(blocks)
    return blocks


def _block(full: str, module: nn.Module, fused: list[FusedWeight], patterns: list[re.Pattern[str]]) -> Block:
    """A block with the full name ``full``: what is pruned in it, and what is not."""
    chooses = routers(module, fused)
    taken = [h for h in fused if not _matches(f"{full}.{h.name}", patterns)]
    own = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    for matrices in taken:
        own |= matrices.linears
    linears: dict[str, nn.Linear] = {}
    dense: dict[str, tuple[Sequence[int], str]] = {}
    for name, linear in own.items():
        if f"{name}.weight" in chooses:
            dense[f"{name}.weight"] = linear.weight.shape, ROUTER
        elif _matches(f"{full}.{name}", patterns):
            dense[f"{name}.weight"] = linear.weight.shape, SKIPPED
        else:
            linears[name] = linear
    for matrices in fused:
        if matrices not in taken:
            dense[matrices.name] = matrices.tensor.shape, SKIPPED
    for name, parameter in other_weights(module, {matrices.name for matrices in fused}):
        skipped = SKIPPED if _matches(f"{full}.{name}", patterns) else NO_MATRIX
        dense[name] = parameter.shape, ROUTER if name in chooses else skipped
    listed = (DenseWeight(f"{full}.{name}", tuple(shape), reason) for name, (shape, reason) in dense.items())
    return Block(full, module, linears, tuple(taken), tuple(listed), tuple(expert_lists(module)))


def _refuse_tied(model: nn.Module, blocks: list[Block]) -> None:
    """Refuses Linears that share their weight with a module outside the blocks, such as the embedding. It is not
    pruned.

    Raises:
        InputError: naming the first.
    """
    named = model.named_parameters(remove_duplicate=False)
    inside = tuple(f"{block.name}." for block in blocks)
    outside = {id(parameter): other for other, parameter in named if not other.startswith(inside)}
    for block in blocks:
        for child, linear in block.linears.items():
            if id(linear.weight) in outside:
                raise InputError(
                    f"{block.full_name(child)}.weight is the same tensor as {outside[id(linear.weight)]}, which is not "
                    "pruned; pass it in skip"
                )


def _weights_of(module: nn.Module, fused: Iterable[FusedWeight]) -> list[str]:
    """The names in the block that ``skip`` is compared with: of Linears and experts, and of matrices that no Linear
    holds."""
    names = [name for name, _ in module.named_modules()]
    names += [name for name, parameter in module.named_parameters() if parameter.dim() > 1]
    return names + [child for matrices in fused for child in matrices.linears]


def _compile(pattern: str, option: str = "skip") -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, TypeError) as error:
        raise InputError(f"{option} must be regular expressions (got {str(pattern)[:100]!r}: {error})") from error


def _check_used(option: str, text: str, pattern: re.Pattern[str], names: list[str]) -> None:
    if not any(_matches(name, [pattern]) for name in names):
        raise InputError(
            f"{option} {text[:100]!r} matches no weight of the blocks; ace-prune plan --list shows their names"
        )


def _matches(name: str, patterns: list[re.Pattern[str]]) -> bool:
    return any(search_within(MATCH_SECONDS, pattern, name) for pattern in patterns)


def stay_dense(model: nn.Module, blocks: list[Block]) -> list[DenseWeight]:
    """The matrices of a model that are not pruned: those of its blocks, and those outside."""
    return [weight for block in blocks for weight in block.dense] + outside(model, [block.module for block in blocks])


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
            if any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
                raise InputError(f"{name}.weight must have memory for each element (it is expanded); assign a .clone()")
            place = weight.data_ptr()  # two parameters may share memory
            if place in seen and weight.numel():
                raise InputError(f"{name}.weight is the same tensor as {seen[place]}; pass one of them in skip")
            seen[place] = f"{name}.weight"
            where = _first_not_finite(weight)
            if where is not None:
                raise InputError(f"{name}.weight must be finite (got {weight[tuple(where)].item()} at index {where})")
        for name, vector in block.module.named_parameters():  # norms and biases
            if vector.dim() == 1 and not vector.is_meta and not bool(torch.isfinite(vector).all()):
                raise InputError(f"{block.name}.{name} must be finite (it holds NaN or infinity)")


def _first_not_finite(weight: Tensor) -> list[int] | None:
    """``[row, column]`` of the first NaN or infinity in ``[rows, cols]``; None without one.

    It reads some rows at a time: ``isfinite`` allocates up to five bytes an element. For a whole matrix that would set
    the peak of a run with one block in memory. The sum comes first because it is faster: if it is finite, each term is
    finite.
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
