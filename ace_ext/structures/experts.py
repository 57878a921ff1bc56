"""Removes experts: those whose outputs, weighted by the router, have the smallest norm (REAP, arXiv 2510.13999).

No weight is fitted afterwards. The router chooses among the experts that are left.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError, one_line
from ace_ext.models.blocks import Block
from ace_ext.models.replay import BlockCall, capture_calls, run_block
from ace_ext.pruning import removal
from ace_ext.records import GoneExperts
from ace_ext.structures.routes import routed, router_choice
from ace_ext.structures.search import Cut, cuts_of
from ace_ext.structures.smaller import check_same, few_tokens, fill_, laid_out, numbers_of, output_of, stored_shapes

_NO_CHOICE = "remove: the experts of {} are not called with the router's choice; leave out experts"


class Experts:
    """The experts of a model, whose blocks all have the same number of them, or none.

    Args:
        setting: the setting of the configuration that holds the number.
        count: the number.
        cuts: for each block the parameters and buffers with an entry for each expert; empty without experts.
    """

    def __init__(self, setting: str, count: int, cuts: Sequence[Sequence[Cut]]) -> None:
        self.setting, self.count, self.cuts = setting, count, cuts

    def chosen(self, tensors: dict[str, Tensor], kept: Sequence[Tensor]) -> dict[str, Tensor]:
        """``tensors`` with these experts only; ``kept``: for each block ``[k]`` int64."""
        found = dict(tensors)
        for cuts, own in zip(self.cuts, kept, strict=True):
            found |= {cut.name: cut.keep(tensors[cut.name], own, self.count) for cut in cuts}
        return found


def find_experts(model: nn.Module, blocks: list[Block], part: removal.Experts) -> Experts:
    """The experts of a model.

    Raises:
        InputError: it has none that are stored in one tensor and called with the router's choice; or no number of the
            configuration changes them alone.
    """
    counts = {fused.layout.count for block in blocks for fused in _called(block)}
    kind = type(model).__name__
    if not counts:
        raise InputError(f"remove: {kind} has no experts that the router calls by number; leave out experts")
    for block in blocks:
        for fused in _called(block):
            if not _takes_choice(fused.owner):
                raise InputError(_NO_CHOICE.format(block.name))
    if len(counts) > 1:
        raise InputError(f"remove: the blocks of {kind} have different numbers of experts; leave out experts")
    count = counts.pop()
    kept, now = part.kept(count), stored_shapes(model)
    reasons = []
    for name, value in numbers_of(model).items():
        if isinstance(value, bool) or value != count:
            continue
        try:
            cuts = list(cuts_of(blocks, now, stored_shapes(laid_out(model, {name: kept})), count, kept))
        except InputError as error:
            reasons.append(f"{name}: {error}")
            continue
        changed = {cut.name for own in cuts for cut in own}
        if all(f"{block.name}.{fused.name}" in changed for block in blocks for fused in _called(block)):
            return Experts(name, count, cuts)
    raise InputError(
        f"remove: no number in the configuration of {kind} changes its experts alone"
        f"{'; ' if reasons else ''}{'; '.join(reasons)[:300]}"
    )


def find_and_try_experts(
    model: nn.Module, blocks: list[Block], part: removal.Experts, batch: dict[str, Tensor]
) -> Experts:
    """The experts of a model, tried: with all of them in another order it computes the same logits, and with fewer it
    runs. Changes nothing.

    Raises:
        InputError: it does not, or there are no such experts.
    """
    found = find_experts(model, blocks, part)
    tokens, tensors = few_tokens(batch), dict(model.state_dict())
    rolled = laid_out(model, {})
    order = torch.arange(found.count).roll(1)
    fill_(rolled, found.chosen(tensors, [order] * len(blocks)), model)
    changed = "in another order it does not compute the same"
    check_same("experts", model, rolled, tokens, changed)
    del rolled
    kept = part.kept(found.count)
    fewer = laid_out(model, {found.setting: kept})
    fill_(fewer, found.chosen(tensors, [torch.arange(kept)] * len(blocks)), model)
    try:
        output_of(fewer, tokens)
    except Exception as error:  # a router's code can raise anything
        raise InputError(
            f"remove: {type(model).__name__} does not run with {kept} experts: {one_line(error)}; remove fewer"
        ) from error
    return found


def without_experts(
    model: nn.Module,
    blocks: list[Block],
    found: Experts,
    part: removal.Experts,
    batches: Sequence[dict[str, Tensor]],
    advanced: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[nn.Module, list[GoneExperts]]:
    """A model with fewer experts, and the removed ones of each block. ``model`` does not change."""
    count, left = found.count, part.kept(found.count)
    calls = list(capture_calls(model, blocks, batches))
    kept, gone = [], []
    for index, (block, cuts) in enumerate(zip(blocks, found.cuts, strict=True)):
        scores = _scores(block, index, calls, count)
        kept.append(scores.sort(descending=True, stable=True).indices[:left].sort().values)
        if cuts:
            removed = sorted({*range(count)} - {*kept[-1].tolist()})
            gone.append(GoneExperts(block.name, removed, scores.tolist()))
        advanced(index + 1, len(blocks))
    smaller = laid_out(model, {found.setting: left})
    fill_(smaller, found.chosen(dict(model.state_dict()), kept), model)
    return smaller, gone


def _called(block: Block) -> Iterator[Any]:
    """The fused weights of experts that a module computes from the router's choice."""
    return (fused for fused in block.experts if fused.layout.count > 1)


