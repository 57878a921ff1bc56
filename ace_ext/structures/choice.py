"""Chooses what to remove: a few candidates are removed, and the model that predicts most like the dense one on
held-out samples stays. They are structures for a share of the blocks' parameters, or one removal by several scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.pruning import removal
from ace_ext.records import Removed, TriedRemoval

HELD_OUT = 8
"""One of this many samples is held out to compare the candidates."""
TOLERANCE = 0.15
"""How far a candidate's size may be from the one that was asked for, relative to it."""
MOST = 6
"""The most candidates that are removed and compared."""

Remove = Callable[[removal.Removal, Sequence[dict[str, Tensor]]], tuple[nn.Module, list[Removed]]]
"""Removes structures, given the calibration text: the smaller model, and a record for each kind."""
Plan = Callable[[removal.Removal], tuple[nn.Module, list[Removed]]]
"""The same from shapes alone."""
Try = Callable[[removal.Removal], object]
"""Raises :class:`InputError` if the class does not compute the same without these structures."""


def candidates(
    model: nn.Module, blocks: list[Block], wanted: removal.Removal, plan: Plan, check: Try
) -> list[TriedRemoval]:
    """What ``wanted`` stands for: its scores, or removals of about a size.

    Args:
        model: dense; may be a skeleton.
        blocks: its blocks.
        wanted: it compares.
        plan: finds the size of a removal.
        check: tries it.

    Raises:
        InputError: no such removal is possible.
    """
    if wanted.params is not None:
        return of_size(model, blocks, wanted.params, plan, check)
    check(wanted.scored[0])  # scores make no difference to it
    first = _planned(list(wanted.scored[0].parts), plan)
    return [replace(first, part=str(one)) for one in wanted.scored]


def of_size(
    model: nn.Module, blocks: list[Block], wanted: removal.Params, plan: Plan, check: Try
) -> list[TriedRemoval]:
    """Removals of about the wanted size, at most :data:`MOST`: neurons alone; blocks alone; half of it by blocks, or a
    number of heads, and the rest by neurons.

    Args:
        model: dense; may be a skeleton.
        blocks: its blocks.
        wanted: the share of the blocks' parameters that goes.
        plan: finds the size of a removal.
        check: tries it.

    Raises:
        InputError: no such removal is possible.
    """
    inside = sum(p.numel() for block in blocks for p in block.module.parameters())
    whole = sum(p.numel() for p in model.parameters())
    goal = wanted.share * inside
    found: list[TriedRemoval] = []
    reasons: list[str] = []
    for parts in _combinations(wanted.share, len(blocks)):
        try:
            tried = _sized(parts, goal, whole, plan)
            if abs(whole - tried.parameters_after - goal) <= TOLERANCE * goal and _kind(tried) not in map(_kind, found):
                check(removal.removal_of(tried.part))
                found.append(tried)
        except InputError as error:
            reasons.append(f"{error}".removeprefix("remove: "))
    if not found:
        raise InputError(
            f"remove: no removal of neurons, heads or blocks takes about {wanted.share:g} of the blocks' parameters"
            f"{'; ' if reasons else ''}{'; '.join(dict.fromkeys(reasons))[:300]}"
        )
    return found[:MOST]


def nearest(
    model: nn.Module, tried: list[TriedRemoval], batches: Sequence[dict[str, Tensor]], remove: Remove
) -> tuple[nn.Module, list[Removed]]:
    """The smaller model with the least divergence from the dense one, and its records. ``model`` does not change.

    The divergence is ``KL(dense ‖ smaller)`` of the next token, averaged over the tokens of one sample of eight, which
    calibrates none of the candidates.

    Raises:
        InputError: there are not two samples, the model gives no logits, or a candidate cannot be removed.
    """
    used, held = _split(batches)
    best: tuple[nn.Module, list[Removed]] | None = None
    compared: list[TriedRemoval] = []
    lowest = float("inf")
    for candidate in tried:
        found = remove(removal.removal_of(candidate.part), used)
        differs = divergence(model, found[0], held)
        compared.append(replace(candidate, divergence=differs))
        if best is None or differs < lowest:
            best, lowest = found, differs
    assert best is not None  # there is a candidate
    smaller, records = best
    return smaller, [replace(records[0], tried=compared), *records[1:]]


