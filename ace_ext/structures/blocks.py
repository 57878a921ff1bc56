"""Removes whole blocks: again and again the one with the least influence, ``1 - cos(input, output)`` (ShortGPT, arXiv
2403.03853), measured again without those that are gone."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.replay import BlockCall, capture_calls, replaced_forward, run_block
from ace_ext.records import DroppedBlock
from ace_ext.structures.smaller import (
    check_same,
    few_tokens,
    fill_,
    laid_out,
    numbers_of,
    shapes_of,
)


def least_influence(
    model: nn.Module,
    blocks: list[Block],
    batches: Sequence[dict[str, Tensor]],
    count: int,
    advanced: Callable[[int, int], None] = lambda done, of: None,
    once: bool = False,
) -> list[tuple[int, float]]:
    """The places of ``count`` blocks in the order in which they are removed, each with its influence at that time; with
    ``once``, in the dense model. Without ``once`` the last block of its kind, by the names of its parameters, stays
    while there are others."""
    calls = list(capture_calls(model, blocks, batches))
    if once:
        measured = _influence(blocks, calls, list(range(len(blocks))))
        for number in range(count):
            advanced(number + 1, count)
        return sorted(measured.items(), key=lambda item: (item[1], item[0]))[:count]
    # A model without its only block of a kind may not run: the cache of transformers needs a block with attention.
    kinds = [frozenset(name for name, _ in block.module.named_parameters()) for block in blocks]
    gone: list[tuple[int, float]] = []
    for number in range(count):
        left = [index for index in range(len(blocks)) if index not in {place for place, _ in gone}]
        influence = _influence(blocks, calls, left)
        counts = Counter(kinds[index] for index in left)
        several = {index: found for index, found in influence.items() if counts[kinds[index]] > 1}
        gone.append(min((several or influence).items(), key=lambda item: (item[1], item[0])))
        advanced(number + 1, count)
    return gone


def _influence(blocks: list[Block], calls: list[BlockCall], left: list[int]) -> dict[int, float]:
    """The influence of each block of ``left`` in a model of these blocks, averaged over tokens."""
    sums, tokens = dict.fromkeys(left, 0.0), 0
    for call in calls:
        assert call.hidden is not None  # just captured
        hidden = call.hidden
        for index in left:
            output = run_block(blocks[index], hidden, call.others[index])
            distance = 1 - functional.cosine_similarity(hidden.double(), output.double(), dim=-1).flatten()
            used = distance if call.token_mask is None else distance[call.token_mask.to(distance.device)]
            if not bool(torch.isfinite(used).all()):
                raise InputError(f"{blocks[index].name}: its output holds NaN or infinity; load the model in float32")
            sums[index] += float(used.sum())
            hidden = output
        tokens += call.tokens
    return {index: total / max(1, tokens) for index, total in sums.items()}


def find_depth(model: nn.Module, blocks: list[Block], removed: int) -> tuple[str, list[int]]:
    """The setting of the configuration that says how many blocks a model has, a number or a list with an entry for
    each, and the places of blocks that can stay without ``removed`` others. These are the last blocks, or those before
    the last, whose kind some classes fix.

    Raises:
        InputError: there is none with which the class has the same blocks, only fewer.
    """
    if len({block.name.rpartition(".")[0] for block in blocks}) > 1:
        raise InputError("remove: blocks of more than one list cannot be removed; leave out blocks")
    if len({id(p) for b in blocks for p in b.module.parameters()}) < sum(
        len(list(block.module.parameters())) for block in blocks
    ):
        raise InputError("remove: blocks that share weights cannot be removed; leave out blocks")
    left, last = len(blocks) - removed, len(blocks) - 1
    reasons, settings = [], numbers_of(model)
    for field in _depths(settings, len(blocks)):
        for kept in ([*range(left)], [*range(left - 1), last]):
            try:
                lay_out_without(model, blocks, kept, field)
            except InputError as error:
                reasons.append((isinstance(settings[field], list | tuple), f"{field}: {error}"))
                continue
            return field, kept
    words = [reason for _, reason in sorted(reasons, key=lambda one: one[0])]  # those of lists, which few need, last
    raise InputError(
        f"remove: no setting in the configuration of {type(model).__name__} gives the same model with fewer blocks"
        f"{'; ' if words else ''}{'; '.join(words)[:300]}"
    )


def _depths(settings: Mapping[str, Any], count: int) -> list[str]:
    """Settings that may say how many blocks there are: numbers, and lists with an entry for each. Lists are first: a
    shorter one changes nothing where a number says it, but a number that is equal by chance (of heads, if no block that
    is left has attention) would pass where a list says it."""
    lists = [name for name, value in settings.items() if isinstance(value, list | tuple) and len(value) == count]
    return lists + [name for name, value in settings.items() if type(value) is int and value == count]


def without_blocks(
    model: nn.Module,
    blocks: list[Block],
    field: str,
    count: int,
    batches: Sequence[dict[str, Tensor]],
    advanced: Callable[[int, int], None] = lambda done, of: None,
    once: bool = False,
) -> tuple[nn.Module, list[DroppedBlock]]:
    """A model with ``count`` blocks less, and the removed ones. ``model`` does not change. ``once``: as of
    :func:`least_influence`.

    Raises:
        InputError: the class does not compute the same with fewer blocks as without the removed ones; or a block's
            output is not finite.
    """
    gone = least_influence(model, blocks, batches, count, advanced, once)
    places = {place for place, _ in gone}
    kept = [index for index in range(len(blocks)) if index not in places]
    smaller = with_blocks(model, blocks, kept, field, few_tokens(batches[0]))
    return smaller, [DroppedBlock(blocks[place].name, influence) for place, influence in gone]


def with_blocks(model: nn.Module, blocks: list[Block], kept: list[int], field: str, tokens: Tensor) -> nn.Module:
    """A model with the blocks ``kept``, which shares their weights. ``model`` does not change. ``tokens [1, seqlen]``:
    to try it.

    Raises:
        InputError: the class does not have these blocks, or does not compute the same with them as without the others.
    """
    smaller, names = lay_out_without(model, blocks, kept, field)
    fill_(smaller, {new: tensor for name, tensor in model.state_dict().items() if (new := names(name))}, model)
    with ExitStack() as stack:
        for place in set(range(len(blocks))) - set(kept):
            module = blocks[place].module
            stack.enter_context(replaced_forward(module, _bypass(module.forward)))
        check_same("blocks", model, smaller, tokens)
    return smaller


def _bypass(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that gives a block's input in the form of its output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        output = original(*args, **kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    return forward


def lay_out_without(
    model: nn.Module, blocks: list[Block], kept: list[int], field: str
) -> tuple[nn.Module, Callable[[str], str]]:
    """A model with the blocks ``kept``, laid out with another ``field`` of the configuration; and a function that gives
    the new name of a tensor of the model, empty if it is gone.

    Raises:
        InputError: the class does not have these blocks with these settings.
    """
    place = {blocks[index].name: f"{blocks[index].name.rpartition('.')[0]}.{new}" for new, index in enumerate(kept)}
    prefixes = {f"{block.name}.": place.get(block.name, "") for block in blocks}

    def renamed(name: str) -> str:
        for prefix, new in prefixes.items():
            if name.startswith(prefix):
                return f"{new}.{name.removeprefix(prefix)}" if new else ""
        return name

    expected = {new: shape for name, shape in shapes_of(model).items() if (new := renamed(name))}
    refused: InputError | None = None
    for changes in _settings_without(numbers_of(model), len(blocks), kept, field):
        try:
            smaller = laid_out(model, changes)
        except InputError as error:
            refused = refused or error
            continue
        found = shapes_of(smaller)
        if found == expected:
            return smaller, renamed
        other = min(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        gone = ", ".join(block.name for block in blocks if block.name not in place)
        words = f"remove: with {field} of {len(kept)} and without {gone} the class has another {other}"
        refused = refused or InputError(words)
        if any(name.startswith(f"{blocks[len(kept)].name}.") for name in found):
            break  # the field does not count blocks
    assert refused is not None  # there was a change at least
    raise refused


def _settings_without(settings: Mapping[str, Any], count: int, kept: list[int], field: str) -> Iterator[dict[str, Any]]:
    """Changes of the configuration that may leave the blocks ``kept`` of ``count``. In all of them lists with an entry
    for each block become shorter, and settings of single blocks, by number, get the new numbers. In all but the first a
    list of some blocks (``mlp_only_layers``) or a number of first blocks (``first_k_dense_replace``) follows too, or
    lists of as many numbers stay as they are: they may not be of blocks (``time_step_limit``)."""
    place = {index: new for new, index in enumerate(kept)}
    counted = isinstance(settings[field], int)
    changes: dict[str, Any] = {field: len(kept)} if counted else {}
    others: list[dict[str, Any]] = []
    others.append({name: value for name, value in settings.items() if name != field and _numbers(value, count)})
    for name, value in settings.items():
        if name in changes or "token" in name or isinstance(value, bool):
            continue
        if isinstance(value, list | tuple) and len(value) == count:
            changes[name] = [value[index] for index in kept]
        elif isinstance(value, Mapping) and value and _of_blocks(value, count):
            changes[name] = {str(place[int(key)]): one for key, one in value.items() if int(key) in place}
        elif isinstance(value, list | tuple) and value and all(type(one) is int and 0 <= one < count for one in value):
            others.append({name: [place[index] for index in value if index in place]})
        elif isinstance(value, int) and 0 < value < count + counted:  # a list says the depth, so no number follows it
            others.append({name: sum(index < value for index in kept)})
    yield changes
    yield from (changes | other for other in others if any(changes.get(n, settings[n]) != v for n, v in other.items()))


def _numbers(value: object, count: int) -> bool:
    """Whether this is a list of so many numbers."""
    return isinstance(value, list | tuple) and len(value) == count and all(isinstance(x, int | float) for x in value)


def _of_blocks(settings: Mapping[Any, Any], count: int) -> bool:
    """Whether these are settings of some of ``count`` blocks, by number (``per_layer_config`` of Gemma 4)."""
    return all(str(key).isdecimal() and int(key) < count for key in settings) and all(
        isinstance(one, Mapping) for one in settings.values()
    )
