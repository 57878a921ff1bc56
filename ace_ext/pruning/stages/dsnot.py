"""DSnoT (arXiv 2310.08915): exchange pruned and kept weights of a row while that corrects its mean output.

The stage reads the mean and the variance of each input column, and no Gram matrix. The error of a row is the sum of
``w_j m_j`` over its pruned weights, where ``m_j`` is the mean of input column j.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.pruning.kinds import INPUT
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import Problem, Refine


@dataclass(frozen=True)
class Dsnot(Refine):
    """Exchanges kept and pruned weights of a row, with a pattern within its N:M groups."""

    name = "dsnot"
    summary = "exchanges kept and pruned weights of a row so that its mean output shifts less (arXiv 2310.08915)"
    groups = ("row", "matrix")
    reads = frozenset({INPUT})

    cycles: int = option(50, "exchanges in a row at most", Limits(at_least=1))
    threshold: float = option(
        5e-5,
        "error of a row, relative to its root mean square output for uncorrelated inputs, below which it is left (the "
        "authors' 0.1 is for the sum over 2048 tokens)",
        Limits(at_least=0, words="0 or more"),
    )

    def refine_(self, problem: Problem) -> None:
        """Exchanges entries of ``problem.mask`` in place.

        Each cycle of a row restores the pruned weight whose part of the error is largest for the variance of its
        column, and prunes the kept one with the smallest score of Wanda: of those that lower the error, or with a
        pattern of its group. A row ends when an exchange would not lower its error.
        """
        mask, moments = problem.mask, problem.moments
        assert mask is not None  # a stage before it chose it
        part = problem.dense * moments.mean  # [rows, cols]: of the row's mean output
        wanda = problem.dense.abs() * (moments.variance + moments.mean.square()).sqrt()
        least = self.threshold * wanda.square().sum(1).sqrt()
        error = (part * ~mask).sum(1)
        count, group = min(self.cycles, part.shape[1]), problem.nm[1]
        certain = part.abs() / moments.variance
        grow = _ranked(certain, ~mask & (part > 0), ~mask & (part < 0), count)
        prune = grow if group else _ranked(-wanda, mask & (part < 0), mask & (part > 0), count)
        kept = wanda.masked_fill_(~mask, torch.inf)  # from now on: of weights that may be pruned
        rows, taken = torch.arange(len(part), device=part.device), torch.zeros_like(error, dtype=torch.int64)
        taken = taken.repeat(2, 1)  # candidates of each sign of the error that are used up
        for _ in range(count):
            sign = (error < 0).long()
            place = sign, rows, taken[sign, rows]
            first = grow[place]
            second = _weakest_of_group(kept, rows, first, group) if group else prune[place]
            after = error - part[rows, first] + part[rows, second]
            good = (first >= 0) & (second >= 0) & (error.abs() > least[rows]) & (after.abs() < error.abs())
            rows, error, first, second = rows[good], after[good], first[good], second[good]
            if not len(rows):
                break
            mask[rows, first], mask[rows, second] = True, False
            kept[rows, second] = torch.inf
            taken[sign[good], rows] += 1

    def working_bytes(self, rows: int, cols: int) -> int:
        """Parts of the output, scores and their copies, and the candidates of each row with both signs."""
        return 30 * rows * cols + 64 * rows * min(self.cycles, cols)


def _ranked(score: Tensor, positive: Tensor, negative: Tensor, count: int) -> Tensor:
    """``[2, rows, count]``: the columns with the highest ``score [rows, cols]`` of each row, in order, among those
    that ``positive`` allows and among those that ``negative`` allows; -1 where there are no more."""
    limit = torch.finfo(score.dtype).max
    ranked = []
    for allowed in (positive, negative):
        usable = score.clamp(-limit / 2, limit).masked_fill(~allowed, -limit)
        columns = ops.topk_mask(usable, "score", count, moment=usable).nonzero()[:, 1].view(len(score), count)
        order = usable.gather(1, columns).argsort(dim=1, descending=True, stable=True)
        columns = columns.gather(1, order)
        ranked.append(columns.masked_fill(~allowed.gather(1, columns), -1))
    return torch.stack(ranked)


def _weakest_of_group(kept: Tensor, rows: Tensor, columns: Tensor, group: int) -> Tensor:
    """``[n]``: for each of ``rows [n]`` of ``kept [rows, cols]`` the column with the smallest entry in the group that
    holds ``columns [n]``; -1 if all its entries are infinite."""
    start = columns.clamp_min(0) // group * group
    smallest, place = kept[rows[:, None], start[:, None] + torch.arange(group, device=kept.device)].min(dim=1)
    return (start + place).masked_fill(smallest == torch.inf, -1)


STAGE = Dsnot
