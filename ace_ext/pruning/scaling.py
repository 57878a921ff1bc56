"""Powers of two that keep float32 in range: it cannot hold squares of numbers below 1e-19 or above 1e19.

Tensors of ordinary size are not scaled. A power of two changes no digit. So other tensors give the same masks as
ordinary ones and, up to that power, the same weights.
"""

import math

import torch
from torch import Tensor

ORDINARY_EXPONENT = 20
"""Tensors whose largest magnitude is between 2^-20 and 2^20 are not scaled. Their squares, and the squares of entries
2^-40 as large, are far from float32's limits of 2^-126 and 2^127."""


def reads_at_once(x: Tensor) -> bool:
    """Whether numbers of ``x`` may be read now. On a GPU a read waits for all queued work."""
    return x.is_cpu


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of a tensor that is not empty: ``[]`` float32, NaN if ``x`` holds NaN."""
    return torch.stack(torch.aminmax(x.detach())).abs().amax().float()


def exponent_of(x: Tensor) -> int | None:
    """``e`` if the largest magnitude of ``x`` is at least ``2^(e-1)`` and less than ``2^e``; 0 if that is an ordinary
    size; None if ``x`` is empty or zero. NaN and infinity give 0: a later step reports them.

    It reads a number, so it waits for a GPU. :func:`exponent_on_device` does not.
    """
    if x.numel() == 0:
        return None
    largest = float(_largest(x))
    if largest == 0.0:
        return None
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    return exponent if abs(exponent) > ORDINARY_EXPONENT else 0


def exponent_on_device(x: Tensor) -> Tensor:
    """:func:`exponent_of` as ``[]`` int32 on the device of ``x``: 0 for None, and limited to ±120 so that float32 can
    hold the power of two."""
    largest = _largest(x) if x.numel() else x.new_zeros(()).float()
    exponent = torch.frexp(largest)[1]
    ordinary = (exponent.abs() <= ORDINARY_EXPONENT) | ~torch.isfinite(largest)
    return exponent.masked_fill(ordinary, 0).clamp(-120, 120)


def times_power(x: Tensor, exponent: int) -> Tensor:
    """``x 2^exponent``; ``x`` itself if the exponent is 0."""
    return x if exponent == 0 else times_power_(x.clone(), exponent)


def times_power_(x: Tensor, exponent: int) -> Tensor:
    """``x`` multiplied by ``2^exponent`` in place, in two steps: the power may exceed the dtype's range."""
    if exponent:
        half = exponent // 2
        x.mul_(2.0**half).mul_(2.0 ** (exponent - half))
    return x


class InputScale:
    """The power of two that divides the inputs of a sum over tokens. The first tokens determine it."""

    def __init__(self, exponent: int | None = None) -> None:
        self.exponent = exponent
        """The inputs are divided by ``2^exponent``. None: all inputs so far were zero."""

    @property
    def power(self) -> int:
        """The exponent, 0 if there is none yet."""
        return self.exponent or 0

    def admit(self, x: Tensor) -> int:
        """Raises the exponent if ``x`` needs it. Returns the difference, by which the caller must lower its sums.

        After a chunk of ordinary size, later chunks are not read: a read costs time and, on a GPU, waits for queued
        work. If one of them overflows, the sums are not finite, and a later step reports it.
        """
        if x.is_meta or self.exponent == 0:
            return 0
        found = exponent_of(x)
        return 0 if found is None else self.raise_to(found)

    def raise_to(self, exponent: int) -> int:
        """Raises the exponent to at least this one. Returns the difference, by which the caller must lower its sums."""
        before = self.exponent
        self.exponent = exponent if before is None else max(before, exponent)
        return 0 if before is None else self.exponent - before

    def tensors(self) -> dict[str, Tensor]:
        """The exponent for a statistics file; none if it is 0."""
        return {"exponent": torch.tensor(self.exponent)} if self.exponent else {}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "InputScale":
        """The scale of :meth:`tensors`."""
        return cls(int(tensors["exponent"]) if "exponent" in tensors else 0)
