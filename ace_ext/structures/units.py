"""Removes neurons or heads: a walk over the blocks with the smaller model's hidden states.

In each block the units are scored, some are removed, and the matrix that reads them is fitted to what it gave with all
of them. The dense model's weights are read and never changed.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import tie_weights_
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.replay import Arguments, BlockCall, capture_calls, run_block
from ace_ext.pruning import removal
from ace_ext.records import CutBlock
from ace_ext.structures.moments import Fit, Moments, fitted, updated
from ace_ext.structures.scores import DAMPING, kept_units, turning
from ace_ext.structures.search import Found, UnitsOfBlock, entries, find_units
from ace_ext.structures.smaller import check_same, few_tokens, fill_, laid_out, output_of

SMALLEST = 1e-10
"""The norm of a token's output counts as at least this."""
HELD_BACK = 8
"""One of this many samples (or of this many tokens, if there are fewer samples) is held back from a fit."""


Wanted = removal.Heads | removal.Neurons


def find_and_try(model: nn.Module, blocks: list[Block], part: Wanted, batch: Mapping[str, Tensor]) -> Found:
    """The units of a model, tried: without some of them, the model's logits for a few tokens are those of the dense
    model with these units zeroed. Changes nothing.

    Raises:
        InputError: they are not, there are no such units, or their number cannot be reached.
    """
    found = find_units(model, blocks, part)
    left = part.kept(found.count)
    # Of heads those are tried that the run leaves: a class may not have any other number.
    kept = torch.arange(0, found.count, 2) if isinstance(part, removal.Neurons) else torch.arange(-left, 0)
    kept = kept % found.count
    if found.count < 2:
        raise InputError(f"remove: a block has one of the {part.name}; leave out {part.name}")
    smaller = laid_out(model, found.changes(len(kept)))
    tensors = dict(model.state_dict())
    for present in found.present:
        tensors |= {cut.name: cut.keep(tensors[cut.name], kept, found.count) for cut in present.cuts}
    fill_(smaller, tensors, model)
    tokens = few_tokens(batch)
    with ExitStack() as stack:
        for block, own in zip(blocks, found.parts, strict=True):
            if own is not None:
                stack.enter_context(block.products())
                mask = torch.zeros(own.count * own.width, device=tokens.device)
                mask[entries(kept, own.width)] = 1
                handle = block.linears[own.last].register_forward_pre_hook(
                    lambda _, x, mask=mask: (x[0] * mask.to(x[0].dtype),)
                )
                stack.callback(handle.remove)
        expected = output_of(model, tokens)
    check_same(part.name, expected, output_of(smaller, tokens), next(model.parameters()).dtype)
    return found


