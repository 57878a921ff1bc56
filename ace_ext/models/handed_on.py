"""What a block gets, beside hidden states, that depends on the blocks before it."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ace_ext.models.blocks import Block
from ace_ext.models.replay import Arguments, BlockCall

TOLERANCE, TOLERANCE_HALF = 1e-3, 2e-2
"""The largest relative difference between the last block's outputs in the model and block by block, in float32 and in
dtypes of 16 bits. A block that lacks an input from another block gives a different output: 0.04 without the positions
that YOLOS adds between its blocks. On a CPU the classes that can be walked give equal bits; on other devices sums may
have another order (not run on a GPU)."""


class Equality(Enum):
    """Whether two sets of arguments are equal."""

    YES = "equal"
    REORDERED = "equal but for the order of integers in the last dimension"
    NO = "different"


def compare_arguments(one: object, other: object) -> Equality:
    """Compares the tensors in nested tuples, lists and dicts. Of dicts only keys that both have are compared: blocks
    may put values into one (:attr:`ace_ext.models.trial.Findings.shares`).

    Indices of the tokens that attention reads, as blocks of GLM 5 pass them on, may have any order.
    """
    return _least(_compare(a, b) for a, b in _pairs(one, other))


def passed_on(block: Block, call: BlockCall, hidden: Tensor, index: int) -> Equality:
    """Compares what the first block of a walk hands to later ones beside hidden states, such as a bias of attention,
    with what it hands to them for other hidden states.

    Args:
        block: with its weights in memory.
        call: its batch.
        hidden: the block's input ``[batch, seqlen, d_model]``.
        index: of the block.
    """
    used = [value for others in call.others[index + 1 :] for value in _tensors(others)]
    own = list(_tensors(call.wrap(hidden)))[1:]
    places = [i for i, tensor in enumerate(own) if any(tensor is value for value in used)]
    if not places:
        return Equality.YES
    with block.products():
        output = block.module(hidden.flip(-1), *call.others[index][0], **call.others[index][1])
    other = list(_tensors(output))[1:]
    return _least(_compare(own[i], other[i]) for i in places)


def differ(found: Tensor, expected: Tensor) -> bool:
    """Whether states that a walk gives are not those of a forward."""
    if found.shape != expected.shape:
        return True
    difference = (found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
    return bool(difference > (TOLERANCE if expected.dtype.itemsize > 2 else TOLERANCE_HALF))


def shared_dicts(call: BlockCall) -> list[MutableMapping[Any, Any]]:
    """The dicts that are an argument of several blocks, which put values into them for later blocks: Gemma 4 does so
    with keys and values of attention."""
    found = [value for _, named in call.others for value in named.values() if isinstance(value, MutableMapping)]
    times = Counter(map(id, found))
    return list({id(value): value for value in found if times[id(value)] > 1}.values())


def with_own_dicts(call: BlockCall) -> BlockCall:
    """The call with copies of its :func:`shared_dicts`, for a second walk with other weights."""
    own = {id(value): copy.copy(value) for value in shared_dicts(call)}

    def of(arguments: Arguments) -> Arguments:
        return arguments[0], {name: own.get(id(value), value) for name, value in arguments[1].items()}

    return replace(call, others=list(map(of, call.others))) if own else call


def _least(found: Iterable[Equality]) -> Equality:
    kinds = {Equality.YES, *found}
    return next(kind for kind in (Equality.NO, Equality.REORDERED, Equality.YES) if kind in kinds)


def _tensors(value: object) -> Iterator[Tensor]:
    return (one for one, _ in _pairs(value, value) if isinstance(one, Tensor))


def _pairs(one: object, other: object) -> Iterator[tuple[object, object]]:
    """Values at the same place, at least one of which is a tensor."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        yield one, other
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in one.keys() & other.keys():
            yield from _pairs(one[key], other[key])
    elif isinstance(one, tuple | list) and isinstance(other, tuple | list):
        for a, b in zip(one, other, strict=False):
            yield from _pairs(a, b)


def _compare(one: object, other: object) -> Equality:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return Equality.NO
    if one is other or torch.equal(one, other):
        return Equality.YES
    if one.is_floating_point() or one.dtype == torch.bool or not one.dim():
        return Equality.NO
    return Equality.REORDERED if torch.equal(one.sort(-1).values, other.sort(-1).values) else Equality.NO
