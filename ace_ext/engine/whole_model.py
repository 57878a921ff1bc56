"""Statistics from forward passes of the whole model, for one that cannot be walked block by block: its blocks are
called several times, or read more than the output of the one before."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.models.blocks import Block
from ace_ext.models.replay import replaced_forward
from ace_ext.pruning.statistics import LinearStatistics, StatisticsCollector

MakeCollector = Callable[[dict[str, nn.Linear]], StatisticsCollector]


class WholeForwards:
    """A :class:`ace_ext.engine.protocols.StatisticsSource`: the statistics of a block are those of all its calls in the
    model as it is now, so that blocks before it are pruned already.

    Args:
        model: in evaluation mode, with all its weights.
        blocks: its blocks.
        batches: arguments of the model's calls.
        collector: makes a collector of the kinds of statistics that the run needs.
    """

    def __init__(
        self, model: nn.Module, blocks: list[Block], batches: list[dict[str, Tensor]], collector: MakeCollector
    ) -> None:
        self._model, self._blocks, self._batches, self._collector = model, blocks, batches, collector

    def block(self, name: str, children: Iterable[str], device: torch.device) -> dict[str, LinearStatistics]:
        """The statistics of a block's Linears, by their names in the block; empty for one that saw no token."""
        children = list(children)
        block = next(block for block in self._blocks if block.name == name)
        collector = self._collector({child: block.linears[child] for child in children})
        collector.alone = frozenset(block.linears)
        with ExitStack() as stack:
            for each in self._blocks:
                stack.enter_context(replaced_forward(each.module, _with_products(each)))
            stack.enter_context(collector)
            for batch in self._batches:
                mask = batch.get("attention_mask")
                collector.token_mask = None if mask is None or bool(mask.all()) else mask.flatten().bool()
                self._model(**batch, use_cache=False)
        return {child: collector.stats.get(child) or collector.empty(child) for child in children}


def _with_products(block: Block) -> Callable[..., Any]:
    original = block.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with block.products():
            return original(*args, **kwargs)

    return forward
