"""The reference of the ops that preserve a row's mean output (:mod:`ace_ext.ops.reference` is that of all others).

Written from ``csrc/ops/balance.h`` and ``csrc/ops/restore.h``, one row and one weight at a time. Imports nothing of the
fast path. Searches are in float32 and swaps in float64, rounded as in the contract: results have the ops' bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LANES = 32
"""The candidates of a round on each side."""


def mean_loss(mask: Tensor, weight: Tensor, variance: Tensor, mean: Tensor) -> Tensor:
    """``[rows]`` float64, ``Σ w_j² variance_j + (Σ w_j mean_j)²`` over the removed weights of each row."""
    removed = torch.where(mask.cpu(), 0.0, _wide(weight))
    return removed.square() @ _wide(variance) + (removed @ _wide(mean)).square()


def balance_mean(
    mask: Tensor, weight: Tensor, variance: Tensor, mean: Tensor, group_m: int = 0, rounds: int = 1
) -> tuple[Tensor, Tensor]:
    """The balanced mask ``[rows, cols]`` and the swaps ``[rows]`` int64."""
    mask, weight, variance, mean = mask.cpu().clone(), *(t.detach().cpu().float() for t in (weight, variance, mean))
    swaps = [_Row(row, w, variance, mean).balance(group_m, rounds) for row, w in zip(mask, weight, strict=True)]
    return mask, torch.tensor(swaps, dtype=torch.int64)


def restore_mean(weight: Tensor, mask: Tensor, mean: Tensor, direction: Tensor) -> Tensor:
    """``[rows, cols]`` float32: +0.0 where removed, ``w_j + s d_j / (1 + Σ_kept m_j d_j)`` where kept, ``s`` the sum of
    ``w_j m_j`` over the removed."""
    mask, weight, mean, direction = mask.cpu(), _wide(weight), _wide(mean), _wide(direction)
    restored = torch.zeros(weight.shape, dtype=torch.float32)
    for i, kept in enumerate(mask):
        shift = _sum_by_lanes(torch.where(kept, 0.0, weight[i]) * mean)
        gain = _sum_by_lanes(torch.where(kept, direction, 0.0) * mean)
        restored[i, kept] = (weight[i] + shift / (1.0 + gain) * direction)[kept].float()
    return restored


class _Pair(NamedTuple):
    restored: int
    removed: int


class _Row:
    """One row: its mask, which is rewritten, and each weight's terms in the sums over removed weights."""

    def __init__(self, mask: Tensor, weight: Tensor, variance: Tensor, mean: Tensor) -> None:
        self.mask, self.weight, self.variance, self.mean = mask, weight, variance, mean
        self.spread = (weight.double().square() * variance.double()).tolist()
        self.shift = (weight.double() * mean.double()).tolist()
        sizes = _sum_by_lanes((weight * mean).abs())
        self.shifts = float(sizes) * (1.0 + len(mask) * 2.0**-22) + len(mask) * 2.0**-126
        self.s = float(_sum_by_lanes(torch.where(mask, 0.0, weight).double() * mean.double()))
        self.swaps = 0

    def balance(self, group_m: int, rounds: int) -> int:
        for _ in range(rounds):
            before = self.swaps
            if group_m > 0:
                self._swap_pairs(self._pairs(group_m))
            else:
                self._swap_sides(*self._sides())
            if self.swaps == before:
                break
        return self.swaps

    def _search_terms(self) -> tuple[list[float], list[float]]:
        """The change of the cost by restoring and by removing each weight; float32."""
        shift = self.weight * self.mean
        pull = self.weight * self.weight * self.variance + torch.tensor(2.0 * self.s).float() * shift
        return (shift * shift - pull).tolist(), (shift * shift + pull).tolist()

    def _sides(self) -> tuple[list[int], list[int]]:
        """The columns that the lanes offer: removed ones, then kept ones."""
        restore, remove = self._search_terms()
        sides: tuple[list[int], list[int]] = ([], [])
        for lane in range(min(LANES, len(self.mask))):
            columns = range(lane, len(self.mask), LANES)
            for side, change, kept in ((sides[0], restore, False), (sides[1], remove, True)):
                offered = [j for j in columns if bool(self.mask[j]) == kept and change[j] < torch.inf]
                side += [min(offered, key=change.__getitem__)] if offered else []  # the first of equals
        return sides

    def _pairs(self, group_m: int) -> list[_Pair]:
        """The pairs that the lanes offer."""
        restore, remove = self._search_terms()
        best: dict[int, tuple[float, _Pair]] = {}
        for group in range(len(self.mask) // group_m):
            columns = range(group * group_m, (group + 1) * group_m)
            back = [j for j in columns if not self.mask[j] and restore[j] < torch.inf]
            out = [j for j in columns if self.mask[j] and remove[j] < torch.inf]
            if not back or not out:
                continue
            pair = _Pair(min(back, key=restore.__getitem__), min(out, key=remove.__getitem__))
            change = float(torch.tensor(restore[pair.restored]) + torch.tensor(remove[pair.removed]))
            if change < best.get(group % LANES, (torch.inf,))[0]:
                best[group % LANES] = change, pair
        return [pair for _, pair in best.values()]

    def _swap_sides(self, removed: list[int], kept: list[int]) -> None:
        while removed and kept:
            back = min(removed, key=lambda j: (self._change(-self.spread[j], -self.shift[j], self.s), j))
            s = self.s - self.shift[back]
            out = min(kept, key=lambda j: (self._change(self.spread[j], self.shift[j], s), j))
            if not self._swap(_Pair(back, out)):
                return
            removed.remove(back)
            kept.remove(out)

    def _swap_pairs(self, pairs: list[_Pair]) -> None:
        while pairs:
            best = min(pairs, key=lambda pair: (self._change(*self._added(pair), self.s), pair))
            if not self._swap(best):
                return
            pairs.remove(best)

    def _added(self, pair: _Pair) -> tuple[float, float]:
        return (
            self.spread[pair.removed] - self.spread[pair.restored],
            self.shift[pair.removed] - self.shift[pair.restored],
        )

    @staticmethod
    def _change(spread: float, shift: float, s: float) -> float:
        return spread + shift * (2.0 * s + shift)

    def _swap(self, pair: _Pair) -> bool:
        """Swaps if the gain exceeds the bound on rounding; returns whether it did."""
        spread, shift = self._added(pair)
        spreads = self.spread[pair.removed] + self.spread[pair.restored]
        count = len(self.mask) + 4.0 * self.swaps + 24.0
        rounding = 2.0**-53 * (8.0 * spreads + 2.0 * count * abs(shift) * self.shifts)
        if not self._change(spread, shift, self.s) < -rounding:
            return False
        self.mask[pair.restored], self.mask[pair.removed] = True, False
        self.s += shift
        self.swaps += 1
        return True


def _wide(t: Tensor) -> Tensor:
    return t.detach().cpu().to(torch.float64)


def _sum_by_lanes(terms: Tensor) -> Tensor:
    """``[]``: column j is added in lane ``j % 32``, then the lanes by halves."""
    lanes = torch.zeros(LANES, dtype=terms.dtype)
    for part in torch.split(terms, LANES):
        lanes[: len(part)] += part
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]