@torch.no_grad()
def divergence(dense: nn.Module, smaller: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """The mean over tokens of ``KL(dense ‖ smaller)`` of the next token, in nats."""
    total, tokens = 0.0, 0
    for batch in batches:
        logits = [model(**batch, use_cache=False) for model in (dense, smaller)]
        if any(getattr(output, "logits", None) is None or output.logits.dim() != 3 for output in logits):
            raise InputError(
                "remove: params and score=auto compare predictions of tokens, and the model gives no logits of them; "
                "leave them out"
            )
        log_dense, log_smaller = (output.logits.float().log_softmax(dim=-1) for output in logits)
        differs = (log_dense - log_smaller).masked_fill(log_dense == -torch.inf, 0.0)  # 0 * inf is NaN
        found = (log_dense.exp() * differs).sum(dim=-1)
        mask = batch.get("attention_mask")
        kept = found.flatten() if mask is None else found[mask.bool()]
        total, tokens = total + float(kept.double().sum()), tokens + len(kept)
    return total / max(1, tokens)


def _combinations(share: float, blocks: int) -> Iterator[list[removal.Part]]:
    """Parts of candidates. The neurons' share, which comes last, is only a start."""
    rest = removal.Neurons(min(0.9, share))
    yield [rest]
    if 0 < (depth := round(share * blocks)) < blocks:
        yield [removal.Blocks(depth)]
    if 0 < (half := round(share * blocks / 2)) < blocks:
        yield [removal.Blocks(half), rest]
    for heads in (0.125, 0.25, 1 / 3, 0.5):
        yield [removal.Heads(heads), rest]


def _sized(parts: list[removal.Part], goal: float, whole: int, plan: Plan) -> TriedRemoval:
    """The removal of these parts, with the share of neurons that brings it nearest to ``goal`` parameters."""
    if not isinstance(parts[-1], removal.Neurons):
        return _planned(parts, plan)
    first = parts[-1]
    before = _planned(parts[:-1], plan).parameters_after if parts[:-1] else whole
    left = goal - (whole - before)
    if left <= 0:
        raise InputError("remove: the other structures are more than was asked for")
    taken = before - _planned(parts, plan).parameters_after
    share = first.share * left / max(1, taken)
    if not share < 1:
        raise InputError("remove: the neurons are fewer parameters than was asked for")
    return _planned([*parts[:-1], removal.Neurons(round(share, 4))], plan)


def _kind(tried: TriedRemoval) -> tuple[tuple[str, ...], int]:
    """Equal for removals of the same size by the same structures: shares of heads are rounded to whole groups."""
    return tuple(part.name for part in removal.removal_of(tried.part).parts), tried.parameters_after


def _planned(parts: list[removal.Part], plan: Plan) -> TriedRemoval:
    wanted = removal.Removal(tuple(parts))
    return TriedRemoval(str(wanted), plan(wanted)[1][-1].parameters_after)


def _split(batches: Sequence[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The samples that calibrate the candidates, and those that compare them, one a batch."""
    samples = [_rows_of(batch, slice(row, row + 1)) for batch in batches for row in range(len(batch["input_ids"]))]
    if len(samples) < 2:
        raise InputError("remove: params and score=auto need at least two calibration samples (got 1)")
    every = min(HELD_OUT, len(samples))
    held = list(islice(samples, every - 1, None, every))
    used, row = [], 0
    for batch in batches:
        own = [place for place in range(len(batch["input_ids"])) if (row + place) % every != every - 1]
        row += len(batch["input_ids"])
        if own:
            used.append(_rows_of(batch, own))
    return used, held


def _rows_of(batch: dict[str, Tensor], rows: slice | list[int]) -> dict[str, Tensor]:
    """These samples of a batch. What it holds once for all samples stays, such as ``position_ids [1, seqlen]``."""
    samples = len(batch["input_ids"])
    return {name: value[rows] if len(value) == samples else value for name, value in batch.items()}
