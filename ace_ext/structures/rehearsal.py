"""Tries a removal as a run does before it changes anything, for a plan: on the first blocks of a model's class, with
random weights. Shapes alone do not tell whether a class computes the same without structures: a norm may be over all
heads, or a matrix may hold queries, keys and values."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import embedding_weight
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.run_mode import run_mode
from ace_ext.models.whole_forward import takes_tokens
from ace_ext.pruning import removal
from ace_ext.structures.blocks import find_depth, lay_out_without, with_blocks
from ace_ext.structures.remove import check_walk, try_parts
from ace_ext.structures.smaller import laid_out, output_of

MOST = 2**28
"""The most parameters that get random weights: 1 GiB."""
VOCABULARY = 64
"""How many tokens the class gets if it would have more parameters otherwise."""


class Rehearsal:
    """Tries removals.

    Args:
        model: loaded, or a skeleton. It does not change.
        blocks: its blocks.
    """

    def __init__(self, model: nn.Module, blocks: list[Block]) -> None:
        self._of = model, blocks
        self._twin: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, wanted: removal.Removal) -> bool:
        """Whether a removal was tried. It is not if the first block of each kind has more parameters than
        :data:`MOST`, or if the class gives numbers that are not finite with random weights.

        Raises:
            InputError: a run would refuse it.
        """
        if self._twin is None:
            self._twin = _few_blocks(*self._of)
            if self._twin is None:
                return False
            _fill_by_chance_(self._twin)
        twin = self._twin
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, min(VOCABULARY, embedding_weight(twin).shape[0]), (1, 16), generator=generator)
        with run_mode(twin):
            blocks = find_blocks(twin)
            with takes_tokens(twin):
                output = output_of(twin, tokens)
            check_walk(twin, blocks, {"input_ids": tokens})
            if not bool(torch.isfinite(output).all()):
                return False
            if wanted.blocks is not None:
                _try_blocks(twin, blocks, min(wanted.blocks.removed(len(self._of[1])), len(blocks) - 1), tokens)
            try_parts(twin, blocks, {"input_ids": tokens}, wanted)
        return True


def _try_blocks(model: nn.Module, blocks: list[Block], count: int, tokens: Tensor) -> None:
    """Removes ``count`` blocks, not those that a run would: it chooses by influence, and its class may refuse these."""
    try:
        depth, kept = find_depth(model, blocks, count)
    except InputError:  # the plan asks the whole model
        return
    with_blocks(model, blocks, kept, depth, tokens)


def _few_blocks(model: nn.Module, blocks: list[Block]) -> nn.Module | None:
    """The class with the first blocks, laid out in float32: as many as there are until each kind was there, and one
    more if that is not too large; with all blocks if it cannot have fewer. None: even that is too large."""
    twin = laid_out(model, {}).float()
    kinds = [tuple((name, p.shape) for name, p in block.module.named_parameters()) for block in blocks]
    count = 1 + max(kinds.index(kind) for kind in kinds)
    for changes in ({}, {"vocab_size": VOCABULARY}):
        with suppress(InputError):  # not with fewer tokens
            whole = laid_out(twin, changes)
            for few in chain([whole], _shorter(whole, (count + 1, count))):  # of two blocks one can be removed
                if _size(few) <= MOST:
                    return few
    return None


def _shorter(model: nn.Module, counts: Iterable[int]) -> Iterator[nn.Module]:
    """The class with the first blocks, for each of the counts that are fewer and that it can have."""
    blocks = find_blocks(model, check=False)
    for count in (count for count in counts if count < len(blocks)):
        with suppress(InputError):
            depth, _ = find_depth(model, blocks, len(blocks) - count)
            yield lay_out_without(model, blocks, [*range(count)], depth)[0]


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _fill_by_chance_(model: nn.Module) -> None:
    """Gives a model that was laid out random weights: matrices that keep the size of what they read, and vectors of
    positive numbers."""
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}

    def of(parameter: nn.Parameter) -> nn.Parameter:
        found: Tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
        if not found.is_floating_point():
            return nn.Parameter(found.zero_(), requires_grad=False)
        if found.dim() < 2:
            return nn.Parameter(found.uniform_(0.5, 1.5, generator=generator))
        return nn.Parameter(found.normal_(0.0, max(1, found.shape[-1]) ** -0.5, generator=generator))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made.setdefault(id(parameter), of(parameter))
                module._parameters[name] = made[id(parameter)]
