"""An approximation of the Gram matrix of a Linear's inputs with two vectors: ``G / tokens ≈ diag(σ²) + m mᵀ``.

``m_j`` is the mean and ``σ_j²`` the variance of input column j. The approximation is exact if columns are uncorrelated.
A change ``e`` of a row costs ``Σ e_j² σ_j² + (Σ e_j m_j)²``: the variance that it adds to the row's output, and the
square of the shift of its mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext.pruning.scaling import exponent_of, times_power
from ace_ext.pruning.statistics import MomentState


@dataclass(frozen=True)
class MomentGram:
    """The two vectors, ``[d]`` float32. Inputs may be divided by a power of two: losses are relative."""

    variance: Tensor  # of each input column, not negative
    mean: Tensor

    @classmethod
    def of(cls, state: MomentState) -> "MomentGram":
        """The mean and the variance of a Welford state, with its token weights if it has any."""
        variance, mean = state.variance, state.mean
        power = exponent_of(torch.cat([variance.sqrt(), mean])) or 0  # their squares must fit float32
        return cls(times_power(variance, -2 * power).float(), times_power(mean, -power).float())

    def energy(self, rows: Tensor) -> Tensor:
        """As :meth:`ace_ext.pruning.gram.GramState.energy`."""
        return (rows.square() @ self.variance).double().sum() + (rows @ self.mean).double().square().sum()
