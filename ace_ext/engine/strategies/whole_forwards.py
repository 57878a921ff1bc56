"""Statistics from forward passes of the whole model, for one that cannot be walked block by block: its blocks are
called several times, or read more than the output of the one before."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from ace_ext.engine.matrix_pruner import MatrixPruner, Reports
from ace_ext.engine.strategies._strategy import RunSizes, StrategyBytes
from ace_ext.engine.strategies.dense_order import DenseOrder
from ace_ext.models._transformers import plain_call
from ace_ext.models.block_lists import goes_beyond_text
from ace_ext.models.blocks import Block
from ace_ext.models.padded_experts import padding, set_padding_, without_padding
from ace_ext.models.replay import replaced_forward, take_hidden, with_products
from ace_ext.models.token_masks import MASK, TokenMasks, first_tokens
from ace_ext.pruning.statistics import LinearStatistics, StatisticsCollector

MakeCollector = Callable[[Mapping[str, nn.Linear]], StatisticsCollector]


class WholeForwards:
    """Prunes a block with the statistics of all its calls in the model as it is now, so that blocks before it are
    pruned already.

    Args:
        model: in evaluation mode, with all its weights.
        blocks: its blocks.
        batches: arguments of the model's calls.
        collector: makes a collector of the kinds of statistics that the run needs.
        pruner: prunes each matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        batches: list[dict[str, Tensor]],
        collector: MakeCollector,
        pruner: MatrixPruner,
    ) -> None:
        self._model, self._blocks, self._batches = model, blocks, batches
        self._collector, self._pruner = collector, pruner
        self._beyond = goes_beyond_text(model, [block.name for block in blocks])

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the block."""
        stats = self.statistics(block, index)
        return {child: self._pruner.prune(block, child, stats.pop(child)) for child in block.linears}

    def statistics(self, block: Block, index: int) -> dict[str, LinearStatistics]:
        """The statistics of the block's Linears, by their names in it; empty for one that saw no token."""
        collector = self._collector(block.linears)
        collector.alone = frozenset(block.linears)
        masks, options, batch = TokenMasks(self._model, not self._beyond), plain_call(self._model), self._batches[0]

        def mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Before a call of the block: which of its tokens are padding."""
            hidden, others = take_hidden(args, kwargs)
            collector.token_mask = masks.of(block.name, batch, hidden)
            collector.states = masks.of_states(block.name, batch, [others])
            set_padding_(collector.token_mask)

        with ExitStack() as stack:
            for each in self._blocks:
                stack.enter_context(replaced_forward(each.module, with_products(each)))
            stack.enter_context(collector)
            stack.enter_context(without_padding(block))
            if not masks.plain:
                stack.callback(block.module.register_forward_pre_hook(mask, with_kwargs=True).remove)
            for batch in self._batches:
                found = batch.get("attention_mask") if masks.plain else None
                collector.token_mask = None if found is None or bool(found.all()) else found.flatten().bool()
                if masks.plain:
                    ids = batch["input_ids"]
                    collector.starts = first_tokens(ids.shape, collector.token_mask, ids.device)
                with padding(collector.token_mask):
                    self._model(**batch, **options)
        return {child: collector.stats.get(child) or collector.empty(child) for child in block.linears}

    def check_padding(self) -> None:
        """To be called before the first block is pruned.

        Raises:
            InputError: a batch has padding, and a block sees patches of the tokens, as in a Byte Latent Transformer.
        """
        padded = (batch for batch in self._batches if MASK in batch and not bool(batch[MASK].all()))
        batch, masks = next(padded, None), TokenMasks(self._model, not self._beyond)
        if batch is None or not masks.plain:
            return

        def look(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = take_hidden(args, kwargs)[0]
            if hidden.dim() == 3:
                masks.of(name, batch, hidden)

        with ExitStack() as hooks:
            for block in self._blocks:
                handle = block.module.register_forward_pre_hook(partial(look, block.name), with_kwargs=True)
                hooks.callback(handle.remove)
            self._model(**batch, **plain_call(self._model))

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The statistics of a whole block."""
        return DenseOrder.memory(sizes)
