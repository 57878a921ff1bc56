"""What each strategy gives: how it prunes a block, and the memory that it takes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.collection import Collection
from ace_ext.engine.context import RunContext
from ace_ext.engine.matrix_pruner import MatrixPruner, Reports
from ace_ext.engine.model_shape import ModelShape, statistics_bytes
from ace_ext.models.blocks import Block
from ace_ext.pruning.statistics import LinearStatistics, StatisticsCollector

HEAP_TENSOR = 2**25
"""Smaller tensors are allocated on glibc's heap, which may keep freed memory in the process."""


@dataclass(frozen=True)
class RunSizes:
    """The sizes of a run from which memory is estimated."""

    blocks: Sequence[Block]
    shape: ModelShape
    tokens: int  # of all batches
    batch: int  # tokens of a batch
    seqlen: int
    needs: frozenset[str]  # kinds of statistics
    stored: Sequence[int] | None = None
    """Bytes of each block's statistics in a file, if they come from there; no token passes a block then."""

    def forward(self, needs: frozenset[str] | None = None) -> int:
        """Bytes of the activations of one batch in a block, while the kinds ``needs`` (default: the run's) are
        collected. With statistics from a file: bytes of the file while a block's are read."""
        if self.stored is not None:
            return max(self.stored, default=0)
        return self.shape.forward_bytes(self.batch, self.seqlen, self.needs if needs is None else needs)

    def sample_outputs(self) -> int:
        """At most the bytes of a matrix's outputs for its sample rows: dense, and before and after pruning in
        float32."""
        return StatisticsCollector.SAMPLE_ROWS * self.shape.widest * (self.shape.itemsize + 8)

    def pending(self, at_a_stop: int) -> int:
        """Bytes that unfinished forwards of all batches hold while a matrix is pruned: ``at_a_stop``, or where freed
        tensors stay in the process, all that they held."""
        if self.batch * self.shape.widest * self.shape.itemsize >= HEAP_TENSOR:
            return at_a_stop
        kept = self.shape.activation_bytes(self.batch, self.seqlen, self.needs)  # one product at a time is converted
        return kept * self.tokens // self.batch

    def statistics(self, block: Block, children: Sequence[str], needs: frozenset[str] | None = None) -> int:
        """Bytes of the statistics of these Linears. Each token is routed to a few experts, so an expert sees only a
        share of the tokens on average."""
        total = 0
        for child in children:
            tokens = self.tokens
            if block.is_fused(child) and len(children) > 1:
                tokens = math.ceil(tokens * self.shape.experts_of_a_token / self.shape.experts)
            total += statistics_bytes(block.linears[child], self.needs if needs is None else needs, tokens)
        return total

    def most_statistics(self, together: Iterable[tuple[Block, list[str]]]) -> int:
        """The largest of the sets of Linears whose statistics are in memory at the same time."""
        return max(self.statistics(block, children) for block, children in together)


@dataclass(frozen=True)
class StrategyBytes:
    """Bytes that a strategy holds beside weights, hidden states and the working memory of pruning a matrix."""

    statistics: int
    forward: int  # activations while statistics are collected
    pending: int = 0  # activations while a matrix is pruned
    stacks: int = 0  # of unfinished forwards, beside their tensors


class Strategy(Protocol):
    """A way to prune a block. It also makes the block's outputs the next block's inputs."""

    def prune(self, block: Block, index: int) -> Reports:
        """Prunes the matrices of block ``index``, whose weights are in memory."""
        ...

    @classmethod
    def memory(cls, sizes: RunSizes) -> StrategyBytes:
        """The memory that it takes."""
        ...


class WalkStrategy:
    """What the strategies of a walk work with.

    Args:
        states: the walk's.
        collection: collects statistics.
        pruner: prunes each matrix.
        context: of the run.
    """

    def __init__(self, states: BatchStates, collection: Collection, pruner: MatrixPruner, context: RunContext) -> None:
        self._states, self._collection, self._pruner, self._context = states, collection, pruner, context


class DenseStrategy(Strategy, Protocol):
    """A strategy that reads all statistics of a block while the block is dense."""

    def statistics(self, block: Block, index: int) -> dict[str, LinearStatistics]:
        """Statistics of all Linears of dense block ``index``. Its outputs become the next block's inputs."""
        ...


def whole_blocks(blocks: Iterable[Block]) -> Iterator[tuple[Block, list[str]]]:
    """All Linears of each block together."""
    return ((block, list(block.linears)) for block in blocks)


def same_inputs(block: Block) -> Iterator[tuple[Block, list[str]]]:
    """The Linears with the same input, for which all with the same number of columns are an upper bound; those of
    fused experts are left out."""
    columns = {c: linear.weight.shape[1] for c, linear in block.linears.items() if not block.is_fused(c)}
    for count in set(columns.values()):
        yield block, [child for child, own in columns.items() if own == count]


def output_of_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """The output ``[..., d_out]`` for ``x [..., d_in]``, with the present weight; no hook is called."""
    output: Tensor = linear.forward(x)
    return output