def _takes_choice(owner: nn.Module) -> bool:
    """Whether a module of experts has arguments for the router's choice, beside the hidden states: their numbers and
    weights."""
    arguments = inspect.signature(owner.forward).parameters.values()
    return len(arguments) > 2 or any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in arguments)


def _scores(block: Block, index: int, calls: list[BlockCall], count: int) -> Tensor:
    """``[experts]`` float64: the mean over the tokens that are routed to an expert of ``g ‖f(x)‖``, with the router's
    weight ``g`` and the expert's output ``f(x)``; 0 without such tokens. The hidden states pass the block.

    Raises:
        InputError: the experts are not called with the router's choice.
    """
    sums, tokens = torch.zeros(2, count, dtype=torch.float64)
    for call in calls:
        assert call.hidden is not None  # captured, or the output of the block before
        with _listening(block, call.token_mask, sums, tokens):
            call.hidden = run_block(block, call.hidden, call.others[index])
    found: Tensor = sums / tokens.clamp_min(1)
    return found


@contextmanager
def _listening(block: Block, mask: Tensor | None, sums: Tensor, tokens: Tensor) -> Iterator[None]:
    """Within this context calls of the experts add to ``sums`` and ``tokens [experts]``."""
    choices: dict[int, tuple[Tensor, Tensor]] = {}

    def choose(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        choice = router_choice(args, kwargs)
        if choice is None:
            raise InputError(_NO_CHOICE.format(block.name))
        choices[id(owner)] = choice[0].cpu(), choice[1].float().cpu()

    def heard(owner: nn.Module, expert: int, output: Tensor) -> None:
        chosen, weights = choices[id(owner)]
        place, token = routed(chosen, expert)
        if len(token) != len(output):
            raise InputError(f"remove: an expert of {block.name} does not see the tokens routed to it")
        found = weights[token, place] * output.float().norm(dim=-1).cpu()
        used = torch.ones_like(token, dtype=torch.bool) if mask is None else mask.cpu()[token]
        sums[expert] += float(found[used].double().sum())
        tokens[expert] += int(used.sum())

    with ExitStack() as hooks:
        for fused in _last(block):
            hooks.callback(fused.owner.register_forward_pre_hook(choose, with_kwargs=True).remove)
            for expert, linear in enumerate(fused.linears.values()):
                hook = lambda _, x, y, owner=fused.owner, expert=expert: heard(owner, expert, y)  # noqa: E731
                hooks.callback(linear.register_forward_hook(hook).remove)
        yield


def _last(block: Block) -> list[Any]:
    """Of each module of experts the tensor that is multiplied by last: the one whose rows are those of the output."""
    by_owner: dict[int, list[Any]] = {}
    for fused in _called(block):
        by_owner.setdefault(id(fused.owner), []).append(fused)
    last = []
    for own in by_owner.values():
        columns = next(iter(own[0].linears.values())).in_features
        last += [fused for fused in own[1:] if next(iter(fused.linears.values())).out_features == columns][-1:]
    return last