def without_units(
    model: nn.Module,
    blocks: list[Block],
    found: Found,
    part: Wanted,
    batches: Sequence[dict[str, Tensor]],
    advanced: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[nn.Module, list[CutBlock]]:
    """A model with fewer units, and what was done in each block. ``model`` does not change.

    Args:
        model: the dense model.
        blocks: its blocks.
        found: its units.
        part: how many go, and how they are chosen.
        batches: the calibration text as arguments of the model's calls.
        advanced: is called after each block with the number of finished blocks and of all.

    Raises:
        InputError: a block gives numbers that are not finite.
    """
    kept = part.kept(found.count)
    smaller = laid_out(model, found.changes(kept))
    tensors = dict(model.state_dict())
    first = torch.arange(kept)
    for own in found.present:  # of the right shape; the walk replaces them
        tensors |= {cut.name: cut.keep(tensors[cut.name], first, found.count) for cut in own.cuts}
    fill_(smaller, tensors, model)
    output_of(smaller, batches[0]["input_ids"][:1])  # some classes choose code by the length of an input
    walk = _Walk(model, blocks, find_blocks(smaller, check=False), part, batches)
    report = []
    for index, place in enumerate(found.parts):
        if place is None:
            walk.advance(index)
        else:
            report.append(walk.remove(index, place, kept))
        advanced(index + 1, len(blocks))
    tie_weights_(smaller)
    return smaller, report


class _Walk:
    """The state of a walk: the smaller model's hidden states, or the dense one's for a method that reads those.

    Args:
        model: the dense model.
        blocks: its blocks.
        smaller: the blocks of the smaller model; those that were not reached yet have no useful weights.
        part: how units are chosen.
        batches: the text.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        smaller: list[Block],
        part: Wanted,
        batches: Sequence[dict[str, Tensor]],
    ) -> None:
        self._blocks, self._smaller, self._part = blocks, smaller, part
        self._passed = blocks if part.published is not None and part.published.dense else smaller
        self._calls = list(capture_calls(model, blocks, batches))
        self._states = [_entering(call) for call in self._calls]

    def remove(self, index: int, own: UnitsOfBlock, kept: int) -> CutBlock:
        """Removes units of block ``index``."""
        block, linear = self._blocks[index], self._blocks[index].linears[own.last]
        bias = _bias(block, own)
        weight = linear.weight.detach().float()
        train, held, turned = self._collect(index, own, weight)
        both = train.plus(held)
        units = kept_units(self._part.score, kept, weight, both, turned, own.width)
        stay = entries(units, own.width)
        published = self._part.published
        if published is None and self._part.refit == "matrix":
            fit, square = fitted(train, held, stay, weight, bias), held.error(weight)
        else:
            kind = self._part.refit if published is None else published.fit
            fit, square = updated(both, stay, weight, bias, kind, DAMPING), both.error(weight)
        self._store(index, own, units, fit)
        self.advance(index)
        square = square or 1.0
        return CutBlock(block.name, fit.error_before / square, fit.error / square, fit.ridge)

    def _collect(self, index: int, own: UnitsOfBlock, weight: Tensor) -> tuple[Moments, Moments, Tensor | None]:
        """The moments of the last matrix's inputs, without and of the held-back tokens; and the sums of
        :func:`ace_ext.structures.scores.turning`. A token has the weight ``1 / ‖o‖²``, where o is the block's output,
        or the matrix's if it is not added to the block's as it is: so each token's change counts relative to its size.
        In published methods all tokens have the weight 1.
        """
        block, last = self._blocks[index], own.last
        device = weight.device
        train, held = (Moments(weight.shape[1], device) for _ in range(2))
        turned = torch.zeros(own.count, device=device) if self._part.score == "cosine" else None
        added = self._adds(index, last)
        samples = sum(len(state) for state in self._states)
        number = 0
        for i, call in enumerate(self._calls):
            run = _seen(block, last, self._states[i], call.others[index])
            output = run.output if added else run.product
            scale = output.float().norm(dim=1).clamp_min(SMALLEST).reciprocal()
            if self._part.published is not None:
                scale = torch.ones_like(scale)
            batch, seqlen = self._states[i].shape[:2]
            back = _held_back(batch, seqlen, number, samples, call.token_mask).to(device)
            used = torch.ones_like(back) if call.token_mask is None else call.token_mask.to(device)
            for moments, chosen in ((train, used & ~back), (held, used & back)):
                moments.add_(run.inputs[chosen], scale[chosen])
            if turned is not None:
                turned += turning(run.inputs[used], output[used], weight, own.width)
            number += batch
        return train, held, turned

    def _adds(self, index: int, last: str) -> bool:
        """Whether the product of the last matrix is added to the block's output as it is, with no norm after it."""
        block, hidden, others = self._blocks[index], self._states[0], self._calls[0].others[index]
        plain = run_block(block, hidden, others)
        push = torch.zeros(hidden.shape[-1], device=hidden.device, dtype=hidden.dtype)
        push[:: max(1, len(push) // 8)] = plain.float().square().mean().sqrt().to(hidden.dtype)
        handle = block.linears[last].register_forward_hook(lambda _, x, y: y + push if y.shape[-1] == len(push) else y)
        try:
            moved = run_block(block, hidden, others)
        finally:
            handle.remove()
        difference = (moved.float() - plain.float() - push.float()).norm()
        return bool(difference < 0.02 * push.float().norm() * plain[..., 0].numel() ** 0.5)

    def _store(self, index: int, own: UnitsOfBlock, units: Tensor, fit: Fit) -> None:
        """Gives the smaller model's block its weights."""
        block, smaller = self._blocks[index], self._smaller[index]
        dense = dict(block.module.named_parameters(remove_duplicate=False))
        stored = {cut.name: cut.keep(dense[_inside(block, cut.name)].detach(), units, own.count) for cut in own.rows}
        like = dense[_inside(block, own.columns.name)]
        matrix = fit.weight if own.columns.dim == 1 else fit.weight.T
        stored[own.columns.name] = matrix.to(like.dtype).contiguous()
        if fit.bias is not None:
            name = f"{own.columns.name.removesuffix('.weight')}.bias"
            stored[name] = fit.bias.to(dense[_inside(block, name)].dtype)
        for name, value in stored.items():
            path, _, leaf = _inside(block, name).rpartition(".")
            owner = smaller.module.get_submodule(path)
            trained = owner.get_parameter(leaf).requires_grad
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=trained))
        for fused in smaller.fused:
            fused.bind()

    def advance(self, index: int) -> None:
        """The hidden states pass the block."""
        block = self._passed[index]
        for i, call in enumerate(self._calls):
            output = run_block(block, self._states[i], call.others[index])
            finite = torch.isfinite(output).flatten(0, 1).all(dim=1)
            if not bool((finite if call.token_mask is None else finite | ~call.token_mask.to(finite.device)).all()):
                raise InputError(
                    f"{block.name}: its output holds NaN or infinity without what was removed; load the model in "
                    "float32 or bfloat16 (--dtype)"
                )
            self._states[i] = output


@dataclass(frozen=True)
class _Run:
    """What a call of a block gave, per token."""

    inputs: Tensor  # [tokens, columns], of the last matrix
    product: Tensor  # [tokens, d_out], its output
    output: Tensor  # [tokens, d_model], the block's


def _seen(block: Block, last: str, hidden: Tensor, others: Arguments) -> _Run:
    found: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> None:
        found.append((x[0], y))

    handle = block.linears[last].register_forward_hook(see)
    try:
        output = run_block(block, hidden, others)
    finally:
        handle.remove()
    if len(found) != 1 or found[0][0][..., 0].numel() != hidden[..., 0].numel():
        raise InputError(
            f"remove: {block.full_name(last)} is not called once with every token, so its inputs cannot be removed"
        )
    x, y = found[0]
    return _Run(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), output.reshape(-1, output.shape[-1]))


def _entering(call: BlockCall) -> Tensor:
    assert call.hidden is not None  # just captured
    return call.hidden


def _held_back(batch: int, seqlen: int, number: int, samples: int, mask: Tensor | None) -> Tensor:
    """``[batch * seqlen]`` bool: the tokens that are held back. ``number``: of the batch's first sample."""
    if samples >= HELD_BACK:
        rows = torch.arange(number, number + batch) % HELD_BACK == HELD_BACK - 1
        return rows.repeat_interleave(seqlen)
    places = torch.arange(batch * seqlen) if mask is None else mask.cpu().cumsum(0)
    return places % HELD_BACK == HELD_BACK - 1


def _bias(block: Block, own: UnitsOfBlock) -> Tensor | None:
    """The bias that is added to the product of the last matrix, float32. That of a transposed Linear is a parameter of
    its owner."""
    name = f"{_inside(block, own.columns.name).removesuffix('.weight')}.bias"
    found = dict(block.module.named_parameters(remove_duplicate=False)).get(name)
    return None if found is None else found.detach().float()


def _inside(block: Block, name: str) -> str:
    return name.removeprefix(f"{block.name}.")
