"""An approximation of the Gram matrix of a Linear's inputs by two vectors: ``G / tokens ≈ diag(σ²) + m mᵀ``.

``m_j`` is the mean and ``σ_j²`` the variance of input column j. The approximation is exact if columns are uncorrelated.
A change ``e`` of a row costs ``Σ e_j² σ_j² + (Σ e_j m_j)²``: the variance it adds to the row's output, and the square
of the shift of its mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext.pruning.scaling import exponent_of, times_power
from ace_ext.pruning.statistics import MomentState


@dataclass(frozen=True)
class MomentGram:
    """The two vectors, ``[d]`` float32. Inputs may be divided by a power of two: only relative losses are used."""

    variance: Tensor  # of each input column, not negative
    mean: Tensor

    @classmethod
    def of(cls, state: MomentState) -> "MomentGram":
        """From a Welford state. Its token weights, if any, are those of the mean and the variance."""
        variance, mean = state.variance, state.mean
        power = exponent_of(torch.cat([variance.sqrt(), mean])) or 0  # their squares must fit float32
        return cls(times_power(variance, -2 * power).float(), times_power(mean, -power).float())

    def energy(self, rows: Tensor) -> Tensor:
        """As :meth:`ace_ext.pruning.gram.GramState.energy`."""
        return (rows.square() @ self.variance).double().sum() + (rows @ self.mean).double().square().sum()
