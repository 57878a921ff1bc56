"""Gradients of what blocks hand on beside hidden states: tensors in a dict that is an argument of several blocks, such
as keys and values of attention (:func:`ace_ext.models.handed_on.shared_dicts`)."""

from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ace_ext.models.blocks import Block
from ace_ext.models.handed_on import shared_dicts
from ace_ext.models.replay import BlockCall, run_block

Place: TypeAlias = tuple[int, Hashable, int]
"""Where a tensor is: the number of the dict, the key, and the position in its value."""


class SharedStates:
    """The dicts of one batch during one step of training. Without such dicts it does nothing.

    Each block's backward pass is one of its own, so a graph ends where a block reads a tensor that another one has put
    into a dict. The gradient with respect to this tensor is kept until the other block's backward pass.

    Args:
        call: of the batch.
    """

    def __init__(self, call: BlockCall) -> None:
        self._call = call
        self._dicts: list[MutableMapping[Any, Any]] = shared_dicts(call)
        self._start = self._contents()
        self._before: dict[int, list[dict[Any, Any]]] = {}
        """By block: the contents when the forward pass reached it."""
        self._handed: set[Place] = set()
        """What blocks of this step have put into the dicts."""
        self._read: dict[int, dict[Place, Tensor]] = {}
        self._put: dict[int, dict[Place, Tensor]] = {}
        """By block, once it has run with a graph: what it may have read, as leaves, and what it has put there."""
        self._gradients: dict[Place, Tensor] = {}

    def run(self, block: Block, index: int, hidden: Tensor) -> Tensor:
        """Runs a block, in the forward pass or again, with the contents that the forward pass gave it. If gradients are
        enabled, :meth:`gradients` must follow."""
        others = self._call.others[index]
        if not self._dicts:
            return run_block(block, hidden, others)
        before = self._before.setdefault(index, self._contents())
        self._set(before)
        if torch.is_grad_enabled():
            self._read[index] = {place: _leaf(tensor) for place, tensor in self._tensors() if place in self._handed}
            self._set_tensors(self._read[index])
        given = dict(self._tensors())
        output = run_block(block, hidden, others)
        put = {place: tensor for place, tensor in self._tensors() if tensor is not given.get(place)}
        self._handed |= put.keys()
        if torch.is_grad_enabled():
            self._put[index] = put
        return output

    def gradients(self, index: int, output: Tensor, gradient: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the loss with respect to ``inputs`` of block ``index``, whose ``output`` has ``gradient``.
        Blocks are asked from the last to the first."""
        put, read = self._put.pop(index, {}), self._read.pop(index, {})
        known = {tensor: self._gradients.pop(place) for place, tensor in put.items() if place in self._gradients}
        roots = {output: gradient, **{tensor: own for tensor, own in known.items() if tensor.requires_grad}}
        found = torch.autograd.grad(list(roots), [*inputs, *read.values()], list(roots.values()), allow_unused=True)
        for place, own in zip(read, found[len(inputs) :], strict=True):
            if own is not None:
                self._gradients[place] = self._gradients[place] + own if place in self._gradients else own
        return list(found[: len(inputs)])

    def close(self) -> None:
        """Gives the dicts the contents that they had at first, and frees the graphs."""
        self._set(self._start)

    def _contents(self) -> list[dict[Any, Any]]:
        return [dict(each) for each in self._dicts]

    def _set(self, contents: list[dict[Any, Any]]) -> None:
        for each, values in zip(self._dicts, contents, strict=True):
            each.clear()
            each.update(values)

    def _tensors(self) -> Iterator[tuple[Place, Tensor]]:
        for number, each in enumerate(self._dicts):
            for key, value in each.items():
                for position, tensor in enumerate([value] if isinstance(value, Tensor) else value):
                    if isinstance(tensor, Tensor) and tensor.is_floating_point():
                        yield (number, key, position), tensor

    def _set_tensors(self, tensors: dict[Place, Tensor]) -> None:
        for (number, key, position), tensor in tensors.items():
            value = self._dicts[number][key]
            if isinstance(value, Tensor):
                self._dicts[number][key] = tensor
            else:
                self._dicts[number][key] = (*value[:position], tensor, *value[position + 1 :])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(True)
