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
from ace_ext.models.blocks import Block, find_blocks, products_of
from ace_ext.models.handed_on import shared_dicts
from ace_ext.models.replay import BlockCall, capture_calls, run_block
from ace_ext.pruning import removal
from ace_ext.records import CutBlock
from ace_ext.structures.moments import Fit, Moments, fitted, updated
from ace_ext.structures.scores import DAMPING, kept_units, turning
from ace_ext.structures.search import Found, UnitsOfBlock, entries, find_units
from ace_ext.structures.sites import HELD_OUT, UnitRun, seen
from ace_ext.structures.smaller import check_same, few_tokens, fill_, laid_out, output_without

SMALLEST = 1e-10
"""The norm of a token's output counts as at least this."""
MOMENTS, MOMENTS_BYTES = 3, 2**28
"""Matrices of moments for each unit, and the bytes up to which those of several experts are collected in one pass."""


Wanted = removal.Heads | removal.Neurons


def find_and_try(model: nn.Module, blocks: list[Block], part: Wanted, batch: Mapping[str, Tensor]) -> Found:
    """The units of a model, tried: without some of them, the model's logits for a few tokens are those of the dense
    model with these units zeroed. Changes nothing.

    Raises:
        InputError: they are not, there are no such units, or their number cannot be reached.
    """
    found = find_units(model, blocks, part)
    left = part.kept(found.count)
    # As many are tried as the run leaves: a class may not run with another number.
    kept = found.count - 1 - (torch.arange(left).flip(0) * found.count) // left
    if found.count < 2:
        raise InputError(f"remove: a block has one of the {part.name}; leave out {part.name}")
    tokens = few_tokens(batch)
    if isinstance(part, removal.Heads) and _unlike(blocks, found):
        (call,) = capture_calls(model, blocks, [{"input_ids": tokens}])
        if shared_dicts(call):
            raise InputError(
                "remove: some blocks of this model read keys and values of others, so each block cannot choose its own "
                "heads; leave out heads"
            )
    with ExitStack() as stack:
        stack.enter_context(products_of([block for block, units in zip(blocks, found.parts, strict=True) if units]))
        for block, units in zip(blocks, found.parts, strict=True):
            for own in units:
                mask = torch.zeros(own.count * own.width, device=tokens.device)
                mask[entries(kept, own.width)] = 1
                handle = block.linears[own.last].register_forward_pre_hook(
                    lambda _, x, mask=mask: (x[0] * mask.to(x[0].dtype),)
                )
                stack.callback(handle.remove)
        refused = []
        for layout in found.layouts:
            smaller = laid_out(model, found.changes(len(kept)))
            fill_(smaller, _with(layout, dict(model.state_dict()), kept), model)
            try:
                check_same(part.name, model, smaller, tokens)
                return layout
            except InputError as error:
                refused.append(error)
    raise refused[0]


def _unlike(blocks: list[Block], found: Found) -> bool:
    """Whether the units of some blocks have rows in other matrices than those of other blocks."""
    present = [(block, own) for block, part in zip(blocks, found.parts, strict=True) for own in part]
    return len({frozenset(_inside(block, row.name) for row in own.rows) for block, own in present}) > 1


