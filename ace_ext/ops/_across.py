"""One selection over several matrices that stores no scores. ``csrc/ops/across.h`` has the contract of its two ops."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext.ops._extension import registered

RADIX_BITS = (11, 11, 10)
"""The widths of the digits of a 32-bit key, from the top."""


@dataclass(frozen=True)
class ScoredWeight:
    """A weight and the inputs of its score. The score itself is not stored, except for ``"score"``."""

    weight: Tensor  # [rows, cols] float32, float16 or bfloat16
    formula: str
    column: Tensor | None = None  # [cols] float32
    moment: Tensor | None = None  # [rows, cols] float32


@torch.no_grad()
def prune_topk_across_(weights: Sequence[ScoredWeight], keep_k: int) -> None:
    """Keeps the best ``keep_k`` entries of all ``weights`` together, and zeroes the others in place.

    Among equal scores the earlier matrix wins, then the lower row, then the lower column. The weights may differ in
    shape, dtype, formula and device.

    Raises:
        ValueError: ``keep_k`` is not from 0 to the number of entries, or a weight, factor or score is not finite. No
            weight is changed then (on CUDA that check is deferred: see :func:`ace_ext.ops.take_not_finite`).
    """
    size = sum(scored.weight.numel() for scored in weights)
    if not 0 <= keep_k <= size:
        raise ValueError(f"prune_topk_across_: keep_k must be from 0 to {size} (got {keep_k})")
    # Three rounds of digit counts, summed over the matrices, find the key of the last entry kept: `ties` of the entries
    # with the digits in `prefix` are still to be kept, `equal` of each matrix have them.
    prefix, ties, equal = 0, keep_k, [0] * len(weights)
    shift = sum(RADIX_BITS)
    for level, bits in enumerate(RADIX_BITS):
        shift -= bits
        counts = [_score_histogram(scored, prefix, level).cpu() for scored in weights]
        if keep_k == 0:
            break  # one round, to check that all scores are finite
        digit, above = _find_digit(torch.stack(counts).sum(0), ties)
        prefix |= digit << shift
        ties -= above
        equal = [int(count[digit]) for count in counts]
    if keep_k == 0:
        prefix, ties = 2**32 - 1, 0
    for scored, available in zip(weights, equal, strict=True):
        taken = min(ties, available)
        ties -= taken
        _prune_at_(scored, prefix, taken)


def _find_digit(counts: Tensor, want: int) -> tuple[int, int]:
    """The digit of the ``want``-th largest key, and the number of keys with a higher digit."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, torch.tensor(want)))
    above = int(from_top[position - 1]) if position > 0 else 0
    return len(counts) - 1 - position, above


def _score_histogram(scored: ScoredWeight, prefix: int, level: int) -> Tensor:
    """Counts ``[2 ** RADIX_BITS[level]]`` int64 of the keys that share ``prefix`` above this level, by their digit."""
    counts: Tensor = registered().score_histogram(
        scored.weight, scored.formula, prefix, level, scored.column, scored.moment
    )
    return counts


def _prune_at_(scored: ScoredWeight, key: int, ties: int) -> None:
    """Keeps every score whose key is above ``key``, and the first ``ties`` (row-major) whose key equals it."""
    registered().prune_at_(scored.weight, scored.formula, key, ties, scored.column, scored.moment)
