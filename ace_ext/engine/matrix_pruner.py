"""Prunes matrices, measures the change of their outputs, and checks the result."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.engine.matrix_report import Measurements, output_of
from ace_ext.engine.protocols import Peers
from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.masks import as_rows, keep_budget, keep_of_group, scored_weight
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import MatrixReport

Reports = dict[str, MatrixReport | None]
"""By the Linears' names in the block; None: it stayed dense."""


class MatrixPruner:
    """Prunes one matrix at a time.

    Args:
        config: what to prune and how.
        peers: the other processes of the run.
        device: where blocks are run.
    """

    def __init__(self, config: PruneConfig, peers: Peers, device: torch.device) -> None:
        self.config, self.peers, self._device = config, peers, device
        self.keeps: dict[str, dict[str, int]] | None = None
        """How many weights of a row to keep, by the names of block and Linear; None: as the sparsity says."""
        self.measurements = Measurements()

    def prune_all(self, block: Block, stats: dict[str, LinearStatistics]) -> Reports:
        """Prunes the Linears of these statistics; each one's statistics are freed once it is pruned."""
        return {child: self.prune(block, child, stats.pop(child)) for child in list(stats)}

    def prune(self, block: Block, child: str, stats: LinearStatistics) -> MatrixReport | None:
        """Prunes one Linear's weight and measures the change of its output. None for a Linear that saw no token and is
        not an expert's; it stays dense.

        Raises:
            InputError: as :func:`ace_ext.pruning.prune_linear.prune_linear_`, with the matrix's name.
        """
        weight = block.linears[child].weight
        name = block.full_name(child)
        keep_row = None if self.keeps is None else self.keeps[block.name][child]
        if not stats.tokens:
            return self._prune_unseen(name, weight) if block.is_expert(child) else None
        dense = output_of(stats, weight)
        try:
            solution = prune_linear_(weight, stats, self.config, keep_row, self.peers)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        report = self.measurements.measure(name, weight, stats, dense, keep_budget(weight, self.config, keep_row))
        report.solution = solution
        return report

    def _prune_unseen(self, name: str, weight: Tensor) -> MatrixReport:
        """Prunes an expert's weight by magnitude, because no token was routed to it, and rounds it to the grid if the
        method has one."""
        own = self.config
        config = PruneConfig("magnitude", own.sparsity if own.pattern is None else None, own.pattern, own.group)
        with as_rows(weight) as rows:
            if own.method.prunes:
                config.comparison.prune_(scored_weight(rows, None, config), keep_of_group(rows, config))
            if own.method.quantize is not None:
                rows.copy_(own.method.quantize.round_plainly(rows))
        return self.measurements.unseen(name, weight, keep_budget(weight, config))

    def check(self, where: str, weights: list[Tensor]) -> None:
        """Checks pruned weights.

        Args:
            where: what was pruned, for the message.
            weights: its weights; with a ``device_map`` they may be on other GPUs than the run's.

        Raises:
            InputError: an op met NaN, infinity or an overflow; or the processes derived different weights.
        """
        self._check_finite(where, weights)
        self.peers.check_same(weights, where)

    def _check_finite(self, where: str, weights: Iterable[Tensor]) -> None:
        """Reads the GPUs' flags for non-finite values, once per block. On the CPU the ops themselves raise."""
        devices = dict.fromkeys([self._device, *(weight.device for weight in weights)])
        # Every flag is read, and so cleared, before the first is reported.
        for op in filter(None, [ops.take_not_finite(device) for device in devices]):
            raise InputError(f"{where}: {op} met NaN, infinity or an overflow in activations or scores")