def _with(found: Found, tensors: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """``tensors`` by name with the units ``kept [k]`` only, the same in all blocks."""
    return tensors | {cut.name: cut.keep(tensors[cut.name], kept, found.count) for cut in found.cuts}


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
        InputError: the class does not run with so few, or a block gives numbers that are not finite.
    """
    kept = part.kept(found.count)
    smaller = laid_out(model, found.changes(kept))
    # Tensors of the right shape; the walk replaces them.
    fill_(smaller, _with(found, dict(model.state_dict()), torch.arange(kept)), model)
    output_without(part.name, smaller, batches[0]["input_ids"][:1])  # some choose code by the length of an input
    walk = _Walk(model, blocks, find_blocks(smaller, check=False), part, batches)
    report = []
    for index, units in enumerate(found.parts):
        if units:
            report.append(walk.remove(index, units, kept))
        else:
            walk.advance(index)
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

    def remove(self, index: int, units: Sequence[UnitsOfBlock], kept: int) -> CutBlock:
        """Removes units of block ``index``."""
        block, cut = self._blocks[index], []
        for together in _in_passes(units):
            for own, (train, held, turned) in zip(together, self._collect(index, together), strict=True):
                cut.append(choose(self._part, block, own, kept, train, held, turned))
        self._store(index, cut)
        self.advance(index)
        return _record(block.name, cut)

    def _collect(self, index: int, units: Sequence[UnitsOfBlock]) -> list[tuple[Moments, Moments, Tensor | None]]:
        """For each of ``units`` the moments of the last matrix's inputs, without and of the held-out tokens; and the
        sums of :func:`ace_ext.structures.scores.turning`. A token has the weight ``1 / ‖o‖²``, where o is the block's
        output, or the matrix's if it is not added to the block's as it is (an expert's never is): so each token's
        change counts relative to its size. In published methods all tokens have the weight 1.
        """
        block, device = self._blocks[index], next(self._blocks[index].module.parameters()).device
        found = [_Sums.of(block, own, self._part.score, device) for own in units]
        added = [own.expert is None and self._adds(index, own.last) for own in units]
        samples = sum(len(state) for state in self._states)
        number = 0
        for i, call in enumerate(self._calls):
            runs = seen(block, units, self._states[i], call.others[index])
            batch, seqlen = self._states[i].shape[:2]
            back = _held_out(batch, seqlen, number, samples, call.token_mask).to(device)
            used = torch.ones_like(back) if call.token_mask is None else call.token_mask.to(device)
            for own, sums, adds, run in zip(units, found, added, runs, strict=True):
                if run is not None:
                    output = run.output if adds else run.product
                    sums.add_(run, output, *run.chosen(used, back), own.width, self._part.published is not None)
            number += batch
        return [(sums.train, sums.held, sums.turned) for sums in found]

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

    def _store(self, index: int, cut: Sequence["_Cut"]) -> None:
        """Gives the smaller model's block its weights."""
        block, smaller = self._blocks[index], self._smaller[index]
        dense = dict(block.module.named_parameters(remove_duplicate=False))
        stored: dict[str, Tensor] = {}
        experts: dict[str, list[Tensor]] = {}
        for one in cut:
            own = one.own
            new = {}
            for row in own.rows:
                tensor = dense[_inside(block, row.name)].detach()
                new[row.name] = row.keep_of(tensor, own.expert, one.units, own.count)
            like = dense[_inside(block, own.columns.name)]
            across = own.columns.dim == (1 if own.expert is None else 2)
            new[own.columns.name] = (one.fit.weight if across else one.fit.weight.T).to(like.dtype).contiguous()
            if one.fit.bias is not None:
                name = f"{own.columns.name.removesuffix('.weight')}.bias"
                new[name] = one.fit.bias.to(dense[_inside(block, name)].dtype)
            if own.expert is None:
                stored |= new
            else:
                for name, value in new.items():
                    experts.setdefault(name, []).append(value)
        for name, value in (stored | {name: torch.stack(values) for name, values in experts.items()}).items():
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
class _Cut:
    """Units that stay, and what reads them."""

    own: UnitsOfBlock
    units: Tensor
    fit: Fit
    square: float
    """The weighted mean square of what the dense matrix gives."""
    weight: float
    """The weight of the tokens that the errors are of."""


def choose(
    part: Wanted, block: Block, own: UnitsOfBlock, kept: int, train: Moments, held: Moments, turned: Tensor | None
) -> "_Cut":
    """Which ``kept`` units stay, and the matrix that reads them.

    Args:
        part: how they are chosen.
        block: the dense block.
        own: its units.
        kept: how many stay.
        train: moments of the matrix's inputs without held-out tokens.
        held: the same of held-out tokens.
        turned: as for :func:`ace_ext.structures.scores.kept_units`.
    """
    weight, bias, both = block.linears[own.last].weight.detach().float(), _bias(block, own), train.plus(held)
    if not both.weight:  # an expert without a token
        units = weight.square().sum(0).view(-1, own.width).sum(1).topk(kept).indices.sort().values
        return _Cut(own, units, Fit(weight[:, entries(units, own.width)], bias, None, 0.0, 0.0), 0.0, 0.0)
    units = kept_units(part.score, kept, weight, both, turned, own.width)
    stay = entries(units, own.width)
    published = part.published
    if published is None and part.refit == "matrix":
        return _Cut(own, units, fitted(train, held, stay, weight, bias), held.error(weight), held.weight)
    kind = part.refit if published is None else published.fit
    return _Cut(own, units, updated(both, stay, weight, bias, kind, DAMPING), both.error(weight), both.weight)


def _record(name: str, cut: Sequence[_Cut]) -> CutBlock:
    """The record of a block: the errors of its units together."""
    if len(cut) == 1:
        square = cut[0].square or 1.0
        return CutBlock(name, cut[0].fit.error_before / square, cut[0].fit.error / square, cut[0].fit.ridge)
    square = sum(one.square * one.weight for one in cut) or 1.0
    before = sum(one.fit.error_before * one.weight for one in cut)
    after = sum(one.fit.error * one.weight for one in cut)
    ridges = {one.fit.ridge for one in cut}
    return CutBlock(name, before / square, after / square, ridges.pop() if len(ridges) == 1 else None)


@dataclass
class _Sums:
    """What is summed over tokens for some units."""

    train: Moments
    held: Moments
    turned: Tensor | None
    weight: Tensor

    @classmethod
    def of(cls, block: Block, own: UnitsOfBlock, score: str, device: torch.device) -> "_Sums":
        """Nothing yet."""
        weight = block.linears[own.last].weight.detach()
        train, held = (Moments(weight.shape[1], device) for _ in range(2))
        turned = torch.zeros(own.count, device=device) if score == "cosine" else None
        return cls(train, held, turned, weight if turned is None else weight.float())

    def add_(self, run: UnitRun, output: Tensor, used: Tensor, back: Tensor, width: int, equal: bool) -> None:
        """Adds the tokens that are ``used``, bool ``[tokens]``; ``equal``: all have the weight 1."""
        scale = output.float().norm(dim=1).clamp_min(SMALLEST).reciprocal()
        if equal:
            scale = torch.ones_like(scale)
        for moments, chosen in ((self.train, used & ~back), (self.held, used & back)):
            moments.add_(run.inputs[chosen], scale[chosen])
        if self.turned is not None:
            self.turned += turning(run.inputs[used], output[used], self.weight, width)


def _in_passes(units: Sequence[UnitsOfBlock]) -> list[Sequence[UnitsOfBlock]]:
    """The units whose moments are collected together: as many as :data:`MOMENTS_BYTES` allow, one at least."""
    columns = max(own.count * own.width for own in units)
    step = max(1, MOMENTS_BYTES // (MOMENTS * 4 * columns * columns))
    return [units[start : start + step] for start in range(0, len(units), step)]


def _entering(call: BlockCall) -> Tensor:
    assert call.hidden is not None  # just captured
    return call.hidden


def _held_out(batch: int, seqlen: int, number: int, samples: int, mask: Tensor | None) -> Tensor:
    """``[batch * seqlen]`` bool: the tokens that are held out. ``number``: of the batch's first sample."""
    if samples >= HELD_OUT:
        rows = torch.arange(number, number + batch) % HELD_OUT == HELD_OUT - 1
        return rows.repeat_interleave(seqlen)
    places = torch.arange(batch * seqlen) if mask is None else mask.cpu().cumsum(0)
    return places % HELD_OUT == HELD_OUT - 1


def _bias(block: Block, own: UnitsOfBlock) -> Tensor | None:
    """The bias that is added to the product of the last matrix, float32. That of a transposed Linear is a parameter of
    its owner."""
    name = f"{_inside(block, own.columns.name).removesuffix('.weight')}.bias"
    found = dict(block.module.named_parameters(remove_duplicate=False)).get(name)
    return None if found is None else found.detach().float()


def _inside(block: Block, name: str) -> str:
    return name.removeprefix(f"{block.name}.")
